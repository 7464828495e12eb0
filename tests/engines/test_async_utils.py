"""Calls to many engines at once, and to engines from ordinary code."""

import asyncio

import pytest
from engine_cases import ask, generate_all
from fleet_cases import FakeEngine
from virtual_time import now, run

from spark_nemo.engines import EngineFailure, EngineUnavailable, run_async
from spark_nemo.engines.async_utils import call_each


def test_call_each_returns_failures_and_timeouts_by_engine() -> None:
    """One of three succeeds, one fails, one takes longer than the timeout."""

    async def call(engine):
        if engine.number == 1:
            raise EngineFailure("wrong shape")
        await asyncio.sleep(engine.number)

    async def scenario():
        engines = [FakeEngine(i) for i in range(3)]
        failures = await call_each(engines, call, 1.5, "loading")
        return {engine.number: error for engine, error in failures.items()}, now()

    failures, seconds = run(scenario())
    assert sorted(failures) == [1, 2] and seconds == pytest.approx(1.5)
    assert not isinstance(failures[1], EngineUnavailable)
    assert isinstance(failures[2], EngineUnavailable)
    assert "loading took over 1.5 s" in str(failures[2])


def test_call_each_raises_other_errors() -> None:
    """A bug in the call is not an engine's failure."""

    async def call(engine):
        raise KeyError("bug")

    with pytest.raises(KeyError, match="bug"):
        run(call_each([FakeEngine()], call, 1.0, "loading"))


def test_engine_serves_across_calls_of_run_async(engine, prompts):
    """One loop persists: an engine used in one call works in the next."""
    first = run_async(generate_all(engine, [ask(p, seed=0) for p in prompts]))
    assert run_async(generate_all(engine, [ask(p, seed=0) for p in prompts])) == first
    run_async(engine.close())
