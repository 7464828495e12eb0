"""A pool loses its last server during a push: the push waits for a return, as requests do.

The fleet, the push and the disk transport are real, the engines those of
tests/engines/fleet_cases.py. tests/megatron/test_four_ranks.py shows that every rank takes part in a
repeated push.
"""

import asyncio
import dataclasses
import json
import logging
import time
from pathlib import Path

import pytest
from fleet_cases import QUICK, FakeEngine, FakeLauncher, ask, running, until

from spark_nemo.config import WeightSyncConfig
from spark_nemo.engines.base import EngineFailure, EngineUnavailable
from spark_nemo.weight_sync import synchronizer as push_module
from spark_nemo.weight_sync.synchronizer import WeightSync
from spark_nemo.weight_sync.transport import Transport, each

pytestmark = pytest.mark.filterwarnings("ignore")
STEPS = ("pause", "update_weights_from_disk", "flush_cache", "weights_checksum")


class Server(FakeEngine):
    """Records the versions it loaded.

    It dies in the call named ``dies_in``; with ``rejection`` it lives and rejects new weights.
    """

    def __init__(self, number=0, dies_in=None, rejection=None):
        super().__init__(number)
        self.dies_in = dies_in
        self.rejection = rejection
        self.loaded = []

    async def _step(self, name):
        if name == self.dies_in:
            self.dead = True
        await self._alive()

    async def pause(self):
        await self._step("pause")
        await super().pause()

    async def update_weights_from_disk(self, folder, version, *, flush_cache, timeout_s):
        await self._step("update_weights_from_disk")
        if self.rejection:
            raise EngineFailure(self.rejection)
        assert json.loads((Path(folder) / "config.json").read_text())
        self.version = version
        self.loaded.append(version)

    async def flush_cache(self):
        await self._step("flush_cache")

    async def weights_checksum(self):
        await self._step("weights_checksum")
        raise EngineFailure("this fake hashes nothing")


class DyingLauncher(FakeLauncher):
    """The first process dies in the call ``dies_in``, later ones only with ``all_die``."""

    def __init__(self, dies_in, all_die=False, **more):
        super().__init__(**more)
        self.dies_in = dies_in
        self.all_die = all_die

    async def start(self):
        await asyncio.sleep(self.start_s)
        self.engines.append(
            Server(len(self.engines), self.dies_in if self.all_die or not self.engines else None)
        )
        return self.engine


class NoRestore(Transport):
    """Cannot bring one server up to date by itself, like ``distributed`` and ``tensor``."""

    async def send(self, export, targets, version):
        tensors = list(export)
        await each(targets, lambda one: one.update_weights(tensors, version), 1.0, "loading")


def sync_for(worker, folder):
    settings = WeightSyncConfig(transport="disk", checksums="auto", timeout_s=2)
    return WeightSync.build(settings, worker, engine_kind="sglang", folder=folder)


def waits(caplog):
    return [
        record.getMessage()
        for record in caplog.records
        if record.levelno == logging.WARNING
        and "new weights wait for the return" in record.getMessage()
    ]


def run_push(worker, folder, members, version=5, limits=QUICK, meanwhile=None, transport=None):
    """Push ``version`` into a fleet of ``members``.

    Returns (versions served, the fleet's version, paused), or (error, seconds).
    """

    async def scenario():
        sync = sync_for(worker, folder)
        sync.transport = transport or sync.transport
        async with running(members, limits, on_return=sync.restore, name="policy pool") as fleet:
            await fleet.generate(ask(1))
            helper = asyncio.create_task(meanwhile()) if meanwhile else None
            begin = time.monotonic()
            try:
                await sync.push(worker, fleet, version)
                answer = await fleet.generate(ask(2))
            except EngineFailure as error:
                return str(error), time.monotonic() - begin
            finally:
                if helper is not None:
                    await helper
            return set(answer.weight_versions), fleet.version, fleet.paused

    return asyncio.run(scenario())


@pytest.mark.parametrize("step", STEPS)
def test_the_only_server_dies_in_a_push_and_is_updated_after_its_restart(
    perturbed, tmp_path, caplog, step
):
    """In every step of a push: the server is restarted and updated, and the next request is served
    with the new version by a fleet that is not paused. One warning names the pool and the timeout.
    """
    launcher = DyingLauncher(step)
    assert run_push(perturbed, tmp_path, [launcher]) == ({5}, 5, False)
    assert (
        len(launcher.engines) == 2 and launcher.engine.loaded == [5] and not launcher.engine.paused
    )
    (told,) = waits(caplog)
    assert "policy pool" in told and "up to 0.4 s" in told and "0 of 3 restarts used" in told


def test_a_server_given_by_url_is_updated_when_its_owner_restarts_it(perturbed, tmp_path, caplog):
    """After the restart it has the weights of its folder, and serves only after an update."""
    server = Server(dies_in="update_weights_from_disk")

    async def owner():
        await until(lambda: server.dead)
        await asyncio.sleep(0.2)
        server.version, server.paused, server.dies_in, server.dead = 0, False, None, False

    assert run_push(perturbed, tmp_path, [server], meanwhile=owner) == ({5}, 5, False)
    assert server.loaded == [5] and "m0 rejoins when its owner restarts it" in waits(caplog)[0]


