"""The loops on Megatron itself: resume after kill -9 is exact, and data parallelism does not change
the numbers.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from spark_nemo.training.metrics_writer import METRICS_FILE, read_metrics

SCRIPT = Path(__file__).with_name("megatron_loops.py")
pytestmark = pytest.mark.slow


def launch(*command: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Three launches serve every test here: one killed, one process, two ranks."""
    folder = tmp_path_factory.mktemp("loops")
    killed = launch(str(SCRIPT), "kill", str(folder))
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    assert len(read_metrics(folder / "killed" / METRICS_FILE)) == 5
    for command in (
        (str(SCRIPT), "main", str(folder)),
        (
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            str(SCRIPT),
            "ranks",
            str(folder),
        ),
    ):
        finished = launch(*command)
        assert finished.returncode == 0, finished.stderr[-4000:]
    return folder


def results(folder: Path, mode: str) -> dict:
    return json.loads((folder / f"{mode}.json").read_text())


def rows(folder: Path, run: str, *names: str) -> list[list[float]]:
    return [[row[name] for name in names] for row in read_metrics(folder / run / METRICS_FILE)]


def test_resume_after_sigkill_is_exact(folder):
    """Killed in step 5 of 6 and resumed from step 4: metrics and weights equal, bit for bit, those
    never killed.
    """
    names = ("step", "loss", "grad_norm", "lr", "loss_tokens")
    assert rows(folder, "killed", *names) == rows(folder, "whole", *names)
    both = results(folder, "main")
    assert both["resumed"] == both["whole"]


def test_the_gradient_does_not_depend_on_the_packing(folder):
    """One pack, a few, one sequence each. Catches attention that leaks between packed sequences of
    unequal lengths, in the forward or only in the backward pass.
    """
    norms = results(folder, "main")["gradient_norms"]
    assert norms["16"] == pytest.approx(norms["1"], rel=1e-5)
    assert norms["1000"] == pytest.approx(norms["1"], rel=1e-5)


def test_data_parallel_fine_tuning_gives_the_same_losses_and_weights(folder):
    """Two ranks against one on the same batches; only the order of float additions differs."""
    for one, two in zip(
        rows(folder, "whole", "loss", "lr"), rows(folder, "ranks", "loss", "lr"), strict=True
    ):
        assert two == pytest.approx(one, rel=1e-4)
    one, two = results(folder, "main")["whole"], results(folder, "ranks")["whole"]
    assert one.keys() == two.keys()
    assert all(two[name] == pytest.approx(one[name], abs=2e-3) for name in one)


def test_data_parallel_grpo_gives_the_same_metrics(folder):
    """Both updates' means, gradient norms and maxima; the engine mismatch vanishes as it was built
    to.
    """
    one, two = results(folder, "main")["grpo"], results(folder, "ranks")["grpo"]
    assert one.keys() == two.keys()
    assert two == pytest.approx(one, rel=2e-2, abs=2e-3)
    assert one["engine_logprob_diff_max"] < 1e-5
    assert one["ratio_max"] > 1
    assert one["valid_fraction"] == pytest.approx(8 / 9)
