"""Errors before the first step are reported within seconds and never count as COMPLETED."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from cluster import Cluster
from slurm_world import ASSETS, REPO, RL, SMALL, logged, output, site, submit

TWO = ("--nodes=2",)


def cases(
    folder: Path,
) -> dict[str, tuple[str, tuple[object, ...], list[str], tuple[object, ...], dict, str]]:
    """By name: script, options, overrides, sbatch options, site settings, expected message."""
    run = f"run.dir={folder}/run"
    image = folder / "none.sqsh"
    return {
        "unknown override": (
            "stage3_rl.sh",
            (),
            [*RL, run, "rl.group_sise=4"],
            TWO,
            {},
            "group_sise",
        ),
        "illegal value": (
            "stage3_rl.sh",
            (),
            [*RL, run, "rl/reward=kind words"],
            TWO,
            {},
            "kind words",
        ),
        "unquoted sign": ("stage3_rl.sh", (), [*RL, run, "rl/reward=a{b"], TWO, {}, "a{b"),
        "missing model": (
            "stage2_prm.sh",
            (),
            [*SMALL, run, "models.reward_base=/nowhere/model"],
            (),
            {},
            "/nowhere",
        ),
        "missing stage I": (
            "stage2_prm.sh",
            (),
            [*SMALL, f"run.dir={folder}/empty"],
            (),
            {},
            "stage1/store",
        ),
        "too many nodes": ("stage3_rl.sh", (), [*RL, run], ("--nodes=3",), {}, "impossible layout"),
        "too few nodes": (
            "stage3_rl.sh",
            (),
            [*RL, run, "megatron.data_parallel=4"],
            TWO,
            {"RANKS_PER_NODE": 1, "GPUS_PER_NODE": 1, "GPU_COUNT_COMMAND": "echo 1"},
            "need 4 nodes",
        ),
        "no number": (
            "stage3_rl.sh",
            ("--verifier-nodes", "many"),
            [*RL, run],
            TWO,
            {},
            "must be a number",
        ),
        "servers without engine": (
            "stage3_rl.sh",
            ("--policy-nodes", 1),
            [*RL, run],
            ("--nodes=3",),
            {},
            "policy",
        ),
        "unknown option": (
            "stage3_rl.sh",
            ("--polity-nodes", 1),
            [*RL, run],
            TWO,
            {},
            "unknown option --polity-nodes",
        ),
        "override without --": (
            "stage3_rl.sh",
            ("rl.steps=3",),
            [*RL, run],
            TWO,
            {},
            "go after --",
        ),
        "no image": ("stage3_rl.sh", (), [*RL, run], TWO, {"TRAINER_IMAGE": image}, str(image)),
        "GPUs missing": (
            "stage3_rl.sh",
            (),
            [*RL, run],
            TWO,
            {"GPUS_PER_NODE": 1, "GPU_COUNT_COMMAND": "[ $SLURM_NODEID = 0 ] && echo 1 || echo 0"},
            "has 0 GPUs of GPUS_PER_NODE=1",
        ),
        "shards unclear": (
            "stage1_generate.sh",
            (),
            [*SMALL, run],
            ("--array=2-3",),
            {},
            "--shards",
        ),
    }


def test_what_cannot_work_fails_within_seconds(slurm: Cluster, tmp_path: Path) -> None:
    """Every wrong override, path, image, layout and node: FAILED, with the reason as the last line
    or in the lines before it, and no training log.
    """
    jobs = {}
    for name, (script, options, overrides, sbatch, settings, _) in cases(tmp_path).items():
        folder = tmp_path / name.replace(" ", "-")
        folder.mkdir()
        jobs[name] = (
            folder,
            submit(
                slurm, folder, script, *options, overrides=overrides, options=sbatch, **settings
            ),
        )
    wrong = {}
    for name, (folder, job) in jobs.items():
        ended, said = slurm.wait_state(job, timeout=180), cases(tmp_path)[name][-1]
        text = "".join(path.read_text() for path in folder.glob("out-*.txt"))
        if (
            ended["JobState"] != "FAILED"
            or said not in text
            or "FAILED" not in text.splitlines()[-1]
        ):
            wrong[name] = f"{ended['JobState']}\n{text}"
    assert not wrong, "\n".join(f"== {name}: {text}" for name, text in wrong.items())
    assert not list((tmp_path / "run").rglob("trainer-*.log"))


def test_a_folder_that_only_one_node_sees_is_named(slurm: Cluster, tmp_path: Path) -> None:
    """With run.dir on a node's own disk the job fails before any rank starts.

    The error names the nodes that do not see the folder.
    """
    job = submit(
        slurm,
        tmp_path,
        "stage3_rl.sh",
        overrides=[*RL, f"run.dir={slurm.private}/run"],
        options=TWO,
    )
    ended = slurm.wait_state(job)
    text = output(tmp_path, job)
    assert ended["JobState"] == "FAILED" and "does not see" in text, text
    assert "preflight of the trainer failed on" in text, text
    assert "--exclude=node" in text


def test_image_and_mounts_reach_every_rank(slurm: Cluster, tmp_path: Path) -> None:
    """With an image in the site file every step is started with it, the checkout and the run folder
    are mounted. The plugin is a stand-in that checks its options: no container runs here.
    """
    image, run = tmp_path / "trainer.sqsh", tmp_path / "run"
    image.touch()
    job = submit(
        slurm,
        tmp_path,
        "preflight.sh",
        overrides=[*RL, f"run.dir={run}"],
        options=TWO,
        TRAINER_IMAGE=image,
        CONTAINER_PYTHON=sys.executable,
        GPUS_PER_NODE=1,
        GPU_COUNT_COMMAND=f'echo "$CONTAINER_GIVEN" >> {tmp_path}/given; echo 1',
    )
    assert slurm.wait_state(job)["JobState"] == "COMPLETED", output(tmp_path, job)
    given = (tmp_path / "given").read_text().splitlines()
    assert given == [f"{image}|{REPO}:{REPO},{run}:{run}"] * 2


@pytest.mark.parametrize("slow", [None, "node3"])
def test_the_collective_test_names_the_slow_node(
    slurm: Cluster, tmp_path: Path, slow: str | None
) -> None:
    """Pairs exchange data over gloo: the node whose network is throttled is in the --exclude list.

    With equal nodes there is no such list. NCCL is not tested.
    """
    if slow:
        throttle = (
            "tc",
            "qdisc",
            "add",
            "dev",
            "eth0",
            "root",
            "tbf",
            "rate",
            "100mbit",
            "burst",
            "64kbit",
            "latency",
            "50ms",
        )
        assert slurm.on_node(slow, *throttle).returncode == 0
    try:
        job = slurm.sbatch(
            "--nodes=5",
            "--time=5",
            "--output=out-%j.txt",
            REPO / "slurm/preflight.sh",
            "--collective",
            1,
            "--",
            f"run.dir={tmp_path}/run",
            *SMALL,
            env=site(tmp_path),
            cwd=tmp_path,
        )
        ended, text = slurm.wait_state(job, timeout=240), output(tmp_path, job)
    finally:
        if slow:
            slurm.on_node(slow, "tc", "qdisc", "del", "dev", "eth0", "root")
    if slow:
        assert ended["JobState"] == "FAILED" and text.splitlines()[-1].endswith(
            f"sbatch --exclude={slow}"
        ), text
    else:
        assert ended["JobState"] == "COMPLETED" and "every node is as fast" in text, text
    rates = [line for line in text.splitlines() if "MB/s" in line]
    assert len(rates) == 5, text + logged(tmp_path / "run", "preflight")


def test_an_evaluation_takes_the_options_of_its_command(slurm: Cluster, tmp_path: Path) -> None:
    """``--votes`` reaches the plan, which names the file that must be there at the end, and the
    command, which writes it: either alone would end the job as failed.
    """
    job = submit(
        slurm,
        tmp_path,
        "evaluate.sh",
        "processbench",
        "--model",
        ASSETS / "verifier",
        "--votes",
        2,
        overrides=[*SMALL, f"run.dir={tmp_path}/run", "stage2.eval_sampling.temperature=1.0"],
    )
    ended, said = slurm.wait_state(job)["JobState"], output(tmp_path, job)
    assert ended == "COMPLETED" and "majority of 2" in said, said


SERVERS_JOB = """#!/bin/bash
SLURM_DIR={repo}/slurm
source "$SLURM_DIR/lib.sh"
load_site
trap on_limit USR1; trap on_cancel TERM
RUN_DIR={folder}/run STAGE_RUN=stage3/servers STAGE_RUN_DIR=$RUN_DIR/stage3/servers
LOG_DIR=$RUN_DIR/logs/$STAGE_RUN/$JOB.0
DONE_FILE=$STAGE_RUN_DIR/DONE.json POLICY_SERVERS=1 VERIFIER_SERVERS=1
POLICY_WORD=(--model-path "my model")
VERIFIER_WORD=(${{DIE:-}}) VERIFIER_ENV=(A="b c")
mkdir -p "$LOG_DIR" "$STAGE_RUN_DIR"; touch "$LOG_DIR/visible"
ln -sfn "$JOB.0" "$RUN_DIR/logs/$STAGE_RUN/latest"
mapfile -t NODES < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
preflight
start_servers policy "${{NODES[@]:1:2}}"
start_servers verifier "${{NODES[@]:3:1}}"
wait_servers
printf '%s\\n' "${{SERVERS[@]}}" > "$RUN_DIR/servers"
until [[ -e $STAGE_RUN_DIR/STOP || -e $RUN_DIR/enough ]]; do sleep 0.2; done &
STEP_PIDS+=($!)
wait_for $!
[[ ! -e $RUN_DIR/enough ]] || touch "$DONE_FILE"
finish 0
"""


def test_a_crashed_server_is_started_again_until_it_is_hopeless(
    slurm: Cluster, tmp_path: Path
) -> None:
    """Servers of two roles run in steps of their own, with a key that is on no command line. One
    that is killed answers again at the same address; one that dies at once ends the job with its
    name. The servers are stand-ins: what the trainer does meanwhile is the fleet's matter.
    """
    script = tmp_path / "servers.sh"
    script.write_text(SERVERS_JOB.format(repo=REPO, folder=tmp_path))
    stand_in = REPO / "tests/slurm/stand_in_server.py"
    run = tmp_path / "run"
    job = slurm.sbatch(
        "--nodes=4",
        "--time=5",
        "--output=out-%j.txt",
        script,
        cwd=tmp_path,
        env=site(tmp_path, SERVER_PROGRAM=stand_in),
    )
    slurm.until((run / "servers").exists, f"servers\n{output(tmp_path, job)}")
    policy, verifier = (
        line for line in (run / "servers").read_text().splitlines() if line != "--servers"
    )
    assert policy.startswith("policy=http://node1:") and policy.count("http://") == 2
    assert verifier.startswith("verifier=http://node3:")
    servers = [
        line
        for line in slurm.run("ps", "-eo", "pid,args").stdout.splitlines()
        if "stand_in_server.py" in line
    ]
    ours = [line for line in servers if "srun" not in line and "--host node1" in line]
    assert not any("key" in line.lower() for line in servers)
    slurm.run("kill", "-KILL", ours[0].split()[0])
    log = run / f"logs/stage3/servers/{job}.0/job.log"
    slurm.until(lambda: "ended" in log.read_text(), "death noticed")
    url = policy.removeprefix("policy=").split(",")[0]
    host, port = url.removeprefix("http://").split(":")
    probe = f"exec 3<>/dev/tcp/{slurm_address(slurm, host)}/{port}"
    slurm.until(
        lambda: slurm.run("bash", "-c", probe, check=False).returncode == 0, f"answer at {url}"
    )
    (run / "enough").touch()
    assert slurm.wait_state(job)["JobState"] == "COMPLETED", output(tmp_path, job)
    slurm.until(lambda: not slurm.processes_of_jobs(), "end of every server", 20)

    (run / "enough").unlink()
    (run / "stage3/servers/DONE.json").unlink()
    hopeless = slurm.sbatch(
        "--nodes=4",
        "--time=5",
        "--output=out-%j.txt",
        script,
        cwd=tmp_path,
        env={**site(tmp_path, SERVER_PROGRAM=stand_in, MAX_RESTARTS=1), "DIE": "--die"},
    )
    ended, text = slurm.wait_state(hopeless), output(tmp_path, hopeless)
    assert ended["JobState"] == "FAILED", text
    assert "verifier-node3-0 died 2 times" in text.splitlines()[-1] and "told to die" in text, text


def slurm_address(slurm: Cluster, node: str) -> str:
    """Node names are known on the nodes only."""
    hosts = dict(
        reversed(line.split()[:2]) for line in (slurm.folder / "hosts").read_text().splitlines()
    )
    return hosts[node]
