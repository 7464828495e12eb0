"""SIGKILL at the end of every phase of a step of stage III, then the same command: the run is the
undisturbed one.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from world import environment, rows

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).with_name("forked_runs.py")
STEPS = ["rl.steps=5", "rl.save_every=2", "rl.eval_every=2", "rl.prompts_per_step=3"]
"""Saved after steps 1, 3 and 4, evaluated at 0, 2, 4 and the end; there are 7 problems, so the data
start again.
"""
MODES = {
    "default": [],
    "ahead": [
        "rl.rollout.one_step_off=true",
        "rl/rollout/filter=dynamic",
        "rl.rollout.filter.over_sampling_ratio=1.4",
        "rl.rollout.filter.max_rounds=2",
    ],
}
"""Batches are made when they are needed, or one step ahead with dynamic sampling."""
PHASES = {"generate": 3, "verify": 3, "train": 2, "sync": 3, "saving": 3, "save": 3, "evaluate": 4}
"""At which step the process dies; what it loses is up to two steps."""
CASES = [
    *(("default", phase) for phase in PHASES),
    *(("ahead", phase) for phase in ("generate", "verify", "train", "save")),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One launch makes all runs."""
    folder = tmp_path_factory.mktemp("killed")
    runs_to_make = [
        {"name": f"{mode}-calm", "overrides": [*STEPS, *knobs], "phase": None}
        for mode, knobs in MODES.items()
    ]
    runs_to_make += [
        {
            "name": f"{mode}-{phase}",
            "overrides": [*STEPS, *MODES[mode]],
            "phase": phase,
            "step": PHASES[phase],
            "responses": 12,
        }
        for mode, phase in CASES
    ]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(folder)],
        input=json.dumps(runs_to_make),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.mark.parametrize(("mode", "phase"), CASES, ids=[f"{mode}-{phase}" for mode, phase in CASES])
def test_a_run_killed_after_a_phase_ends_as_if_it_had_not_been(
    runs: Path, mode: str, phase: str
) -> None:
    """Proves it bit for bit for the weights, and for every number of metrics, evaluations and kept
    samples; so data cursor, generators, optimizer, reward model and, a step ahead, the prefetched
    batch are restored. The embedded engine's promise: real servers do not repeat themselves.
    """
    name = f"{mode}-{phase}"
    assert json.loads((runs / "statuses.json").read_text())[name] == [-9, 0], (
        runs / f"{name}.log"
    ).read_text()[-3000:]
    calm, killed = (runs / run / "stage3/process_aware" for run in (f"{mode}-calm", name))
    assert rows(killed / "metrics.jsonl") == rows(calm / "metrics.jsonl")
    assert rows(killed / "evaluations.jsonl") == rows(calm / "evaluations.jsonl")
    assert rows(killed / "samples.jsonl") == rows(calm / "samples.jsonl")
    assert (killed / "model/model.safetensors").read_bytes() == (
        calm / "model/model.safetensors"
    ).read_bytes()


def test_the_runs_a_step_ahead_are_what_they_say(runs: Path) -> None:
    """Guards the tests above against proving nothing: groups were dropped, a round was repeated,
    every batch but the first came from weights one version older, and a prefetched batch is in the
    checkpoint that a killed run resumed from.
    """
    metrics = rows(runs / "ahead-calm/stage3/process_aware/metrics.jsonl")
    assert [row["weight_lag"] for row in metrics] == [0.0, 1.0, 1.0, 1.0, 1.0]
    assert min(row["dynamic/useful_fraction"] for row in metrics) < 1
    assert max(row["dynamic/rounds"] for row in metrics) == 2
    assert "was prefetched" in (runs / "ahead-train.log").read_text()
    assert (
        rows(runs / "default-calm/stage3/process_aware/metrics.jsonl")[1]["loss"]
        != metrics[1]["loss"]
    )
