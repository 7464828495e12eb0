"""A whole push into servers that really receive, by every transport.

The servers are ``receiver.py``: SGLang's protocol, its process groups and its layout of parameters,
without SGLang. tests/real_sglang does the same with SGLang. Neither covers NCCL and CUDA IPC.
"""

import errno
import itertools
import json
import os
import resource
import threading
import time

import pytest
from receivers import start_receivers

from spark_nemo.config import WeightSyncConfig
from spark_nemo.engines.async_utils import run_async
from spark_nemo.engines.base import EngineFailure, GenerationRequest, SamplingParams
from spark_nemo.engines.fleet import Fleet
from spark_nemo.weight_sync.synchronizer import WeightSync

pytestmark = pytest.mark.filterwarnings("ignore")
TRANSPORTS = ("disk", "distributed", "tensor")


@pytest.fixture(scope="module")
def receiver():
    with start_receivers(1) as (one,):
        yield one


@pytest.fixture
def server(receiver):
    receiver.tricks()
    return receiver


def sync_for(worker, folder, transport, **settings):
    settings = WeightSyncConfig(
        transport=transport, **{"checksums": "require", "timeout_s": 10, **settings}
    )
    sync = WeightSync.build(settings, worker, engine_kind="sglang", folder=folder)
    sync.plan = small_buckets(sync, worker)
    return sync


def small_buckets(sync, worker):
    """The plan with buckets of 8 KiB instead of megabytes: this model would fit one."""
    from spark_nemo.weight_sync.sync_plan import plan_sync

    plan = plan_sync(
        worker.spec,
        "float32",
        tensor_parallel=1,
        engine_tensor_parallel=1,
        bucket_bytes=8 << 10,
    )
    assert len(plan.buckets) > 5
    return plan


def push(sync, worker, engine, version):
    try:
        run_async(sync.push(worker, engine, version))
    finally:
        if sync.settings.transport != "disk":
            run_async(sync.close())


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_every_tensor_arrives(perturbed, server, tmp_path, transport):
    """After a push the server's hash of every parameter equals the trainer's, and it has the new
    version and is not paused. The trainer held at most one bucket and one tensor.
    """
    sync = sync_for(perturbed, tmp_path, transport)
    push(sync, perturbed, server.engine, version=7)
    health = run_async(server.engine.health())
    assert (health.weight_version, health.paused) == (7, False)
    assert (
        0
        < sync.memory_peak
        <= sync.plan.buffer_bytes + sync.plan.largest_bytes
        < sync.plan.total_bytes / 2
    )


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_corrupted_tensor_is_named(perturbed, server, tmp_path, transport):
    """One changed element of up_proj in the server's memory fails the push with the parameter's
    name.
    """
    server.tricks(corrupt="model.layers.1.mlp.up_proj.weight")
    with pytest.raises(
        EngineFailure,
        match=r"weights version 8: 1 of 16 tensors .* model.layers.1.mlp.gate_up_proj",
    ):
        push(sync_for(perturbed, tmp_path, transport), perturbed, server.engine, version=8)


def test_missing_checksums_are_logged_once(perturbed, server, tmp_path, caplog):
    """A server cannot hash: ``require`` fails, ``auto`` goes on and logs it once."""
    server.tricks(no_checksums=True)
    with pytest.raises(EngineFailure, match="cannot report checksums"):
        push(sync_for(perturbed, tmp_path, "tensor"), perturbed, server.engine, 9)
    sync = sync_for(perturbed, tmp_path, "tensor", checksums="auto")
    for version in (9, 10):
        push(sync, perturbed, server.engine, version)
    assert sum("cannot report checksums" in record.message for record in caplog.records) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trick", "message"),
    [({"reject": True}, "rejected by trick"), ({"never_join": True}, r"over 2 s|within 2 s")],
)
def test_a_server_that_does_not_join_cannot_hang_the_trainer(perturbed, tmp_path, trick, message):
    """Rejecting an update, and never joining the process group, both end in an error within the time
    limit; the broadcast alone would wait indefinitely.
    """
    with start_receivers(1) as (one,):
        one.tricks(**trick)
        started = time.monotonic()
        with pytest.raises(EngineFailure, match=message):
            push(
                sync_for(perturbed, tmp_path, "distributed", timeout_s=2), perturbed, one.engine, 3
            )
        assert time.monotonic() - started < 12


@pytest.mark.slow
def test_the_others_receive_again_when_a_server_dies(perturbed, tmp_path):
    """One of two servers dies at the third bucket: the group is built again without it, the other
    receives everything, and the fleet goes on with the other.
    """
    with start_receivers(2) as (first, second):
        second.tricks(die_at=3)
        fleet = Fleet({"first": first.engine, "second": second.engine})
        try:
            push(sync_for(perturbed, tmp_path, "distributed", timeout_s=5), perturbed, fleet, 4)
            assert list(fleet.replicas()) == ["first"] and second.process.poll() is not None
            assert fleet.version == run_async(first.engine.weight_version()) == 4
            params = SamplingParams(max_new_tokens=3, temperature=0.0)
            assert set(
                run_async(fleet.generate(GenerationRequest((1, 2), params))).weight_versions
            ) == {4}
        finally:
            run_async(fleet.close())


