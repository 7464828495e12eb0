"""The trainer's end of a weight-update group: its address, leaving it, settings of NCCL and torch.

NCCL itself does not run here: its behaviour is taken from its documentation and from torch's
ProcessGroupNCCL.cpp.
"""

import asyncio
import os
import threading

import pytest
import torch.distributed as dist

from spark_nemo.engines.base import EngineFailure
from spark_nemo.weight_sync import distributed
from spark_nemo.weight_sync.distributed import (
    DistributedTransport,
    WeightUpdateGroup,
    use_sglang_nccl_settings,
)


class Server:
    """Leaves its group only once all servers of the machine and the trainer leave, as with NCCL."""

    def __init__(self, url, everyone=None):
        self.url = url
        self.everyone = everyone
        self.left = False

    async def destroy_weights_update_group(self, name):
        try:
            async with asyncio.timeout(2.0):
                await self.everyone.wait()
        except TimeoutError:
            raise EngineFailure("hangs in destroy_process_group") from None
        self.left = True


class Group:
    name = "g"

    def __init__(self, engines):
        self.engines = engines
        self.begun = threading.Event()
        self.broken = None
        self.left = False

    def leave(self, broken):
        self.broken = broken
        self.left = self.begun.wait(2.0)


def test_a_group_is_left_by_all_at_once():
    """Servers called one after the other would wait for each other and for the trainer until each
    call's timeout: half an hour for 32 servers. The event loop is not blocked meanwhile.
    """

    async def scenario():
        everyone = asyncio.Barrier(3)
        servers = [Server(f"http://10.0.0.{i}:1", everyone) for i in range(3)]
        transport = DistributedTransport(1, 5.0)
        transport._group = group = Group(servers)
        asyncio.get_running_loop().call_later(0.2, group.begun.set)
        await transport.close()
        assert all(server.left for server in servers) and group.left and not group.broken

    asyncio.run(scenario())


def test_a_group_that_lost_a_server_is_aborted_not_destroyed(monkeypatch):
    """torch's destroy waits for the broadcast that the lost server never joins."""
    called = []
    monkeypatch.setattr(dist, "destroy_process_group", lambda group: called.append("destroy"))
    monkeypatch.setattr(
        dist.distributed_c10d, "_abort_process_group", lambda group: called.append("abort")
    )

    async def scenario(reachable):
        servers = [Server(f"http://127.0.0.1:{i}", asyncio.Barrier(reachable)) for i in (1, 2)]
        transport = DistributedTransport(1, 5.0)
        transport._group = group = WeightUpdateGroup(servers, 1, 5.0)
        group._group = object()
        await transport._drop_group(servers[:reachable])

    asyncio.run(scenario(2))
    asyncio.run(scenario(1))
    assert called == ["destroy", "abort"]


@pytest.mark.parametrize(
    ("urls", "own"),
    [
        (["http://127.0.0.1:1", "http://10.0.0.5:1"], "10.0.0.9"),
        (["http://127.0.0.1:1"], "127.0.0.1"),
        (["http://10.0.0.5:1", "http://127.0.0.1:1"], "10.0.0.9"),
    ],
)
def test_the_trainers_address_can_be_reached_by_every_server(urls, own, monkeypatch):
    """One server on the trainer's machine and one on another: given 127.0.0.1, the second would
    look for the trainer on its own machine, and hang for half an hour.
    """
    monkeypatch.setattr(
        distributed,
        "local_address_towards",
        lambda url: "127.0.0.1" if "127" in url else "10.0.0.9",
    )
    monkeypatch.setattr(distributed, "free_port", lambda address: 1234)
    assert WeightUpdateGroup([Server(url) for url in urls], 1, 5.0).address == own


def test_a_server_with_an_ipv6_address_has_a_group(monkeypatch):
    """The address is found, and written with brackets in a URL."""
    assert distributed.local_address_towards("http://[::1]:30000") == "::1"
    group, asked = WeightUpdateGroup([Server("http://[::1]:30000")], 1, 5.0), []

    def rendezvous(url, *_, **__):
        asked.append(url)
        raise ValueError("enough")

    monkeypatch.setattr(dist.distributed_c10d, "rendezvous", rendezvous)
    with pytest.raises(ValueError, match="enough"):
        group.join()
    assert asked == [f"tcp://[::1]:{group.port}"]


def test_a_failing_server_does_not_end_the_trainer(monkeypatch):
    """torch's watchdog ends the process when a collective of a group fails or times out, unless the
    group was made with TORCH_NCCL_ASYNC_ERROR_HANDLING=0. The trainer's own groups keep the user's
    value.
    """
    seen = []

    def helper(*_, **__):
        seen.append(os.environ.get("TORCH_NCCL_ASYNC_ERROR_HANDLING"))
        raise ValueError("enough")

    monkeypatch.setenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")
    monkeypatch.setattr(dist.distributed_c10d, "_new_process_group_helper", helper)
    with pytest.raises(ValueError, match="enough"):
        WeightUpdateGroup([], 1, 5.0).join()
    assert seen == ["0"] and os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "1"


def test_nccl_has_the_same_settings_as_in_the_servers(monkeypatch):
    """SGLang sets NCCL_CUMEM_ENABLE=0 unless it is set (entrypoints/engine.py). NCCL's default would
    be 1, and ranks that differ do not connect. The user's value is kept.
    """
    monkeypatch.delenv("NCCL_CUMEM_ENABLE", raising=False)
    use_sglang_nccl_settings()
    assert os.environ["NCCL_CUMEM_ENABLE"] == "0"
    monkeypatch.setenv("NCCL_CUMEM_ENABLE", "1")
    use_sglang_nccl_settings()
    assert os.environ["NCCL_CUMEM_ENABLE"] == "1"