def test_a_version_before_is_restored_while_the_next_one_waits(perturbed, tmp_path):
    """The pool dies in the second push: the returning server first loads the previous version, which
    is still on disk, then the second; only the second is kept.
    """
    launcher = DyingLauncher(None)

    async def scenario():
        sync = sync_for(perturbed, tmp_path)
        async with running([launcher], on_return=sync.restore) as fleet:
            await sync.push(perturbed, fleet, 1)
            launcher.engine.dies_in = "update_weights_from_disk"
            await sync.push(perturbed, fleet, 2)
            return (await fleet.generate(ask(1))).weight_versions

    assert set(asyncio.run(scenario())) == {2} and launcher.engine.loaded == [1, 2]
    assert [path.name for path in (tmp_path / "weights").iterdir()] == ["version-2"]


def test_a_pool_that_is_out_when_a_push_begins_is_waited_for(perturbed, tmp_path):
    """The server died before the push, in the training step."""
    launcher = DyingLauncher(None, start_s=0.05)

    async def scenario():
        sync = sync_for(perturbed, tmp_path)
        async with running([launcher], on_return=sync.restore) as fleet:
            await fleet.generate(ask(1))
            launcher.engine.dead = True
            await until(lambda: not fleet.replicas())
            await sync.push(perturbed, fleet, 3)
            return launcher.engine.version

    assert asyncio.run(scenario()) == 3 and len(launcher.engines) == 2


def test_without_restore_a_returning_server_receives_the_push_itself(perturbed, tmp_path):
    """A broadcast or handle cannot update one server alone, so a server that waits for the next
    update is a target.
    """
    launcher = DyingLauncher(None)

    class DiesOnce(NoRestore):
        async def send(self, export, targets, version):
            launcher.engine.dead = len(launcher.engines) == 1
            await super().send(export, targets, version)

    assert run_push(perturbed, tmp_path, [launcher], transport=DiesOnce()) == ({5}, 5, False)
    assert len(launcher.engines) == 2


def test_a_server_that_never_returns_ends_the_run_after_the_timeout(perturbed, tmp_path, caplog):
    """The error names the server and its last failure, not before ``pool_down_timeout_s``, which
    does not count pauses.
    """
    error, seconds = run_push(perturbed, tmp_path, [Server(dies_in="update_weights_from_disk")])
    assert error.startswith(
        "weights version 5: no server of the policy pool is left: 1 of 1 are out"
    )
    assert "m0: engine 0: connection refused" in error and len(waits(caplog)) == 1
    assert QUICK.pool_down_timeout_s <= seconds < QUICK.pool_down_timeout_s + 2


@pytest.mark.parametrize(
    "rejection", ["unknown tensor lm_head.weight", "3 of 16 tensors are served differently"]
)
def test_a_rejection_is_not_retried(perturbed, tmp_path, caplog, rejection):
    """With wrong names or wrong weights the same push would end the same way."""
    error, seconds = run_push(
        perturbed,
        tmp_path,
        [Server(rejection=rejection)],
        limits=dataclasses.replace(QUICK, pool_down_timeout_s=60),
    )
    assert rejection in error and seconds < 2 and not waits(caplog)


def test_a_rejection_and_a_death_together_are_not_retried(perturbed, tmp_path, caplog):
    """The server that is alive reported the cause."""
    error, _ = run_push(
        perturbed,
        tmp_path,
        [Server(0, rejection="unknown tensor"), Server(1, dies_in="update_weights_from_disk")],
    )
    assert "unknown tensor" in error and "connection refused" in error and not waits(caplog)


def test_one_of_two_that_dies_is_not_waited_for(perturbed, tmp_path, caplog):
    """The other has the version: the run goes on with it."""
    members = [Server(0), Server(1, dies_in="update_weights_from_disk")]
    assert run_push(perturbed, tmp_path, members) == ({5}, 5, False)
    assert members[0].loaded == [5] and not waits(caplog)


def test_a_failed_pool_ends_the_run_at_once(perturbed, tmp_path, caplog):
    """Without restarts left no server can return, whatever the timeout."""
    error, seconds = run_push(
        perturbed,
        tmp_path,
        [DyingLauncher("update_weights_from_disk", max_restarts=0)],
        limits=dataclasses.replace(QUICK, pool_down_timeout_s=60),
    )
    assert (
        "no server of the policy pool is left" in error
        and "after 0 restarts within an hour" in error
    )
    assert seconds < 3


def test_a_pool_that_dies_in_every_push_ends_the_run(perturbed, tmp_path):
    """It returns each time, but the weights may be what kills it."""
    launcher = DyingLauncher("flush_cache", all_die=True, max_restarts=99)
    error, _ = run_push(perturbed, tmp_path, [launcher], transport=NoRestore())
    assert "reached no server of the policy pool" in error
    assert (
        sum(engine.version == 5 for engine in launcher.engines) == push_module.MAX_POOL_RETRIES + 1
    )


def test_a_server_that_dies_after_its_checksum_has_not_got_the_version(perturbed, tmp_path):
    """It dies before the update ends: the push is repeated with the restarted server."""
    launcher = DyingLauncher(None)

    class DiesAtTheEnd(NoRestore):
        async def confirmed(self, version):
            if len(launcher.engines) == 1:
                launcher.engine.dead = True
                await until(lambda: len(launcher.engines) == 2)

    assert run_push(perturbed, tmp_path, [launcher], transport=DiesAtTheEnd()) == ({5}, 5, False)
    assert len(launcher.engines) == 2 and launcher.engine.version == 5


def test_a_server_without_a_fleet_is_not_waited_for(perturbed, tmp_path):
    """A single engine has no health monitor that would notice its return."""
    with pytest.raises(EngineFailure, match="connection refused") as raised:
        asyncio.run(sync_for(perturbed, tmp_path).push(perturbed, Server(dies_in="flush_cache"), 1))
    assert not isinstance(raised.value, EngineUnavailable)
