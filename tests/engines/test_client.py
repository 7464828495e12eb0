"""Many requests over any engine."""

import asyncio

import pytest
from engine_cases import ask

from spark_nemo.engines import EngineFailure, FinishReason, Generation, generate_all, run_async


class EchoEngine:
    """Answers with the prompt after a delay that reverses the order; counts what is in flight."""

    def __init__(self):
        self.in_flight = self.most = self.cancelled = 0

    async def generate(self, request):
        self.in_flight += 1
        self.most = max(self.most, self.in_flight)
        try:
            await asyncio.sleep(0.002 * (20 - request.prompt_ids[0]))
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.in_flight -= 1
        if request.prompt_ids[0] == 13:
            raise EngineFailure("unlucky")
        return Generation(request.prompt_ids, (0.0,), (0,), FinishReason.STOP)


REQUESTS = [ask((n,)) for n in range(20)]


def test_results_keep_submission_order_and_failures_their_place():
    """Finishing order is reversed, results are not; a refusal is a value."""
    engine, finished = EchoEngine(), []
    results = run_async(
        generate_all(engine, REQUESTS, lambda index, result: finished.append(index))
    )
    assert [13 if isinstance(r, EngineFailure) else r.token_ids[0] for r in results] == list(
        range(20)
    )
    assert finished != sorted(finished) and sorted(finished) == list(range(20))


def test_tasks_are_bounded():
    """Never more than max_in_flight requests at once."""
    engine = EchoEngine()
    assert len(run_async(generate_all(engine, REQUESTS, max_in_flight=3))) == 20
    assert engine.most == 3


def test_cancelling_cancels_what_is_in_flight():
    """No request survives its caller."""

    async def scenario():
        engine = EchoEngine()
        task = asyncio.create_task(generate_all(engine, REQUESTS, max_in_flight=4))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert engine.in_flight == 0 and engine.cancelled == 4

    run_async(scenario())


def test_error_in_the_callback_is_raised_and_stops_the_rest():
    """A bug in on_result is neither swallowed nor wrapped."""
    engine = EchoEngine()

    def on_result(index, result):
        raise KeyError("bug")

    with pytest.raises(KeyError, match="bug"):
        run_async(generate_all(engine, REQUESTS, on_result, max_in_flight=4))
    assert engine.in_flight == 0


def test_no_requests_give_no_results():
    """The empty batch is fine, a bound of zero is not."""
    assert run_async(generate_all(EchoEngine(), [])) == []
    with pytest.raises(ValueError, match="max_in_flight=0"):
        run_async(generate_all(EchoEngine(), REQUESTS, max_in_flight=0))


def test_engine_serves_across_calls_of_run_async(engine, prompts):
    """One loop persists: an engine used in one call works in the next."""
    first = run_async(generate_all(engine, [ask(p, seed=0) for p in prompts]))
    assert run_async(generate_all(engine, [ask(p, seed=0) for p in prompts])) == first
    run_async(engine.close())