def test_the_servers_of_a_killed_run_take_the_weights_of_the_next(
    perturbed, tmp_path, server, monkeypatch
):
    """A trainer that dies leaves its process group in servers that live on. The next run numbers its
    groups from 0, too, and must use another name: torch rejects one that exists.
    """
    for version in (5, 6):
        sync = sync_for(perturbed, tmp_path, "distributed")
        # As in a new process.
        monkeypatch.setattr("spark_nemo.weight_sync.distributed._group_numbers", itertools.count())
        run_async(sync.push(perturbed, server.engine, version))
        sync.transport._group.leave()  # the server does not notice
        assert run_async(server.engine.weight_version()) == version


@pytest.mark.slow
def test_a_server_restarted_at_its_address_joins_a_new_group(perturbed, tmp_path):
    """The only server, given by URL, dies at the third bucket: the push waits, and the next process
    receives everything through a new group. Then it is restarted between two pushes, unnoticed by
    the fleet: it is not taken for a member of the old group.
    """
    with start_receivers(1) as (one,):
        fleet, sync = (
            Fleet({one.url: one.engine}),
            sync_for(perturbed, tmp_path, "distributed", timeout_s=5),
        )
        fleet.on_return = sync.restore

        def restart():
            one.process.wait()
            one.start()

        try:
            one.tricks(die_at=3)
            helper = threading.Thread(target=restart)
            helper.start()
            run_async(sync.push(perturbed, fleet, 4))
            helper.join()
            assert run_async(one.engine.weight_version()) == 4
            one.process.kill()
            restart()
            one.until_ready()
            assert (
                list(fleet.replicas()) == [one.url] and run_async(one.engine.weight_version()) == 0
            )
            run_async(sync.push(perturbed, fleet, 5))
            assert run_async(one.engine.weight_version()) == fleet.version == 5
        finally:
            run_async(sync.close())
            run_async(fleet.close())


@pytest.mark.slow
def test_a_replica_with_wrong_weights_is_evicted(perturbed, tmp_path):
    """One of two servers corrupts a tensor: it is evicted, the other serves the new version."""
    with start_receivers(2) as (first, second):
        first.tricks(corrupt="model.norm.weight")
        fleet = Fleet({"first": first.engine, "second": second.engine})
        try:
            push(sync_for(perturbed, tmp_path, "disk"), perturbed, fleet, 4)
            assert list(fleet.replicas()) == ["second"] and fleet.version == 4
        finally:
            run_async(fleet.close())


@pytest.mark.slow
def test_shared_memory_lasts_for_every_server(perturbed, tmp_path):
    """Two servers map the same buffer, bucket after bucket, and both receive everything.

    Opening a handle gives a reference back, so every server needs a handle of its own, and so does
    every tensor-parallel rank (tests/real_sglang).
    """
    with start_receivers(2) as (first, second):
        fleet = Fleet({"first": first.engine, "second": second.engine})
        try:
            push(sync_for(perturbed, tmp_path, "tensor"), perturbed, fleet, 4)
            assert list(fleet.replicas()) == ["first", "second"] and fleet.version == 4
        finally:
            run_async(fleet.close())


def test_disk_keeps_one_version(perturbed, server, tmp_path):
    """Each version is a complete model folder, and the previous one is removed once all servers have
    loaded it. A server that returns can load it alone.
    """
    sync = sync_for(perturbed, tmp_path, "disk")
    for version in (11, 12):
        push(sync, perturbed, server.engine, version)
    folder = tmp_path / "weights"
    assert sorted(path.name for path in folder.iterdir()) == ["version-12"]
    index = json.loads((folder / "version-12" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == {tensor.name for tensor in sync.plan.tensors}
    server.tricks(corrupt="model.norm.weight")
    with pytest.raises(EngineFailure, match=r"model\.norm"):
        run_async(sync.restore(server.engine, 12))
    server.tricks()
    run_async(sync.restore(server.engine, 12))
    run_async(sync.close())
    assert not folder.exists()


def test_a_full_disk_leaves_the_old_weights_served(perturbed, server, tmp_path):
    """Writing fails half-way (by a file size limit): one error names the folder, and the previous
    version is still served and on disk.
    """
    sync = sync_for(perturbed, tmp_path, "disk")
    push(sync, perturbed, server.engine, 20)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Python ignores SIGXFSZ, so the write fails with EFBIG.
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, before[1]))
    try:
        with pytest.raises(
            EngineFailure, match=rf"cannot write .*version-21: {os.strerror(errno.EFBIG)}"
        ):
            push(sync, perturbed, server.engine, 21)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert run_async(server.engine.weight_version()) == 20
    assert [path.name for path in (tmp_path / "weights").iterdir()] == ["version-20"]
    push(sync, perturbed, server.engine, 21)


def test_handles_stay_on_one_machine(perturbed, tmp_path):
    """A server at another machine's address is rejected before anything is sent."""
    from spark_nemo.weight_sync.shared_memory import check_same_machine

    check_same_machine("http://127.0.0.1:1")
    with pytest.raises(EngineFailure, match="another machine"):
        check_same_machine("http://192.0.2.7:30000")


def test_restore_needs_a_transport_that_keeps_the_weights(perturbed, tmp_path, server):
    """A broadcast or handle cannot bring a single server up to date: it waits for the next push."""
    for transport in ("distributed", "tensor"):
        with pytest.raises(EngineFailure, match="waits for the next sync"):
            run_async(sync_for(perturbed, tmp_path, transport).restore(server.engine, 1))
