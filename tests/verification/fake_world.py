"""An engine without a model: what it says follows from a request's seed, and how long it takes is
up to the test.
"""

from __future__ import annotations

import asyncio
import random
import selectors
from collections.abc import Callable, Iterable

from spark_nemo.config import SamplingConfig, Stage1Config
from spark_nemo.engines.base import (
    Engine,
    EngineFailure,
    EngineHealth,
    FinishReason,
    Generation,
    GenerationRequest,
)
from spark_nemo.engines.served_model import ServedModel
from spark_nemo.grammar import render_verification
from spark_nemo.grammar.verification import StepJudgement
from spark_nemo.records import Problem

END = 256
SOLVE, VERIFY = SamplingConfig(max_new_tokens=100), SamplingConfig(max_new_tokens=200)
Latency = Callable[[GenerationRequest], float]


class BytesTokenizer:
    """One token per byte; counts how often a chat is encoded."""

    eos_ids = (END,)

    def __init__(self) -> None:
        self.chats_encoded = 0

    def encode_chat(self, messages: list[dict[str, str]]) -> tuple[int, ...]:
        self.chats_encoded += 1
        return tuple(messages[0]["content"].encode())

    def decode_response(self, ids: tuple[int, ...]) -> str:
        return bytes(id_ for id_ in ids if id_ != END).decode()


class FakeEngine(Engine):
    """Three-step solutions, one in eight unusable; verdicts that call a step correct with its
    solution's own rate.
    """

    def __init__(
        self,
        latency: Latency = lambda request: 0.0,
        slots: int = 10**6,
        refuses: Callable[[GenerationRequest], bool] = lambda request: False,
    ) -> None:
        self.requests: list[GenerationRequest] = []
        self.served: list[GenerationRequest] = []
        self.prompt_tokens = self.completion_tokens = self.in_flight = self.most_in_flight = 0
        self._latency, self._refuses, self._slots = latency, refuses, asyncio.Semaphore(slots)

    async def generate(self, request: GenerationRequest) -> Generation:
        self.requests.append(request)
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            async with self._slots:
                await asyncio.sleep(self._latency(request))
        finally:
            self.in_flight -= 1
        if self._refuses(request):
            raise EngineFailure("the test wants it so")
        text = verification_of(request) if is_vote(request) else solution_of(request)
        ids = (*text.encode(), END)
        self.served.append(request)
        self.prompt_tokens += len(request.prompt_ids)
        self.completion_tokens += len(ids)
        return Generation(ids, (0.0,) * len(ids), (0,) * len(ids), FinishReason.STOP)

    async def update_weights(self, tensors, version) -> None: ...
    async def pause(self) -> None: ...
    async def resume(self) -> None: ...
    async def close(self) -> None: ...

    async def health(self) -> EngineHealth:
        return EngineHealth(True, False, self.in_flight, 0, 0, self.completion_tokens)


def is_vote(request: GenerationRequest) -> bool:
    return request.sampling.max_new_tokens == VERIFY.max_new_tokens


def solution_of(request: GenerationRequest) -> str:
    draw = random.Random(request.sampling.seed)
    if draw.random() < 1 / 8:
        return "I do not know."
    return (
        "".join(f"Step {k}: {draw.randrange(10**6)} is right.\n" for k in (1, 2, 3)) + "Answer: 7"
    )


def verification_of(request: GenerationRequest) -> str:
    rates, draw = random.Random(bytes(request.prompt_ids)), random.Random(request.sampling.seed)
    labels = [draw.random() < rates.betavariate(0.5, 0.5) for _ in range(3)]
    if draw.random() < 0.05:
        return "## Step 1: I lost my way"
    return render_verification([StepJudgement("", "", label) for label in labels], all(labels))


def served(engine: FakeEngine) -> ServedModel:
    return ServedModel(engine, BytesTokenizer(), "fake")


def stage(**changes: object) -> Stage1Config:
    defaults = dict(
        solutions_per_problem=2,
        verifications_per_solution=8,
        prompt_set="compact",
        generator_sampling=SOLVE,
        verifier_sampling=VERIFY,
    )
    return Stage1Config(**{**defaults, **changes})


def problems(count: int) -> list[Problem]:
    return [Problem(f"p{number}", f"What is {number} + {number}?") for number in range(count)]


class _NoWaiting(selectors.SelectSelector):
    """Instead of waiting, the clock is moved."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list:
        ready = super().select(0)
        if not ready and timeout:
            self.now += timeout
        return ready


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """Time passes only while nothing is left to do, and then at once: a schedule without the
    machine's speed in it.
    """

    def __init__(self) -> None:
        self._clock = _NoWaiting()
        super().__init__(self._clock)

    def time(self) -> float:
        return self._clock.now


def utilisation(
    spans: Iterable[tuple[float, float]], slots: int, start: float, end: float
) -> float:
    """Share of ``slots`` that was in use between two times, given (begin, end) of every request."""
    busy = sum(max(0.0, min(b, end) - max(a, start)) for a, b in spans)
    return busy / (slots * (end - start))
