"""Loss and gradients do not depend on how a batch is packed or spread, with every step advantage
on.
"""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from step_ranks import BUDGETS, LAYOUTS

from spark_nemo.config.designs import step_advantages

SCRIPT = str(Path(__file__).with_name("step_ranks.py"))
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Two launches serve every test here: one process, and four ranks."""
    folder = tmp_path_factory.mktemp("steps")
    for command in (
        [SCRIPT, str(folder), "1"],
        [
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "4",
            SCRIPT,
            str(folder),
            "4",
        ],
    ):
        done = subprocess.run(
            [sys.executable, *command],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(folder / "one.pt") | torch.load(folder / "four.pt")


def differences(steps: dict, first: tuple, second: tuple) -> tuple[float, float, float]:
    """Return differences of losses and gradient norms (relative), and the largest of a gradient."""
    (loss, norm, grads), (other_loss, other_norm, other_grads) = steps[first], steps[second]
    assert grads.keys() == other_grads.keys()
    return (
        abs(loss - other_loss),
        abs(norm - other_norm) / norm,
        max(float((grads[name] - other_grads[name]).abs().max()) for name in grads),
    )


@pytest.mark.parametrize("design", step_advantages())
@pytest.mark.parametrize("other", [*BUDGETS[1:], *LAYOUTS])
def test_the_step_is_that_of_one_process_and_one_pack(
    steps: dict, design: str, other: int | str
) -> None:
    """Advantages that differ from token to token reach the loss of their own token under tensor,
    pipeline, sequence and data parallelism, in micro-batches of one response or of all. float32 on
    gloo; proves nothing about NCCL.
    """
    loss, norm, gradient = differences(steps, (design, BUDGETS[0]), (design, other))
    assert loss < 1e-5 and norm < 1e-4 and gradient < 1e-5, (loss, norm, gradient)


def test_the_designs_have_different_gradients(steps: dict) -> None:
    """So that the agreement above is not that of an advantage which never arrived."""
    for first, second in pairwise(step_advantages()):
        if {first, second} != {"global_step", "global_step_penalty"}:
            assert differences(steps, (first, BUDGETS[0]), (second, BUDGETS[0]))[2] > 1e-3, (
                first,
                second,
            )
