"""Problems that stage III cannot work with are rejected by name before any work."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from world import SMALL

from spark_nemo.config import ConfigError, SparkConfig
from spark_nemo.planning.preflight import check_stage3
from spark_nemo.records.rows import DataFileError
from spark_nemo.run.compose import compose_config
from spark_nemo.toy.resolve import resolve_toy


def small(folder: Path, *overrides: str) -> SparkConfig:
    return resolve_toy(
        compose_config([*SMALL, f"run.dir={folder}", "rl/reward=random", *overrides])
    )


@pytest.mark.parametrize("field", ["rl_problems", "eval_problems"])
def test_a_prompt_that_leaves_no_space_for_the_response_is_named(
    tmp_path: Path, field: str
) -> None:
    """Engines reject such a request, which ends the run at the step that draws the problem, and
    again after every resume. Says nothing about the verifier's prompt, whose length is known when
    the response is there.
    """
    config = small(tmp_path)
    path = Path(getattr(config.data, field))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[3]["question"] = "Compute " + "+".join(["7"] * config.engine.max_context) + "."
    long = tmp_path / "long.jsonl"
    long.write_text("".join(json.dumps(row) + "\n" for row in rows))
    check_stage3(config)
    with pytest.raises(
        ConfigError, match=rf"data\.{field}=.*1 of {len(rows)} prompts.*{rows[3]['problem_id']}"
    ):
        check_stage3(replace(config, data=replace(config.data, **{field: str(long)})))


def test_a_step_needs_as_many_problems_as_it_has_prompts(tmp_path: Path) -> None:
    """Without dynamic sampling an epoch of fewer problems was one step of fewer prompts, whatever
    was configured; with it a step may draw a problem twice, with other samples.
    """
    check_stage3(small(tmp_path, "rl.prompts_per_step=40"))
    with pytest.raises(ConfigError, match=r"rl\.prompts_per_step=41.*40 problems"):
        check_stage3(small(tmp_path, "rl.prompts_per_step=41"))
    check_stage3(
        small(
            tmp_path,
            "rl.prompts_per_step=41",
            "rl/rollout/filter=dynamic",
            "rl.rollout.filter.over_sampling_ratio=1",
        )
    )


def test_held_out_problems_may_be_a_benchmark_as_it_is_distributed(tmp_path: Path) -> None:
    """MATH-500's own columns are read because the file's name says what it is; the same rows under
    another name are rejected with the field that is missing, before any work.
    """
    row = {
        "problem": "What is 2 + 3?",
        "solution": "2 + 3 = \\boxed{5}",
        "answer": "5",
        "unique_id": "a/1.json",
    }
    config = small(tmp_path)
    for name in ("MATH-500.jsonl", "mine.jsonl"):
        (tmp_path / name).write_text(json.dumps(row) + "\n")
    check_stage3(
        replace(config, data=replace(config.data, eval_problems=str(tmp_path / "MATH-500.jsonl")))
    )
    with pytest.raises(DataFileError, match=r"mine\.jsonl.*problem_id"):
        check_stage3(
            replace(config, data=replace(config.data, eval_problems=str(tmp_path / "mine.jsonl")))
        )
