"""A pool with no server left ends the run with one line, in bounded time, whichever stage it
serves.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
from fake_sglang_process import fake_process, free_port

from spark_nemo.cli.main import main
from spark_nemo.toy.resolve import ASSETS

SERVED = ["engine.kind=sglang", "pipeline.parallel_jobs=1"]


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[str, float]:
    begin = time.monotonic()
    assert main(list(arguments)) == 2
    lines = [
        line
        for line in capsys.readouterr().err.splitlines()
        if line.startswith("spark-nemo: error:")
    ]
    assert len(lines) == 1
    return lines[0], time.monotonic() - begin


@pytest.mark.slow
def test_stage_one_stops_when_its_last_server_dies(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The generator's only server is killed on the way: the pool, the server and the wait are
    named.
    """
    port = free_port()
    flags = ("--vocab-size", "691", "--context", "512", "--token-s", "0.02")
    with fake_process(port, *flags) as server:
        timer = threading.Timer(3.0, server.kill)
        timer.start()
        message, seconds = error_of(
            capsys,
            "stage1",
            "+experiment=toy",
            f"run.dir={tmp_path}",
            *SERVED,
            "data.stage1_problems=toy:stage1:200",
            "engine.policy.pool_down_timeout_s=1",
            "engine.max_batch_size=4",
            f"engine.policy.urls=[http://127.0.0.1:{port}]",
            f"engine.verifier.urls=[http://127.0.0.1:{port}]",
            "engine.verifier.pool_down_timeout_s=1",
        )
        timer.join()
    assert (
        "stage I stopped early" in message
        and "no server of the policy pool is left: 1 of 1" in message
    )
    assert (
        f"http://127.0.0.1:{port}" in message
        and "none came back within 1." in message
        and seconds < 60
    )


def test_the_evaluation_of_a_policy_stops_without_a_server(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """No server listens at the URL from the start."""
    message, seconds = error_of(
        capsys,
        "evaluate",
        "math",
        "--model",
        str(ASSETS / "generator"),
        "+experiment=toy",
        f"run.dir={tmp_path}",
        *SERVED,
        "data.eval_problems=toy:eval:4",
        f"engine.policy.urls=[http://127.0.0.1:{free_port()}]",
        "engine.policy.pool_down_timeout_s=1",
    )
    assert (
        "no server of the policy pool is left" in message
        and "cannot connect" in message
        and seconds < 30
    )


def test_a_role_without_servers_is_named_before_anything_runs(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Stage I asks both pools."""
    message, _ = error_of(
        capsys,
        "stage1",
        "+experiment=toy",
        f"run.dir={tmp_path}",
        *SERVED,
        "data.stage1_problems=toy:stage1:4",
        "engine.policy.urls=[http://127.0.0.1:1]",
    )
    assert "engine.verifier: set either engine.verifier.servers" in message
    assert not (tmp_path / "stage1/store").exists()
