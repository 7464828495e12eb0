"""First-step gate: compare the log-probabilities of engine and trainer for the same tokens.

Checksums compare the weights; the gate compares the results, so it also detects a wrong rotary
base, a missing bias or an engine that serves another model. It costs nothing: the first optimizer
step of a run, or of a resumed run, computes the trainer's log-probabilities anyway.
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

_NUM_WORST = 5
"""Tokens and tensors that the error names."""


class WeightMismatch(EngineFailure):
    """Engine and trainer do not serve the same model, so its samples are not on-policy."""


@dataclass(frozen=True, slots=True, order=True)
class TokenMismatch:
    """A sampled token and its two log-probabilities, in nats."""

    difference: float
    token_id: int
    engine: float
    trainer: float


@dataclass(frozen=True, slots=True)
class Mismatch:
    """|engine - trainer| over all compared tokens, in nats."""

    mean: float
    largest: float
    num_tokens: int
    worst: tuple[TokenMismatch, ...]


class FirstStepGate:
    """Collects differences on this rank with ``observe``; ``decide`` joins those of all ranks.

    ``differing_tensors`` (collective) returns the names for the error, or None if the engine cannot
    report checksums. ``show`` turns a token id into readable text.
    """

    def __init__(
        self,
        settings: WeightSyncConfig,
        differing_tensors: Callable[[], list[str] | None] | None = None,
        show: Callable[[int], str] = str,
    ) -> None:
        self.settings = settings
        self._differing_tensors = differing_tensors
        self._show = show
        self._sum = 0.0
        self._count = 0
        self._worst: list[TokenMismatch] = []

    def observe(
        self, trainer_T: Tensor, engine_T: Tensor, tokens_T: Tensor, mask_T: Tensor
    ) -> None:
        """Compare log-probabilities (after temperature) of the tokens where ``mask_T`` is True."""
        mask_T = mask_T.cpu()
        trainer_N, engine_N, tokens_N = (
            row_T.detach().cpu()[mask_T] for row_T in (trainer_T, engine_T, tokens_T)
        )
        difference_N = (trainer_N.double() - engine_N.double()).abs()
        # Every comparison with NaN is false: as infinity it fails the bounds.
        difference_N = torch.nan_to_num(difference_N, nan=torch.inf, posinf=torch.inf)
        self._sum += float(difference_N.sum())
        self._count += difference_N.numel()
        worst = difference_N.topk(min(_NUM_WORST, difference_N.numel())).indices.tolist()
        found = [
            TokenMismatch(
                difference=float(difference_N[i]),
                token_id=int(tokens_N[i]),
                engine=float(engine_N[i]),
                trainer=float(trainer_N[i]),
            )
            for i in worst
        ]
        self._worst = heapq.nlargest(_NUM_WORST, {*self._worst, *found})

    def decide(self) -> Mismatch | None:
        """Return the mismatch over all ranks; None if no token was compared. Collective.

        Raises ``WeightMismatch`` on every rank when a bound is exceeded.
        """
        sums, counts, worst_lists = zip(*gather_objects((self._sum, self._count, self._worst)))
        count = sum(counts)
        if count == 0:
            log.warning("first-step gate: this step has no sampled token to compare")
            return None
        worst = heapq.nlargest(_NUM_WORST, {token for tokens in worst_lists for token in tokens})
        found = Mismatch(sum(sums) / count, worst[0].difference, count, tuple(worst))
        exceeded = self._exceeded_bounds(found)
        if exceeded:
            raise WeightMismatch(self._message(found, exceeded))
        log.info(
            "first-step gate: engine and trainer differ by %.2g nats on average and %.2g at most over "
            "%d tokens",
            found.mean,
            found.largest,
            found.num_tokens,
        )
        return found

    def _exceeded_bounds(self, found: Mismatch) -> list[str]:
        exceeded = []
        for name, value in (
            ("max_mean_mismatch", found.mean),
            ("max_token_mismatch", found.largest),
        ):
            bound = getattr(self.settings, name)
            if bound is not None and not value <= bound:
                exceeded.append(f"weight_sync.{name}={bound}")
        return exceeded

    def _message(self, found: Mismatch, exceeded: list[str]) -> str:
        tensors = self._differing_tensors() if self._differing_tensors is not None else None
        if tensors is None:
            cause = "the engine cannot report checksums, so the tensors cannot be named"
        elif not tensors:
            cause = "all tensors are equal by checksum, so the two compute differently from the same weights"
        else:
            more = f" and {len(tensors) - _NUM_WORST} more" if len(tensors) > _NUM_WORST else ""
            cause = f"tensors that differ: {', '.join(tensors[:_NUM_WORST])}{more}"
        tokens = "; ".join(
            f"{self._show(token.token_id)!r} engine {token.engine:.4g} trainer {token.trainer:.4g}"
            for token in found.worst
        )
        return (
            "engine and trainer disagree on the sampled tokens, so the run does not train: "
            f"|difference| of the log-probabilities is {found.mean:.4g} nats on average and "
            f"{found.largest:.4g} at most over {found.num_tokens} tokens, beyond "
            f"{' and '.join(exceeded)}; {cause}; worst tokens: {tokens}"
        )
