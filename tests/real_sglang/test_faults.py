"""Two real SGLang servers and sglang-router under a scored rollout batch of the toy task:
whatever is killed or stopped, every group is whole and nothing is counted twice.

One pool for the file, in the order of the tests: the router dies, a server dies and returns with
the pushed weights, a server hangs, all die in a push. The verifier is the embedded engine. No GPU,
and no second machine, is in it.
"""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from real_server import sglang_python

from spark_nemo.config import (
    EngineConfig,
    MegatronConfig,
    RLConfig,
    SamplingConfig,
    WeightSyncConfig,
)
from spark_nemo.config.reward import MaskFailures, ModelReward
from spark_nemo.engines import Engine, GenerationRequest, SamplingParams, run_async
from spark_nemo.engines.fleet import Fleet, FleetMetrics
from spark_nemo.engines.fleet.server_launcher import ServerProcess
from spark_nemo.engines.served_model import ServedModel
from spark_nemo.engines.sglang import SglangServer
from spark_nemo.grammar import prompt_set
from spark_nemo.megatron.worker import MegatronWorker
from spark_nemo.records import Problem
from spark_nemo.rewards.judge import RewardJudge
from spark_nemo.rewards.prm_service import PRMService
from spark_nemo.rollout.batch import RolloutBatch
from spark_nemo.rollout.generator import RolloutGenerator
from spark_nemo.run.compose import compose_config
from spark_nemo.toy.problem_files import split_problems
from spark_nemo.weight_sync.synchronizer import WeightSync

GROUPS, GROUP_SIZE = 8, 8
RETURN_S = 200.0
GREEDY = GenerationRequest(tuple(range(5, 25)), SamplingParams(max_new_tokens=20, temperature=0.0))
needs_router = pytest.mark.skipif(
    not list(sglang_python().parents[1].glob("lib/*/site-packages/sglang_router")),
    reason="sglang-router is not installed in the servers' environment",
)


@dataclass
class Pool:
    """Shared by the tests. ``pushed`` counts the weights that a returning server was given."""

    fleet: Fleet
    session: RolloutGenerator
    servers: list[ServerProcess]
    router: ServerProcess | None
    pushed: list[tuple[str, int]]
    logs: Path


@pytest.fixture(scope="module")
def pool(
    tmp_path_factory: pytest.TempPathFactory, model_folder: Path, other_folder: Path
) -> Iterator[Pool]:
    """Two policy servers from the preset that ``+engine=sglang_cpu`` gives, at weight version 1,
    and the router.
    """
    logs = tmp_path_factory.mktemp("servers")
    has_router = not needs_router.args[0]
    os.environ["SPARK_SGLANG_PYTHON"] = str(sglang_python())
    config = compose_config(
        [
            "+experiment=toy",
            "+engine=sglang_cpu",
            f"engine.policy.router={str(has_router).lower()}",
            "engine.policy.request_timeout_s=120",
            "engine.policy.probe_timeout_s=8",
            "engine.policy.start_timeout_s=280",
        ]
    )
    policy = ServedModel.load(config.engine, model_folder, "policy", logs)
    assert isinstance(policy.engine, Fleet)
    fleet, pushed = policy.engine, []

    async def push(engine: Engine, version: int) -> None:
        assert isinstance(engine, SglangServer)
        await engine.update_weights_from_disk(model_folder, version)
        pushed.append((engine.url, version))

    async def prepare() -> None:
        async with fleet.updating(1) as update:
            await asyncio.gather(
                *(engine.update_weights_from_disk(model_folder, 1) for engine in update.targets)
            )
        fleet.on_return = push

    judge = ServedModel.load(EngineConfig(max_context=320), other_folder, "verifier")
    rl = RLConfig(
        group_size=GROUP_SIZE,
        prompt_set="compact",
        sampling=SamplingConfig(max_new_tokens=60),
        reward=ModelReward(
            sampling=SamplingConfig(temperature=0.0, max_new_tokens=120),
            failures=MaskFailures(max_rate=0.9),
            retries=0,
        ),
    )
    prompts = prompt_set("compact")
    service = PRMService(judge, prompts, rl.reward.sampling)
    session = RolloutGenerator(policy, prompts, rl, 0, RewardJudge(service, retries=0), None)
    launchers = [replica.launcher for replica in fleet._replicas]
    try:
        run_async(prepare())
        yield Pool(
            fleet,
            session,
            launchers,
            fleet._router.launcher if fleet._router else None,
            pushed,
            logs,
        )
    finally:
        run_async(fleet.close())
        run_async(judge.engine.close())


