"""A pool that loses its last server in the middle of a push: the push waits for a return as
requests do.

The fleet, the push and the disk transport are the real ones, the engines those of
tests/engines/fleet_cases.py. That every rank takes part in what is repeated is shown in
tests/megatron/test_four_ranks.py.
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
    """Counts what it loaded. ``dies_in``: the call in which it dies, and is not there to answer;
    ``refusal``: what it says about new weights while it lives on.
    """

    def __init__(self, number=0, dies_in=None, refusal=None):
        super().__init__(number)
        self.dies_in, self.refusal, self.loaded = dies_in, refusal, []

    async def _step(self, name):
        if name == self.dies_in:
            self.dead = True
        await self._alive()

    async def pause(self):
        await self._step("pause")
        await super().pause()

    async def update_weights_from_disk(self, folder, version, *, flush_cache, timeout_s):
        await self._step("update_weights_from_disk")
        if self.refusal:
            raise EngineFailure(self.refusal)
        assert json.loads((Path(folder) / "config.json").read_text())
        self.version = version
        self.loaded.append(version)

    async def flush_cache(self):
        await self._step("flush_cache")

    async def weights_checksum(self):
        await self._step("weights_checksum")
        raise EngineFailure("this fake hashes nothing")


class DyingLauncher(FakeLauncher):
    """Its first life dies in the call of that name, the others do not, unless ``cursed``."""

    def __init__(self, dies_in, cursed=False, **more):
        super().__init__(**more)
        self.dies_in, self.cursed = dies_in, cursed

    async def start(self):
        await asyncio.sleep(self.start_s)
        self.engines.append(
            Server(len(self.engines), self.dies_in if self.cursed or not self.engines else None)
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
    """Push ``version`` into a fleet of ``members``. What the fleet serves afterwards, and how long
    the push took.
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
def test_the_only_server_dies_in_a_push_and_gets_the_version_when_it_is_back(
    perturbed, tmp_path, caplog, step
):
    """Whatever the server was asked for when it died: it is restarted, given the version, and the
    next request is served with it by a fleet that is not paused. The log has one warning that says
    who is waited for, and how long.
    """
    launcher = DyingLauncher(step)
    assert run_push(perturbed, tmp_path, [launcher]) == ({5}, 5, False)
    assert (
        len(launcher.engines) == 2 and launcher.engine.loaded == [5] and not launcher.engine.paused
    )
    (told,) = waits(caplog)
    assert "policy pool" in told and "up to 0.4 s" in told and "0 of 3 restarts used" in told


def test_a_server_that_somebody_else_runs_returns_with_its_folders_weights(
    perturbed, tmp_path, caplog
):
    """Given by URL: nobody here can restart it, its owner does after a while. It has lost all
    weights but those of its folder, and is not trusted before it is given some.
    """
    server = Server(dies_in="update_weights_from_disk")

    async def owner():
        await until(lambda: server.dead)
        await asyncio.sleep(0.2)
        server.version, server.paused, server.dies_in, server.dead = 0, False, None, False

    assert run_push(perturbed, tmp_path, [server], meanwhile=owner) == ({5}, 5, False)
    assert server.loaded == [5] and "m0 rejoins when its owner restarts it" in waits(caplog)[0]


