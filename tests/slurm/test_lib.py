"""Functions of ``slurm/lib.sh`` and the two checks it starts, without a Slurm.

Stand-ins for Slurm's commands record their arguments. The ``test_cluster_*`` files use a real
Slurm.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

FOLDER = Path(__file__).resolve().parents[2] / "slurm"


def in_lib(folder: Path, commands: str, **environment: object) -> tuple[str, str]:
    """Return the output of ``commands`` after sourcing lib.sh, and srun's and scontrol's arguments.

    The arguments are one line per call.
    """
    for name, says in {
        "srun": "",
        "scontrol": '[[ $1 == show ]] && printf "node%s\\n" 1 2; [[ $1 == show ]]',
    }.items():
        program = folder / name
        program.write_text(f'#!/bin/bash\necho "{name} $*" >> {folder}/called\n{says}\n')
        program.chmod(0o755)
    site = folder / "site.env"
    site.touch()
    script = (
        f'SLURM_DIR={FOLDER}\nsource "$SLURM_DIR/lib.sh"\n'
        f"LOG_DIR={folder} NODES=(node1 node2)\n{commands}"
    )
    done = subprocess.run(
        ["bash", "-c", script],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env={
            "PATH": f"{folder}:{os.environ['PATH']}",
            "SLURM_JOB_ID": "40",
            "SPARK_NEMO_SITE": str(site),
            **{name: str(value) for name, value in environment.items()},
        },
    )
    called = folder / "called"
    return done.stdout + done.stderr, called.read_text() if called.exists() else ""


def test_a_step_waits_for_its_last_rank(tmp_path: Path) -> None:
    """The main rank scores stage II's model when the others have ended; srun must give it any time,
    whatever the site's ``WaitTime``. (That srun 22.05 does end it after ``--wait`` seconds was seen
    on the test cluster.)
    """
    _, called = in_lib(tmp_path, "load_site; start_step trainer node1,node2 4 trainer -m x; wait")
    assert " --wait=0 " in called and "--kill-on-bad-exit=1" in called


@pytest.mark.parametrize(
    ("environment", "name"),
    [({}, "40"), ({"SLURM_ARRAY_JOB_ID": 40, "SLURM_ARRAY_TASK_ID": 2}, "40_2")],
)
def test_a_task_of_an_array_requeues_itself_alone(
    tmp_path: Path, environment: dict, name: str
) -> None:
    """The id of an array's last task is the array's, and ``scontrol requeue`` of that id is all its
    tasks.
    """
    said, called = in_lib(tmp_path, 'load_site; requeue "time limit"', **environment)
    assert called == f"scontrol requeue {name}\n", said


@pytest.mark.parametrize(
    ("shown", "requeued"),
    [
        (
            "JobState=RUNNING\n PreemptEligibleTime=2026-01-01T00:00:00 "
            "PreemptTime=2026-01-02T00:00:00",
            True,
        ),
        ("JobState=RUNNING\n PreemptEligibleTime=2026-01-01T00:00:00 PreemptTime=None", False),
        ("JobState=CANCELLED\n PreemptEligibleTime=2026-01-01T00:00:00 PreemptTime=None", False),
    ],
)
def test_a_preempted_job_goes_on_later(tmp_path: Path, shown: str, requeued: bool) -> None:
    """In a partition's grace time Slurm tells the steps alone, and does not requeue a job that then
    ends.
    """
    said, _ = in_lib(
        tmp_path,
        f"""scontrol() {{ printf '%s\n' '{shown}'; }}
        requeue() {{ echo "requeue: $1"; exit; }}
        nodes_lost() {{ :; }}
        STEP_PIDS=(99999999) DONE_FILE=$LOG_DIR/none STAGE_RUN_DIR=$LOG_DIR STAGE_RUN=stage3/x
        finish 5""",
    )
    assert ("requeue: preempted" in said) == requeued, said
    assert ("ended without its marker" in said) != requeued, said


def test_binding_of_the_submitting_shell_does_not_reach_the_steps(tmp_path: Path) -> None:
    """``sbatch`` hands every SLURM_ variable of its shell on; srun would bind to CPUs that this job
    does not have.
    """
    said, _ = in_lib(
        tmp_path, "load_site; env", SLURM_CPU_BIND="quiet,mask_cpu:0x1", SLURM_CPU_BIND_LIST="0x1"
    )
    assert "TOKENIZERS_PARALLELISM" in said and "SLURM_CPU_BIND" not in said


def test_nodes_talk_past_the_proxy(tmp_path: Path) -> None:
    """Every node of the job is an exception of the proxy; the site's own exceptions stay."""
    said, _ = in_lib(
        tmp_path,
        "read_manifest() {\n"
        "  RUN_DIR=$LOG_DIR/run STAGE_RUN=stage2 STAGE_RUN_DIR=$RUN_DIR DONE_FILE=none\n"
        "}\n"
        'load_site; begin_job stage2 > /dev/null; echo "$no_proxy"; echo "$NO_PROXY"',
        SLURM_JOB_NODELIST="node[1-2]",
        http_proxy="http://proxy:3128",
        no_proxy=".site",
    )
    assert said.splitlines() == ["localhost,127.0.0.1,node1,node2,.site"] * 2


