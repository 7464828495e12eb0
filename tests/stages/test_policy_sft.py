"""The policy's format SFT on the toy task: it learns, its result is served, and it resumes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from world import rows, run, run_and_kill

from spark_nemo.config import EngineConfig, SamplingConfig
from spark_nemo.engines.async_utils import run_async
from spark_nemo.engines.served_model import ServedModel
from spark_nemo.grammar import check_format, prompt_set
from spark_nemo.toy.problem_files import split_problems
from spark_nemo.toy.resolve import ASSETS

pytestmark = pytest.mark.slow
TINY = [
    "data.sft_examples=toy:sft:200",
    "sft.batch_size=16",
    "sft.save_every=4",
    "sft.eval_every=5",
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run: 180 examples, two epochs."""
    folder = tmp_path_factory.mktemp("sft")
    done = run("sft", folder, *TINY)
    assert done.returncode == 0, done.stderr
    return folder


def test_both_losses_fall(trained: Path) -> None:
    """Proves the loss of what is trained on and of problems that are not both fall, and what the
    files say of the data.

    Does not prove that a policy of a real size gets better at anything.
    """
    history = rows(trained / "sft/metrics.jsonl")
    done = json.loads((trained / "sft/DONE.json").read_text())
    assert history[-1]["loss"] < 0.6 * history[0]["loss"]
    measured = {row["step"]: row["held_out_loss"] for row in history if "held_out_loss" in row}
    assert list(measured) == [0, 5, 10, 15, 20] and done["held_out_loss"] < 0.6 * measured[0]
    data = json.loads((trained / "sft/data.json").read_text())
    assert data == {"examples": 180, "held_out": 20, "too_long": 0, "dropped": {}}


def test_the_exported_model_is_served_and_keeps_the_format(trained: Path) -> None:
    """Proves the folder that stage III would start from loads in the engine, under the prompt that
    stage III uses, and passes the gate where its base did not.
    """
    assert passing(ASSETS / "verifier") < 8 <= passing(trained / "sft/model")


def test_a_killed_run_ends_like_one_that_was_not(trained: Path, tmp_path: Path) -> None:
    """Proves exact resume after SIGKILL: every logged number and every byte of the exported
    weights.
    """
    metrics = tmp_path / "sft/metrics.jsonl"
    run_and_kill("sft", tmp_path, lambda: len(rows(metrics)) >= 6, *TINY)
    done = run("sft", tmp_path, *TINY)
    assert done.returncode == 0 and "resuming after step" in done.stderr, done.stderr
    assert rows(metrics) == rows(trained / "sft/metrics.jsonl")
    weights = [folder / "sft/model/model.safetensors" for folder in (tmp_path, trained)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_a_finished_run_is_left_as_it_is(trained: Path) -> None:
    """Proves the same command ends with status 0 and one line on what it found, and touches no file
    of the part.
    """
    before = {path: path.stat().st_mtime_ns for path in (trained / "sft").rglob("*")}
    again = run("sft", trained, *TINY)
    assert again.returncode == 0 and again.stdout.startswith(
        f"sft is already complete in {trained}/sft"
    ), again.stderr
    assert {path: path.stat().st_mtime_ns for path in (trained / "sft").rglob("*")} == before


def passing(model: Path) -> int:
    """Count the greedy responses to 16 unseen problems that pass the format gate."""
    served = ServedModel.load(EngineConfig(max_batch_size=16, max_context=320), model, "policy")
    sampling, prompts = SamplingConfig(temperature=0.0, max_new_tokens=60), prompt_set("compact")

    async def texts() -> list[str]:
        return [
            (await served.complete(prompts.policy(problem.question), sampling, 0)).text
            for problem in split_problems("eval", 16, 0)
        ]

    try:
        return sum(check_format(text) is None for text in run_async(texts()))
    finally:
        run_async(served.engine.close())
