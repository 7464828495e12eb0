"""The first-step gate: do engine and trainer give the same tokens the same log-probabilities?

Checksums compare what was sent; this compares what is computed, so it also sees a wrong rotary
base, a missing bias or an engine that serves another model. It costs nothing: the trainer's
log-probabilities are those of a forward pass that the step makes anyway, looked at before the first
optimizer step of a run, and of every resumed run.
"""

from __future__ import annotations

import heapq
import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from spark_nemo.config import WeightSyncConfig
from spark_nemo.engines.base import EngineFailure
from spark_nemo.megatron.process_groups import gather_objects

log = logging.getLogger(__name__)

_WORST = 5
"""Tokens and tensors that the error names."""


class WeightMismatch(EngineFailure):
    """Engine and trainer do not serve the same model; training on such samples would be training on
    noise.
    """


@dataclass(frozen=True, slots=True, order=True)
class TokenMismatch:
    """A sampled token and its log-probabilities in nats."""

    difference: float
    token_id: int
    engine: float
    trainer: float


@dataclass(frozen=True, slots=True)
class Mismatch:
    """|engine - trainer| over all sampled tokens that were looked at, in nats."""

    mean: float
    largest: float
    num_tokens: int
    worst: tuple[TokenMismatch, ...]


class FirstStepGate:
    """Collects differences on this rank with ``see``, decides on all ranks together with
    ``decide``.

    ``differing_tensors`` is asked for names when the gate stays shut (collective; None: the engine
    cannot tell); ``show`` turns a token id into something a person can read.
    """

    def __init__(
        self,
        settings: WeightSyncConfig,
        differing_tensors: Callable[[], list[str] | None] | None = None,
        show: Callable[[int], str] = str,
    ) -> None:
        self.settings, self._differing_tensors, self._show = settings, differing_tensors, show
        self._sum, self._count, self._broken = 0.0, 0, 0
        self._worst: list[TokenMismatch] = []

    def see(self, trainer_T: Tensor, engine_T: Tensor, tokens_T: Tensor, inside_T: Tensor) -> None:
        """Log-probabilities of the same tokens after temperature; positions outside ``inside_T``
        hold anything.
        """
        inside_T = inside_T.cpu()
        trainer_N, engine_N, tokens_N = (
            row_T.detach().cpu()[inside_T] for row_T in (trainer_T, engine_T, tokens_T)
        )
        difference_N = (trainer_N.double() - engine_N.double()).abs()
        # NaN would slip through every comparison; an infinite one is as wrong.
        difference_N = torch.nan_to_num(difference_N, nan=torch.inf, posinf=torch.inf)
        self._sum += float(difference_N.sum())
        self._count += difference_N.numel()
        top = difference_N.topk(min(_WORST, difference_N.numel())).indices.tolist()
        found = [
            TokenMismatch(
                float(difference_N[i]), int(tokens_N[i]), float(engine_N[i]), float(trainer_N[i])
            )
            for i in top
        ]
        self._worst = heapq.nlargest(_WORST, {*self._worst, *found})

    def decide(self) -> Mismatch | None:
        """Raise ``WeightMismatch`` on every rank when a bound is passed; None when nothing was
        seen. Collective.
        """
        parts = gather_objects((self._sum, self._count, self._worst))
        count = sum(part[1] for part in parts)
        if count == 0:
            log.warning(
                "first-step gate: no sampled token was computed in this step, nothing is compared"
            )
            return None
        worst = tuple(heapq.nlargest(_WORST, {token for part in parts for token in part[2]}))
        found = Mismatch(sum(part[0] for part in parts) / count, worst[0].difference, count, worst)
        bounds = (("max_mean_mismatch", found.mean), ("max_token_mismatch", found.largest))
        passed = [
            f"weight_sync.{name}={bound}"
            for name, value in bounds
            if (bound := getattr(self.settings, name)) is not None and not value <= bound
        ]
        if passed:
            raise WeightMismatch(self._message(found, passed))
        log.info(
            "first-step gate: engine and trainer differ by %.2g nats on average and %.2g at most over %d tokens",
            found.mean,
            found.largest,
            found.num_tokens,
        )
        return found

    def _message(self, found: Mismatch, passed: list[str]) -> str:
        tensors = self._differing_tensors() if self._differing_tensors is not None else None
        if tensors is None:
            where = "the engine gives no checksums, so the tensors cannot be named"
        elif not tensors:
            where = "all tensors are equal by checksum, so the two compute differently from the same weights"
        else:
            more = f" and {len(tensors) - _WORST} more" if len(tensors) > _WORST else ""
            where = f"tensors that differ: {', '.join(tensors[:_WORST])}{more}"
        tokens = "; ".join(
            f"{self._show(token.token_id)!r} engine {token.engine:.4g} trainer {token.trainer:.4g}"
            for token in found.worst
        )
        return (
            f"engine and trainer disagree on the sampled tokens, so the run does not train: |difference| of the "
            f"log-probabilities is {found.mean:.4g} nats on average and {found.largest:.4g} at most over "
            f"{found.num_tokens} tokens, beyond {' and '.join(passed)}; {where}; worst tokens: {tokens}"
        )