def test_the_plan_in_a_container_sees_the_run_folder(tmp_path: Path) -> None:
    """Stage III's plan looks for the reward model in a run folder that need not be below the
    checkout. The container is writable: enroot's default is not, and kernels are compiled into a
    home that is in the image only.
    """
    run = tmp_path / "run"
    run.mkdir()
    said, called = in_lib(
        tmp_path,
        f'load_site; OVERRIDES=(run.dir={run}); read_manifest stage3; echo "[$RUN_DIR]"',
        TRAINER_IMAGE="/images/trainer.sqsh",
    )
    assert f",{run}:{run} " in called and " --container-writable " in called
    assert "slurm-manifest printed nothing" in said, (
        "what is guessed for the mounts is not taken for the plan's answer"
    )


def test_kernels_are_compiled_on_the_nodes_own_disk(tmp_path: Path) -> None:
    """Not in a home that nodes share: PrimeIntellect-ai/prime-rl pull request 2305. A place of the
    site's own stays.
    """
    said, _ = in_lib(tmp_path, 'load_site; echo "$TRITON_CACHE_DIR"')
    assert said.strip() == f"/tmp/triton-{os.getuid()}-40"
    said, _ = in_lib(
        tmp_path, 'load_site; echo "$TRITON_CACHE_DIR"', TRITON_CACHE_DIR="/local/triton"
    )
    assert said.strip() == "/local/triton"


def test_stages_that_launch_servers_use_the_named_python(tmp_path: Path) -> None:
    """ROLLOUT_PYTHON in the site file is enough: the engine presets read SPARK_SGLANG_PYTHON."""
    said, _ = in_lib(
        tmp_path, 'load_site; echo "$SPARK_SGLANG_PYTHON"', ROLLOUT_PYTHON="/sglang/bin/python"
    )
    assert said.strip() == "/sglang/bin/python"
    said, _ = in_lib(
        tmp_path,
        'load_site; echo "${SPARK_SGLANG_PYTHON-unset} $ROLLOUT_PYTHON"',
        PYTHON="/own/python",
    )
    assert said.strip() == "unset /own/python"


@pytest.mark.parametrize(
    ("cpus", "gpus", "refused"),
    [("96(x3),8", 8, False), ("96,1(x2)", 8, True), ("1(x4)", 0, False), ("8", 8, False)],
)
def test_one_cpu_for_eight_ranks_is_an_error(
    tmp_path: Path, cpus: str, gpus: int, refused: bool
) -> None:
    """A job that requests nodes and GPUs, but neither CPUs nor whole nodes, gets one CPU."""
    said, _ = in_lib(
        tmp_path, "load_site; check_cpus", SLURM_JOB_CPUS_PER_NODE=cpus, GPUS_PER_NODE=gpus
    )
    assert ("this job has 1 CPUs" in said) == refused, said


def test_a_srun_that_fails_is_no_lost_node(tmp_path: Path) -> None:
    """Nodes are lost when others answer: no answer from this script's own node is srun's failure,
    and a requeue for it would hide what went wrong.
    """
    said, called = in_lib(tmp_path, 'echo "lost: [$(nodes_lost)]"', SLURMD_NODENAME="node1")
    assert "srun" in called and "lost: []" in said
    said, _ = in_lib(
        tmp_path,
        'srun() { :; }; timeout() { echo node1; }; echo "lost: [$(nodes_lost)]"',
        SLURMD_NODENAME="node1",
    )
    assert "lost: [node2]" in said


class _Healthy(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        """Answer."""
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Nothing."""


def test_servers_are_asked_past_the_proxy() -> None:
    """A proxy out of the cluster cannot reach a server inside; here it is a closed port."""
    server = HTTPServer(("127.0.0.1", 0), _Healthy)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        done = subprocess.run(
            [sys.executable, FOLDER / "server_check.py", f"http://127.0.0.1:{server.server_port}"],
            check=False,
            capture_output=True,
            text=True,
            env={"http_proxy": "http://127.0.0.1:9", "PATH": os.environ["PATH"]},
        )
    finally:
        server.shutdown()
        server.server_close()
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("name", "nodes", "refused"),
    [("localhost", "2", True), ("localhost", "1", False), ("192.0.2.1", "2", False)],
)
def test_a_node_that_calls_itself_localhost_is_named(
    tmp_path: Path,
    name: str,
    nodes: str,
    refused: bool,
) -> None:
    """Servers listen at their node's name: where that is 127.0.1.1, as Debian's installer writes,
    no other node reaches them. Alone on its node a job may.
    """
    done = subprocess.run(
        [
            sys.executable,
            FOLDER / "node_check.py",
            "--canary",
            tmp_path,
            "--head",
            "localhost",
            "--first-port",
            "20000",
        ],
        capture_output=True,
        text=True,
        check=True,
        env={"SLURMD_NODENAME": name, "SLURM_STEP_NUM_NODES": nodes, "GLOO_SOCKET_IFNAME": "eth0"},
    )
    assert ("resolves its own name" in done.stdout) == refused, done.stdout
    assert done.stdout.startswith(f"{name} ok ") != refused
