"""Building blocks of working one step ahead: background work, checkpointed batch, timeline."""

from __future__ import annotations

import asyncio
import math
import pickle
import threading

import pytest

from spark_nemo.config import ConfigError, RLConfig
from spark_nemo.config.rollout import RolloutConfig
from spark_nemo.engines.async_utils import BackgroundWork, run_async
from spark_nemo.grammar import StepFormat, split_response
from spark_nemo.records import (
    EngineError,
    FormatViolation,
    Problem,
    Rollout,
    RolloutVerdict,
    TokenSpan,
    Verdict,
)
from spark_nemo.rollout.batch import RolloutBatch
from spark_nemo.rollout.prefetch import RolloutPrefetcher
from spark_nemo.rollout.prefetched_batch import batch_from_bytes, batch_to_bytes
from spark_nemo.rollout.timeline import GENERATE, TRAIN, VERIFY, Timeline, shared_seconds, union
from spark_nemo.rollout.worker import weight_lag


def batch(version: int = 3) -> RolloutBatch:
    verdicts = (
        RolloutVerdict(None, Verdict((True, False), False), 7),
        RolloutVerdict(FormatViolation("steps"), None),
        RolloutVerdict(None, EngineError("gone"), 0),
        RolloutVerdict(None, Verdict((True,), True), 5),
    )
    text = r"<think><step>2</step></think><answer>\boxed{2}</answer>"
    rollouts = [
        Rollout(
            problem=Problem(f"p{n}", "1 + 1?"),
            group=n // 2,
            prompt_ids=(1, 2),
            response_ids=(3, 4),
            logprobs=(-0.1, -math.pi),
            weight_versions=(version, version),
            text=text,
            finish_reason="stop",
            step_spans=(TokenSpan(0, 2),),
            parsed=split_response(text, StepFormat.TAGGED),
            verdict=verdict,
            reward=reward,
            valid=not math.isnan(reward),
        )
        for n, (verdict, reward) in enumerate(zip(verdicts, (0.0, 0.0, math.nan, 1.0)))
    ]
    return RolloutBatch(rollouts, {"reward": 1 / 3}, consumed=5)


def test_a_batch_comes_back_from_a_checkpoint_as_it_was() -> None:
    """Every log-probability to the last bit, failures as failures, the masked reward as NaN, the
    data cursor.
    """
    came = batch_from_bytes(batch_to_bytes(batch()))
    assert math.isnan(came.rollouts[2].reward)
    written = batch()
    written.rollouts[2].reward = came.rollouts[2].reward = 0.0  # NaN equals nothing
    assert came == written


def test_a_batch_of_another_version_or_of_foreign_objects_is_refused() -> None:
    """Slots would be filled in order whatever their names, and a pickle may name any function there
    is.
    """
    data = batch_to_bytes(batch())
    with pytest.raises(ConfigError, match="another version"):
        batch_from_bytes(data.replace(b'"weight_versions"', b'"versions"', 1))
    head = data.partition(b"\n")[0]
    with pytest.raises(ConfigError, match="not a data class of a batch"):
        batch_from_bytes(head + b"\n" + pickle.dumps(threading.get_ident))
    with pytest.raises(ConfigError, match="damaged"):
        batch_from_bytes(data[:-9])
    with pytest.raises(ConfigError, match="holds int"):
        batch_from_bytes(head + b"\n" + pickle.dumps(3))


def test_a_pickle_cannot_reach_a_function_through_a_module_of_this_package() -> None:
    """A dotted name walks from a module of ours into what that module imported; only classes of a
    batch are made.
    """
    head = batch_to_bytes(batch()).partition(b"\n")[0]
    for module, name in (
        ("spark_nemo.run.local_executor", "subprocess.getoutput"),
        ("spark_nemo.run.local_executor", "run_job_graph"),
    ):
        strings = b"".join(b"\x8c" + bytes([len(text)]) + text.encode() for text in (module, name))
        call = (
            b"\x80\x04" + strings + b"\x93\x8c\x04true\x85R."
        )  # STACK_GLOBAL, "true", TUPLE1, REDUCE, STOP
        with pytest.raises(ConfigError, match="not a data class of a batch"):
            batch_from_bytes(head + b"\n" + call)