def problems() -> list[Problem]:
    return [problem.record() for problem in split_problems("rl", GROUPS, 0)]


def disturbed(
    pool: Pool,
    candidates: list[ServerProcess],
    number: signal.Signals,
) -> tuple[RolloutBatch, FleetMetrics, ServerProcess]:
    """A scored batch while most of whose requests run the busiest of ``candidates`` gets a signal,
    with its group; the metrics' changes are those of this batch.
    """
    killed: list[ServerProcess] = []

    def kill_one() -> None:
        # In a thread: the embedded verifier holds the event loop for longer than the servers need
        # for a batch.
        while sum(pool.fleet.metrics().load.values()) < GROUPS * GROUP_SIZE / 2:
            time.sleep(0.005)
        killed.append(busiest(candidates))
        os.killpg(killed[0].pid, number)

    before, thread = pool.fleet.metrics(), threading.Thread(target=kill_one)
    thread.start()
    batch = run_async(pool.session.generate_batch(problems(), 0))
    thread.join(timeout=30)
    after, victim = pool.fleet.metrics(), killed[0]
    for name in ("requests", "answered", "retries", "failed", "outages"):
        setattr(after, name, getattr(after, name) - getattr(before, name))
    return batch, after, victim


def busiest(candidates: list[ServerProcess]) -> ServerProcess:
    """Return the server that computes most just now.

    Only the router knows which server is next: its policy may give one server everything.
    """

    def seconds(server: ServerProcess) -> float:
        return sum(sum(child.cpu_times()[:2]) for child in _family(server.pid))

    before = [seconds(server) for server in candidates]
    time.sleep(0.2)
    return max(zip(candidates, before), key=lambda pair: seconds(pair[0]) - pair[1])[0]


def require_whole(batch: RolloutBatch, metrics: FleetMetrics) -> None:
    groups = Counter(rollout.problem.problem_id for rollout in batch.rollouts)
    assert list(groups.values()) == [GROUP_SIZE] * GROUPS
    assert len(batch.rollouts) == GROUPS * GROUP_SIZE
    assert all(rollout.verdict is not None for rollout in batch.rollouts)
    assert metrics.requests == metrics.answered == GROUPS * GROUP_SIZE and metrics.failed == 0
    assert all(rollout.finish_reason in ("stop", "length") for rollout in batch.rollouts)
    assert {version for rollout in batch.rollouts for version in rollout.weight_versions} == {1}


def wait_until_all_up(pool: Pool) -> None:
    async def wait() -> None:
        async with asyncio.timeout(RETURN_S):
            while pool.fleet.metrics().replicas_up < 2:
                await asyncio.sleep(0.2)

    run_async(wait())


def test_an_undisturbed_batch_is_whole(pool: Pool) -> None:
    """The measure for the others, and what a real server does with the key: 401 without it, nothing
    of it in the log or on a command line.
    """
    batch = run_async(pool.session.generate_batch(problems(), 0))
    assert len(batch.rollouts) == GROUPS * GROUP_SIZE
    key = pool.servers[0].environment["SPARK_NEMO_API_KEY"]
    assert len(key) > 30
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(pool.servers[0].url + "/model_info", timeout=10)
    for path in pool.logs.iterdir():
        assert key not in path.read_text(errors="replace"), path
    for process in psutil.Process().children(recursive=True):
        assert key not in " ".join(process.cmdline())


