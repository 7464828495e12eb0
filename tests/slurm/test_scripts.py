"""Checks of the scripts that need no Slurm: they run in ``make test``."""

from __future__ import annotations

import http.server
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "slurm"
SCRIPTS = sorted(path for path in FOLDER.glob("*.sh") if path.name not in ("lib.sh", "servers.sh"))
named = pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)


@pytest.mark.slow
@named
def test_help_prints_the_usage(script: Path, tmp_path: Path) -> None:
    """``--help`` works anywhere, without Slurm, and shows a command line that can be typed."""
    done = subprocess.run(
        ["bash", script, "--help"], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    assert f"slurm/{script.name} " in done.stdout and " -- " in done.stdout


@named
def test_directives_are_where_slurm_reads_them(script: Path) -> None:
    """Slurm silently ignores ``#SBATCH`` lines that are indented or follow a command, and expands
    nothing in them.
    """
    lines = script.read_text().splitlines()
    first_command = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    for number, line in enumerate(lines):
        if "#SBATCH" in line:
            where = f"{script}:{number + 1}"
            assert line.startswith("#SBATCH --") and number < first_command and "$" not in line, (
                where
            )


@named
def test_a_batch_script_finds_its_folder_by_its_own_name(script: Path) -> None:
    """The line that asks Slurm where the script comes from is the same but for the name: a copy
    with another script's name would work from the checkout and fail in every job.
    """
    asked = re.findall(r"slurm\\\)/(\w+)\\\.sh", script.read_text())
    assert asked == ([script.stem] if "#SBATCH" in script.read_text() else [])


@pytest.mark.slow
def test_shellcheck_has_nothing_to_say() -> None:
    """All scripts and the site file, every severity."""
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed (make test-slurm installs it)")
    more = (
        "lib.sh",
        "servers.sh",
        "site.env.example",
        "../containers/import.sh",
        "../tests/slurm/run.sh",
    )
    files = [*SCRIPTS, *(FOLDER / name for name in more)]
    done = subprocess.run(
        ["shellcheck", "-x", "-s", "bash", "-P", FOLDER.parent, *files],
        capture_output=True,
        text=True,
        check=False,
        cwd=FOLDER.parent,
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_servers_are_asked_past_the_clusters_proxy(tmp_path: Path) -> None:
    """The environment names a proxy that does not answer, as on a compute node without internet."""

    class Healthy(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Not into the tests' output."""

    with http.server.HTTPServer(("127.0.0.1", 0), Healthy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        environment = {"http_proxy": "http://127.0.0.1:9", "PATH": os.environ["PATH"]}
        done = subprocess.run(
            [sys.executable, FOLDER / "server_check.py", f"http://127.0.0.1:{server.server_port}"],
            capture_output=True,
            text=True,
            env=environment,
            check=False,
        )
        server.shutdown()
    assert done.returncode == 0, done.stdout
