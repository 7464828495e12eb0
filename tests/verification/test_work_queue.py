"""The bounded pipeline, in virtual time: what it does to an engine's slots, whatever the machine's
speed.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator
from functools import partial

import pytest
from fake_world import (
    FakeEngine,
    VirtualTimeLoop,
    is_vote,
    problems,
    served,
    solution_of,
    stage,
    utilisation,
)

from spark_nemo.records import Problem
from spark_nemo.verification.sampler import Stage1Sampler
from spark_nemo.verification.work_queue import WorkQueue


class NullStore:
    """Remembers nothing."""

    def get(self, key: str, kind: str) -> None: ...
    def append(self, key: str, kind: str, payload: dict, *, parent: str | None = None) -> bool:
        return True


def run(coroutine):
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(coroutine)


class TimedEngine(FakeEngine):
    """Remembers when each request was in flight."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.spans: list[tuple[float, float, bool]] = []
        self.votes_owed: list[int] = []
        """By each of ``spans``: 4 for a usable solution, -1 for a vote."""

    async def generate(self, request):
        start = asyncio.get_running_loop().time()
        generation = await super().generate(request)
        self.spans.append((start, asyncio.get_running_loop().time(), is_vote(request)))
        owed = 4 * solution_of(request).startswith("Step 1")
        self.votes_owed.append(-1 if is_vote(request) else owed)
        return generation


@pytest.mark.parametrize("rule", [{}, {"early_stop": "exact"}])
def test_a_slow_problem_leaves_no_slot_idle(rule: dict) -> None:
    """Proves that every slot is in use while there is work, with solves, waves of votes and
    stragglers mixed.

    A request lasts one second and every hundredth a minute. The processor's time is not part of
    this: ``benchmarks/pipeline_throughput.py`` measures it.
    """
    slow = TimedEngine(lambda request: 60.0 if request.sampling.seed % 100 == 0 else 1.0)
    collector = Stage1Sampler(
        stage(**rule, verifications_per_solution=4), 0, served(slow), served(slow), NullStore()
    )
    run(collector.run(problems(600), 50))
    last_problem = max(start for start, _, is_a_vote in slow.spans if not is_a_vote)
    assert slow.most_in_flight == 50
    assert utilisation([span[:2] for span in slow.spans], 50, 0.0, last_problem) > 0.99
    assert last_problem > 50


@pytest.mark.parametrize("latency", [lambda draw: 1.0, lambda draw: draw.expovariate(1.0)])
def test_votes_go_before_new_solutions_and_both_keep_going(
    latency: Callable[[random.Random], float],
) -> None:
    """Proves that unverified solutions do not pile up, and that solves and votes are in flight side
    by side.

    The first twenty seconds, when there is nothing yet but solves and then their votes, do not
    count for the second.
    """
    draw = random.Random(1)
    engine = TimedEngine(lambda request: latency(draw))
    collector = Stage1Sampler(
        stage(verifications_per_solution=4), 0, served(engine), served(engine), NullStore()
    )
    run(collector.run(problems(1000), 50))
    events = sorted(
        [(start, 1, vote, 0) for start, _, vote in engine.spans]
        + [(end, -1, vote, owed) for (_, end, vote), owed in zip(engine.spans, engine.votes_owed)]
    )
    end = max(start for start, _, vote in engine.spans if not vote)
    solves = votes = owed = most_owed = 0
    only_one_kind, before = 0.0, 0.0
    for at, change, vote, owed_more in events:
        if 20 < at <= end and (solves == 0 or votes == 0):
            only_one_kind += at - before
        solves, votes = solves + change * (not vote), votes + change * vote
        owed += owed_more
        most_owed, before = max(most_owed, owed), at
    assert most_owed <= 50 * (4 + 1)
    assert end > 100
    assert only_one_kind < 0.01 * end


def test_problems_are_drawn_when_they_are_needed() -> None:
    """Proves that the pipeline holds a bounded number of problems and solutions, by what it draws
    and what is done.
    """
    drawn = done = widest = 0

    def lazily() -> Iterator[Problem]:
        nonlocal drawn, widest
        for problem in problems(600):
            drawn += 1
            widest = max(widest, drawn - done)
            yield problem

    async def after_votes(solution, parsed, votes) -> None:
        nonlocal done
        done += 0.5 * 8 / 7  # two solutions per problem, one in eight unusable

    draw = random.Random(1)
    engine = FakeEngine(lambda request: draw.expovariate(1.0))
    collector = Stage1Sampler(
        stage(), 0, served(engine), served(engine), NullStore(), on_votes_complete=after_votes
    )
    run(collector.run(lazily(), 40))
    assert drawn == 600
    assert widest < 100
    assert not collector.accounting._open_problems


def test_an_error_in_one_job_ends_all_and_is_raised() -> None:
    """Proves that a full disk does not leave a thousand requests running."""
    engine = FakeEngine(lambda request: 1.0)

    class FullStore(NullStore):
        def append(self, key: str, kind: str, payload: dict, *, parent: str | None = None) -> None:
            raise OSError("no space")

    collector = Stage1Sampler(stage(), 0, served(engine), served(engine), FullStore())
    with pytest.raises(ExceptionGroup) as caught:
        run(collector.run(problems(100), 10))
    assert caught.group_contains(OSError, match="no space")
    assert engine.in_flight == 0
    assert len(engine.requests) <= 20


def test_follow_ups_run_in_the_order_they_were_pushed() -> None:
    """Proves ``push``: behind those that wait, or before them; new jobs after all."""
    order: list[str] = []

    async def job(name: str, *pushes: tuple[str, bool]) -> None:
        order.append(name)
        for pushed, first in pushes:
            queue.push([partial(job, f"{pushed}1"), partial(job, f"{pushed}2")], first=first)

    queue = WorkQueue(1, 1)
    run(
        queue.run(
            [partial(job, "new", ("a", False), ("b", False), ("c", True)), partial(job, "next")]
        )
    )
    assert order == ["new", "c1", "c2", "a1", "a2", "b1", "b2", "next"]