@needs_router
def test_the_router_is_killed_in_a_batch(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests in flight through it are retried directly; then it is there again and used."""

    async def until_fed() -> None:
        async with asyncio.timeout(90):
            while (
                pool.fleet._router_engine is None
                or pool.fleet._router_engine is not pool.fleet._router.engine
            ):
                await asyncio.sleep(0.1)

    run_async(until_fed())
    batch, metrics, _ = disturbed(pool, [pool.router], signal.SIGKILL)
    require_whole(batch, metrics)
    assert metrics.retries > 0 and metrics.outages == 1 and metrics.replicas_up == 2
    run_async(until_fed())
    client = pool.fleet._router.engine
    generate = client.generate
    through_router = []

    async def counted(request):
        through_router.append(request)
        return await generate(request)

    monkeypatch.setattr(client, "generate", counted)
    run_async(pool.fleet.generate(GREEDY))
    assert through_router == [GREEDY]


def test_a_server_is_killed_in_a_batch_and_returns_with_the_current_weights(pool: Pool) -> None:
    """SIGKILL of the whole group. It is restarted, given version 1 before it serves, and says what
    the other says.
    """
    batch, metrics, victim = disturbed(pool, pool.servers, signal.SIGKILL)
    require_whole(batch, metrics)
    assert metrics.retries > 0 and metrics.replicas_up == 1
    wait_until_all_up(pool)
    assert pool.pushed == [(victim.url, 1)]

    async def ask_each() -> list[Any]:
        return await asyncio.gather(
            *(engine.generate(GREEDY) for engine in pool.fleet.replicas().values())
        )

    first, second = run_async(ask_each())
    assert first.token_ids == second.token_ids and set(first.weight_versions) == set(
        second.weight_versions
    ) == {1}


def test_a_server_hangs_in_a_batch(pool: Pool) -> None:
    """SIGSTOP of the whole group: its sockets stay open and nothing answers. Found by probes in
    less time than a request's deadline; the process is killed and started again.
    """
    pids, begin = [server.pid for server in pool.servers], time.monotonic()
    batch, metrics, victim = disturbed(pool, pool.servers, signal.SIGSTOP)
    stopped = pids[pool.servers.index(victim)]
    require_whole(batch, metrics)
    assert metrics.outages >= 1 and time.monotonic() - begin < 100
    assert victim.pid != stopped or victim.death() is not None


def test_both_servers_are_killed_in_a_push_and_get_it_when_they_are_back(
    pool: Pool, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL of all while they receive a broadcast. The push waits until one is back, which joins
    a group of its own and takes everything, checked by checksum; the other has it too, or waits for
    the next push.
    """
    worker = MegatronWorker.from_hf(
        model_folder, MegatronConfig(dtype="float32", distributed_optimizer=False), 0
    )
    settings = WeightSyncConfig(
        transport="distributed", checksums="require", timeout_s=60, bucket_mb=1
    )
    sync = WeightSync.build(settings, worker, engine_kind="sglang", folder=tmp_path)
    wait_until_all_up(pool)
    killed, receive = (
        [server.pid for server in pool.servers],
        SglangServer.update_weights_from_distributed,
    )

    async def die_once(self: SglangServer, **bucket: Any) -> None:
        for pid in killed:
            os.killpg(pid, signal.SIGKILL)
        killed.clear()
        await receive(self, **bucket)

    monkeypatch.setattr(SglangServer, "update_weights_from_distributed", die_once)
    try:
        run_async(sync.push(worker, pool.fleet, 2))
        answer = run_async(pool.fleet.generate(GREEDY))
    finally:
        run_async(sync.close())
    assert not killed and set(answer.weight_versions) == {pool.fleet.version} == {2}


def test_nothing_is_left_of_the_servers(pool: Pool) -> None:
    """Closing the pool kills all it started, also what is still starting."""
    family = [
        child.pid
        for server in [*pool.servers, *([pool.router] if pool.router else [])]
        if psutil.pid_exists(server.pid)
        for child in _family(server.pid)
    ]
    run_async(pool.fleet.close())
    time.sleep(1.0)
    left = [
        pid
        for pid in family
        if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    ]
    assert family and left == []


def _family(pid: int) -> list[psutil.Process]:
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]
