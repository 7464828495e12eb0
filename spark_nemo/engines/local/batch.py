"""The running requests: one row each, with the bookkeeping in tensors to vectorise a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from ..base import FinishReason, Generation, GenerationRequest
from .decoder import Decoder
from .kv_cache import KVCache, PrefixKV, PrefixStore, round_up
from .sampler import RowSampling, draw

NO_TOKEN = -1
PREFIX_STORE_TOKENS = 16384
PREFILL_TOKENS = 4096
"""Padded tokens of one prefill batch (a longer prompt gets a batch of its own)."""


@dataclass(slots=True, eq=False)
class Running:
    """One request and the weight versions that have sampled its tokens."""

    request: GenerationRequest
    versions: list[tuple[int, int]]
    """(first token, version)"""

    def versions_of(self, count: int) -> tuple[int, ...]:
        """Return the version of each of ``count`` tokens."""
        starts = [start for start, _ in self.versions[1:]] + [count]
        stamped: list[int] = []
        for (_, version), end in zip(self.versions, starts):
            stamped += [version] * (end - len(stamped))
        return tuple(stamped)


class Batch:
    """Rows ``0 .. len(running) - 1`` are decoded together.

    A row starts with its prompt's last token as input and the rest of the prompt in the cache, so
    that first and later tokens take the same path. Identical prompts are prefilled once and their
    keys and values copied.
    """

    def __init__(self, decoder: Decoder, max_rows: int) -> None:
        self.decoder = decoder
        self.running: list[Running] = []
        self.max_rows = max_rows
        self._cache = KVCache(decoder.spec)
        self._prefixes = PrefixStore(PREFIX_STORE_TOKENS)
        integers = torch.zeros(5, max_rows, dtype=torch.int64)
        self._input_S, self._position_S, self._emitted_S, self._limit_S, self._top_k_S = integers
        self._temperature_S, self._top_p_S = torch.ones(2, max_rows)
        self._greedy_S = torch.zeros(max_rows, dtype=torch.bool)
        self._stops_SK = torch.full((max_rows, 1), NO_TOKEN)
        self._uniforms_SM, self._logprobs_SM = torch.zeros(2, max_rows, 0)
        self._tokens_SM = torch.zeros(max_rows, 0, dtype=torch.int64)
        self._integers_FS = integers
        self._any_greedy = False
        self._any_cut = False

    @property
    def free(self) -> int:
        """Number of free rows."""
        return self.max_rows - len(self.running)

    def forget_prefixes(self) -> None:
        """Drop cached prompts.

        For new weights, and for an idle engine, whose results must not depend on its past.
        """
        self._prefixes.clear()

    def emitted(self) -> list[int]:
        """Return the number of tokens sampled so far, by row."""
        return self._emitted_S[: len(self.running)].tolist()

    def add(self, requests: Sequence[GenerationRequest], version: int) -> list[Running]:
        """Prefill ``requests``, at most ``free``, and give each a row; weights have ``version``."""
        first = len(self.running)
        rows = range(first, first + len(requests))
        seats: dict[tuple[int, ...], list[int]] = {}
        for row, request in zip(rows, requests):
            seats.setdefault(request.prompt_ids[:-1], []).append(row)
        self._cache.reserve(
            min(self.max_rows, max(rows.stop, 2 * self._cache.rows)), max(map(len, seats)) + 1
        )
        for ids, prefix in self._prefixes_of([ids for ids in seats if ids]).items():
            self._cache.install(torch.tensor(seats[ids]), prefix)
        self._grow_buffers(requests)
        for row, request in zip(rows, requests):
            self._seat(row, request)
        added = [Running(request, [(0, version)]) for request in requests]
        self.running += added
        self._refresh_flags()
        return added

    def _prefixes_of(self, wanted: list[tuple[int, ...]]) -> dict[tuple[int, ...], PrefixKV]:
        """Return each prefix's keys and values, stored or prefilled in batches by length."""
        found = {ids: self._prefixes.get(ids) for ids in wanted}
        todo = sorted((ids for ids in wanted if found[ids] is None), key=len)
        while todo:
            count = max(1, PREFILL_TOKENS // len(todo[-1]))
            group = todo[-count:]
            todo = todo[:-count]
            found |= zip(group, self.decoder.prefill(group))
        for ids in wanted:
            if self._prefixes.get(ids) is None:
                self._prefixes.put(ids, found[ids])
        return found

    def _grow_buffers(self, requests: Sequence[GenerationRequest]) -> None:
        """Widen the per-token buffers and the stop-token table to what ``requests`` need."""
        width = max(request.sampling.max_new_tokens for request in requests)
        extra = width - self._tokens_SM.shape[1]
        if extra > 0:
            self._uniforms_SM = pad(self._uniforms_SM, (0, extra))
            self._logprobs_SM = pad(self._logprobs_SM, (0, extra))
            self._tokens_SM = pad(self._tokens_SM, (0, extra))
        most_stops = max(len(request.sampling.stop_token_ids) for request in requests)
        extra = most_stops - self._stops_SK.shape[1]
        if extra > 0:
            self._stops_SK = pad(self._stops_SK, (0, extra), value=NO_TOKEN)

    def _seat(self, row: int, request: GenerationRequest) -> None:
        sampling = request.sampling
        greedy = sampling.temperature == 0
        self._integers_FS[:, row] = torch.tensor(
            [
                request.prompt_ids[-1],
                len(request.prompt_ids) - 1,
                0,
                sampling.max_new_tokens,
                0 if greedy else sampling.top_k,
            ]
        )
        self._temperature_S[row] = sampling.temperature or 1.0
        self._top_p_S[row] = 1.0 if greedy else sampling.top_p
        self._greedy_S[row] = greedy
        self._stops_SK[row] = NO_TOKEN
        if sampling.stop_token_ids:
            self._stops_SK[row, : len(sampling.stop_token_ids)] = torch.tensor(
                sampling.stop_token_ids
            )
        if not greedy:
            generator = torch.Generator()
            if sampling.seed is None:
                generator.seed()
            else:
                generator.manual_seed(sampling.seed)
            uniforms_T = self._uniforms_SM[row, : sampling.max_new_tokens]
            torch.rand(uniforms_T.shape, generator=generator, out=uniforms_T)

    def _refresh_flags(self) -> None:
        rows = len(self.running)
        self._any_greedy = bool(self._greedy_S[:rows].any())
        self._any_cut = bool(((self._top_p_S[:rows] < 1) | (self._top_k_S[:rows] > 0)).any())

    def step(self) -> list[tuple[Running, Generation]]:
        """Sample one token for every row and return the requests that ended, freeing their rows."""
        rows = len(self.running)
        every_N = torch.arange(rows)
        emitted_N = self._emitted_S[:rows]
        position_N = self._position_S[:rows]
        length = round_up(int(position_N.max()) + 1)
        self._cache.reserve(rows, length)
        logits_NV = self.decoder.decode(self._input_S[:rows], position_N, self._cache, length)
        tokens_N, logprobs_N = draw(
            logits_NV,
            RowSampling(
                self._temperature_S[:rows],
                self._greedy_S[:rows],
                self._top_p_S[:rows],
                self._top_k_S[:rows],
                self._uniforms_SM[every_N, emitted_N],
                self._any_greedy,
                self._any_cut,
            ),
        )
        self._tokens_SM[every_N, emitted_N] = tokens_N
        self._logprobs_SM[every_N, emitted_N] = logprobs_N
        self._input_S[:rows] = tokens_N
        # Views: this advances the rows of the whole table.
        position_N += 1
        emitted_N += 1
        stopped_N = (self._stops_SK[:rows] == tokens_N.unsqueeze(1)).any(1)
        ended = (stopped_N | (emitted_N >= self._limit_S[:rows])).nonzero().flatten().tolist()
        if not ended:
            return []
        finished = [
            (self.running[row], self._generation(row, bool(stopped_N[row]))) for row in ended
        ]
        self.remove(ended)
        return finished

    def _generation(self, row: int, stopped: bool) -> Generation:
        count = int(self._emitted_S[row])
        return Generation(
            token_ids=tuple(self._tokens_SM[row, :count].tolist()),
            logprobs=tuple(self._logprobs_SM[row, :count].tolist()),
            weight_versions=self.running[row].versions_of(count),
            finish_reason=FinishReason.STOP if stopped else FinishReason.LENGTH,
        )

    def remove(self, rows: Sequence[int]) -> None:
        """Free ``rows``; the last live rows move into the gaps, so that rows stay dense."""
        gone = set(rows)
        kept = len(self.running) - len(rows)
        holes = [row for row in sorted(gone) if row < kept]
        tails = [row for row in range(kept, len(self.running)) if row not in gone]
        if holes:
            source_M = torch.tensor(tails)
            target_M = torch.tensor(holes)
            length = int(self._position_S[source_M].max())
            self._cache.move(source_M, target_M, length)
            self._integers_FS[:, target_M] = self._integers_FS[:, source_M]
            for state in (
                self._temperature_S,
                self._top_p_S,
                self._greedy_S,
                self._stops_SK,
                self._uniforms_SM,
                self._logprobs_SM,
                self._tokens_SM,
            ):
                state[target_M] = state[source_M]
            for source, target in zip(tails, holes):
                self.running[target] = self.running[source]
        del self.running[kept:]
        self._refresh_flags()