def test_background_work_runs_beside_its_caller_and_hands_over_result_or_error() -> None:
    """It ends although the caller's thread never yields to the loop in between; the loop can be
    used afterwards.
    """
    seen = threading.Event()

    async def work(fail: bool) -> int:
        await asyncio.sleep(0)
        seen.set()
        if fail:
            raise ValueError("no")
        return threading.get_ident()

    running = BackgroundWork(work(False))
    assert seen.wait(10)
    assert running.result() != threading.get_ident()
    with pytest.raises(ValueError, match="no"):
        BackgroundWork(work(True)).result()
    assert run_async(work(False)) == threading.get_ident()


def test_cancelled_background_work_has_ended() -> None:
    """A run that fails in training must not wait for a generation that may take an hour."""
    ended = threading.Event()

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    BackgroundWork(work()).cancel()
    assert ended.is_set()
    run_async(asyncio.sleep(0))


class Generator:
    """Makes batches sampled by the newest weights that were synced when it was called."""

    version = 0

    def __init__(self) -> None:
        self.steps: list[int] = []

    async def generate(self, problems: list[Problem], step: int) -> RolloutBatch:
        self.steps.append(step)
        return batch(self.version)


PROBLEMS = [Problem(str(n), "?") for n in range(5)]
CONFIG = RLConfig(steps=3, prompts_per_step=2, rollout=RolloutConfig(one_step_off=True))


def test_prefetched_batches_are_one_version_behind() -> None:
    """As in the loop of stage III: sync, next, prefetch, train, wait. Every step's batch is made
    once, the first one with the current weights and the others with the weights before.
    """
    generator = Generator()
    prefetcher = RolloutPrefetcher(CONFIG, 0, PROBLEMS, generator.generate)
    lags = []
    for step in range(3):
        generator.version = step
        lags.append(weight_lag(prefetcher.next(step), step))
        if step < 2:
            prefetcher.prefetch(step + 1)
        prefetcher.wait()
    assert lags == [0, 1, 1]
    assert generator.steps == [0, 1, 2]
    assert prefetcher.files() == {}


def test_a_batch_that_is_not_prefetched_is_made_when_it_is_needed() -> None:
    """Every step's batch comes from the current weights."""
    generator = Generator()
    prefetcher = RolloutPrefetcher(CONFIG, 0, PROBLEMS, generator.generate)
    for step in range(3):
        generator.version = step
        assert weight_lag(prefetcher.next(step), step) == 0
        prefetcher.wait()


def test_the_prefetched_batch_is_in_the_checkpoint(tmp_path) -> None:
    """Resumed after step 0, step 1 trains on the batch that version 0 had made, and does not make
    it again.
    """
    prefetcher = RolloutPrefetcher(CONFIG, 0, PROBLEMS, Generator().generate)
    prefetcher.next(0)
    prefetcher.prefetch(1)
    prefetcher.wait()
    for name, content in prefetcher.files().items():
        (tmp_path / name).write_bytes(content)
    generator = Generator()
    generator.version = 1
    resumed = RolloutPrefetcher(CONFIG, 0, PROBLEMS, generator.generate)
    resumed.restore(tmp_path, prefetcher.cursor)
    taken = resumed.next(1)
    assert [rollout.weight_versions for rollout in taken.rollouts] == [(0, 0)] * 4
    assert generator.steps == []


def test_hidden_is_the_share_of_verification_within_generation_or_training() -> None:
    """Step 1's responses were verified for 6 s: 1 s within a generation, 2 s within another step's
    training. Overlapping verifications count once.
    """
    timeline = Timeline(
        [
            (GENERATE, 1, 0.0, 3.0),
            (VERIFY, 1, 2.0, 5.0),
            (VERIFY, 1, 4.0, 8.0),
            (TRAIN, 0, 6.0, 9.0),
        ]
    )
    assert timeline.row(1) == {
        "generate_seconds": 3.0,
        "verify_seconds": 6.0,
        "train_seconds": 0.0,
        "verify_hidden": 0.5,
    }
    assert "verify_hidden" not in timeline.row(0)


def test_unions_and_intersections_of_intervals() -> None:
    """Touching intervals merge, an empty one vanishes."""
    assert union([(3, 4), (0, 1), (1, 2), (5, 5)]) == [(0, 2), (3, 4)]
    assert shared_seconds([(0, 2), (3, 4)], [(1, 3.5)]) == pytest.approx(1.5)