def test_a_version_before_is_restored_while_the_next_one_waits(perturbed, tmp_path):
    """The pool dies in the second push: who returns is given the first version at once, which is
    still on disk, then the second; and only the second is kept.
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
    """The death came a moment before, in the training step."""
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


def test_without_a_restore_who_returns_gets_the_push_itself(perturbed, tmp_path):
    """By broadcast or handle nobody can be caught up alone: a server that waits for the next update
    is a target.
    """
    launcher = DyingLauncher(None)

    class DiesOnce(NoRestore):
        async def send(self, export, targets, version):
            launcher.engine.dead = len(launcher.engines) == 1
            await super().send(export, targets, version)

    assert run_push(perturbed, tmp_path, [launcher], transport=DiesOnce()) == ({5}, 5, False)
    assert len(launcher.engines) == 2


def test_a_server_that_never_returns_ends_the_run_after_lost_timeout(perturbed, tmp_path, caplog):
    """Named, with what it died of, and not sooner than the pool's patience, which a pause does not
    count.
    """
    error, seconds = run_push(perturbed, tmp_path, [Server(dies_in="update_weights_from_disk")])
    assert error.startswith(
        "weights version 5: no server of the policy pool is left: 1 of 1 are out"
    )
    assert "m0: engine 0: connection refused" in error and len(waits(caplog)) == 1
    assert QUICK.pool_down_timeout_s <= seconds < QUICK.pool_down_timeout_s + 2


@pytest.mark.parametrize(
    "refusal", ["unknown tensor lm_head.weight", "3 of 16 tensors are served differently"]
)
def test_a_refusal_is_not_waited_for(perturbed, tmp_path, caplog, refusal):
    """Wrong names, wrong weights: the same push would end the same way."""
    error, seconds = run_push(
        perturbed,
        tmp_path,
        [Server(refusal=refusal)],
        limits=dataclasses.replace(QUICK, pool_down_timeout_s=60),
    )
    assert refusal in error and seconds < 2 and not waits(caplog)


def test_a_refusal_beside_a_death_is_not_waited_for_either(perturbed, tmp_path, caplog):
    """The one that lives said what is wrong."""
    error, _ = run_push(
        perturbed,
        tmp_path,
        [Server(0, refusal="unknown tensor"), Server(1, dies_in="update_weights_from_disk")],
    )
    assert "unknown tensor" in error and "connection refused" in error and not waits(caplog)


def test_one_of_two_that_dies_is_not_waited_for(perturbed, tmp_path, caplog):
    """The other has the version: the run goes on with it."""
    members = [Server(0), Server(1, dies_in="update_weights_from_disk")]
    assert run_push(perturbed, tmp_path, members) == ({5}, 5, False)
    assert members[0].loaded == [5] and not waits(caplog)


def test_a_pool_that_is_given_up_ends_the_run_at_once(perturbed, tmp_path, caplog):
    """No restart is left: nothing can come back, however patient the pool is."""
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


def test_a_pool_that_dies_of_every_push_is_given_up(perturbed, tmp_path):
    """It comes back each time and could for ever: the weights may be what kills it."""
    launcher = DyingLauncher("flush_cache", cursed=True, max_restarts=99)
    error, _ = run_push(perturbed, tmp_path, [launcher], transport=NoRestore())
    assert "reached no server of the policy pool" in error
    assert (
        sum(engine.version == 5 for engine in launcher.engines) == push_module.MAX_POOL_RETRIES + 1
    )


def test_a_server_that_dies_after_its_checksum_has_not_got_the_version(perturbed, tmp_path):
    """It took everything and died before the update ended: the push is repeated with its successor,
    and not counted as done with nobody left.
    """
    launcher = DyingLauncher(None)

    class DiesAtTheEnd(NoRestore):
        async def confirmed(self, version):
            if len(launcher.engines) == 1:
                launcher.engine.dead = True
                await until(lambda: len(launcher.engines) == 2)

    assert run_push(perturbed, tmp_path, [launcher], transport=DiesAtTheEnd()) == ({5}, 5, False)
    assert len(launcher.engines) == 2 and launcher.engine.version == 5


def test_a_server_without_a_fleet_is_not_waited_for(perturbed, tmp_path):
    """Nobody would see it return."""
    with pytest.raises(EngineFailure, match="connection refused") as raised:
        asyncio.run(sync_for(perturbed, tmp_path).push(perturbed, Server(dies_in="flush_cache"), 1))
    assert not isinstance(raised.value, EngineUnavailable)
