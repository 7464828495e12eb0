"""Servers as processes of ours: start, death with a reason, hang, restart, and nothing left behind.
The servers are the fake one; ``tests/real_sglang/test_faults.py`` does the same to real ones.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import fake_sglang_process
import psutil
import pytest
from engine_cases import generate_all
from fake_sglang_process import fake_process, free_port

from spark_nemo.config import EngineConfig, PoolConfig
from spark_nemo.engines import (
    EngineFailure,
    EngineLost,
    EngineUnavailable,
    GenerationRequest,
    SamplingParams,
    build_engine,
    server_wrapper,
)
from spark_nemo.engines.fleet import Fleet, FleetLimits
from spark_nemo.engines.fleet.server_launcher import ServerProcess
from spark_nemo.engines.sglang import SglangServer
from spark_nemo.toy.resolve import ASSETS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="needs Linux process groups and prctl"),
]
LIMITS = FleetLimits(
    request_timeout_s=20,
    total_timeout_s=60,
    backoff_s=0.02,
    probe_every_s=0.3,
    probe_timeout_s=0.6,
    pool_down_timeout_s=2,
    control_timeout_s=5,
)
REQUESTS = [
    GenerationRequest(
        (3 + i % 40, 5), SamplingParams(max_new_tokens=30, temperature=0.0, stop_token_ids=(2,))
    )
    for i in range(60)
]


def connect(
    url: str, request_timeout_s: float = 30.0, control_timeout_s: float = 5.0
) -> SglangServer:
    return SglangServer(
        url,
        api_key=None,
        vocab_size=64,
        max_context=100,
        max_in_flight=64,
        request_timeout_s=request_timeout_s,
        control_timeout_s=control_timeout_s,
    )


def fake(name: str, folder: Path, *flags: str, **settings) -> ServerProcess:
    def command(host: str, port: int) -> list[str]:
        return [sys.executable, fake_sglang_process.__file__, "--port", str(port), *flags]

    return ServerProcess(
        name,
        command,
        connect,
        log_path=folder / f"{name}.log",
        **{"start_timeout_s": 30.0, "max_restarts": 2, **settings},
    )


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def wait_gone(pid: int, seconds: float = 5.0) -> bool:
    deadline = time.monotonic() + seconds
    while not gone(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return gone(pid)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_a_server_that_dies_or_hangs_in_a_batch_costs_no_sample(
    tmp_path: Path, number: signal.Signals
) -> None:
    """60 greedy requests over two processes, one of which gets the signal on the way: 60 answers,
    those of a single undisturbed server, and the process is there again.
    """

    async def scenario():
        launchers = [fake(f"server-{i}", tmp_path, "--token-s", "0.02") for i in range(2)]
        for launcher in launchers:
            launcher.launch()
        fleet = Fleet({launcher.name: launcher for launcher in launchers}, LIMITS)
        try:
            await fleet.generate(REQUESTS[0])
            while fleet.metrics().replicas_up < 2:
                await asyncio.sleep(0.05)
            expected = await generate_all(fleet, REQUESTS)
            work = asyncio.create_task(generate_all(fleet, REQUESTS))
            await asyncio.sleep(0.25)
            victim = launchers[1].pid
            os.killpg(victim, number)
            answers = await work
            while fleet.metrics().replicas_up < 2:
                await asyncio.sleep(0.05)
            return expected, answers, fleet.metrics(), gone(victim)
        finally:
            await fleet.close()

    expected, answers, metrics, dead = asyncio.run(scenario())
    assert [a.token_ids for a in answers] == [e.token_ids for e in expected]
    assert metrics.retries > 0 and metrics.restarts == 1 and dead


def test_a_server_that_dies_at_start_is_shown_with_the_end_of_its_log(tmp_path: Path) -> None:
    """One line: exit status, log file, last words."""

    async def scenario():
        launcher = fake("policy-0", tmp_path, "--atention-backend", "none")
        fleet = Fleet({"policy-0": launcher}, LIMITS, name="policy pool")
        try:
            with pytest.raises(EngineLost) as raised:
                await fleet.generate(REQUESTS[0])
            return str(raised.value)
        finally:
            await fleet.close()

    message = asyncio.run(scenario())
    assert (
        "exit status 2" in message and "unrecognized arguments: --atention-backend none" in message
    )
    assert str(tmp_path / "policy-0.log") in message and "\n" not in message


def test_a_server_that_never_answers_is_killed_after_its_start_time(tmp_path: Path) -> None:
    """A process that lives and does not listen; the wait is bounded and nothing is left of it."""
    process = ServerProcess(
        "mute",
        lambda host, port: [sys.executable, "-c", "import time; time.sleep(60)"],
        connect,
        log_path=tmp_path / "mute.log",
        start_timeout_s=1.0,
    )

    async def scenario():
        with pytest.raises(EngineFailure, match="did not serve within 1 s"):
            await process.start()

    begin = time.monotonic()
    asyncio.run(scenario())
    assert time.monotonic() - begin < 10 and gone(process.pid)


def test_a_missing_interpreter_is_named(tmp_path: Path) -> None:
    """Before anything waits."""
    process = ServerProcess(
        "policy-0", lambda host, port: ["/nowhere/python"], connect, log_path=tmp_path / "x.log"
    )
    with pytest.raises(EngineFailure, match="cannot run /nowhere/python"):
        process.launch()


def test_killed_and_stopped_servers_are_unavailable(monkeypatch):
    """SIGSTOP runs into deadlines, SIGKILL into failed connections; health says both without
    raising.
    """

    async def scenario(server, process):
        await server.generate(REQUESTS[0])
        assert (await server.health()).alive
        for signal_, message in (
            (signal.SIGSTOP, "no answer within"),
            (signal.SIGKILL, "cannot connect|Disconn"),
        ):
            os.kill(process.pid, signal_)
            await asyncio.sleep(0.1)
            with pytest.raises(EngineUnavailable, match=message):
                await server.generate(REQUESTS[0])
            with pytest.raises(EngineUnavailable):
                await server.probe(0.3)
            assert not (await server.health()).alive
        await server.close()

    monkeypatch.setattr("spark_nemo.engines.sglang.server.ABORT_TIMEOUT_S", 0.2)
    port = free_port()
    with fake_process(port) as process:
        asyncio.run(
            scenario(
                connect(f"http://127.0.0.1:{port}", request_timeout_s=1.0, control_timeout_s=0.5),
                process,
            )
        )


def test_a_process_may_open_a_connection_for_every_request() -> None:
    """Prove that the pool raises the process's limit of open files, and that nothing is sent twice.

    150 requests are sent at once where 60 more files may be open. The kernel's bounds are not proven.
    """

    async def scenario(url):
        config = EngineConfig(
            kind="sglang", max_context=320, max_batch_size=75, policy=PoolConfig(urls=[url])
        )
        fleet = build_engine(config, ASSETS / "generator", "policy")
        try:
            return await asyncio.gather(
                *(fleet.generate(REQUESTS[0]) for _ in range(150))
            ), fleet.metrics()
        finally:
            await fleet.close()

    port = free_port()
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    # Earlier tests of the same process may hold files open.
    limit = len(os.listdir("/proc/self/fd")) + 60
    with fake_process(port, "--vocab-size", "691", "--context", "512", "--token-s", "0.1"):
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, before[1]))
            answers, metrics = asyncio.run(scenario(f"http://127.0.0.1:{port}"))
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert len(answers) == 150 and metrics.retries == metrics.outages == 0


FAKE_PACKAGE = {
    "tokenizer.py": "",
    "sglang/__init__.py": "",
    "sglang/srt/__init__.py": "",
    "sglang/srt/plugins.py": "def load_plugins(): pass",
    "sglang/srt/utils.py": "def kill_process_tree(pid, include_parent): pass",
    "sglang/srt/server_args.py": """
import tokenizer, types  # the wrapper must not import modules of its own folder
def prepare_server_args(argv):
    return types.SimpleNamespace(argv=argv, api_key=None)
""",
    "sglang/launch_server.py": """
import logging, os, subprocess, sys, time
def run_server(args):
    logging.basicConfig(level=logging.INFO, force=True)
    logging.info("server_args=%s", vars(args))
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
    environment = "leaked" if "SPARK_NEMO_API_KEY" in os.environ else "clean"
    print("SERVING", len(args.api_key), environment, child.pid, flush=True)
    time.sleep(300)
""",
}
LAUNCHER = """
import sys, time
from pathlib import Path
from spark_nemo.engines.fleet.server_launcher import ServerProcess
from spark_nemo.engines import server_wrapper
def command(host, port):
    return [sys.executable, server_wrapper.__file__, "server", "--port", str(port)]
key = {server_wrapper.KEY_VARIABLE: "a-secret-key"}
process = ServerProcess("s", command, None, log_path=Path(sys.argv[1]), environment=key)
process.launch()
print(process.pid, flush=True)
time.sleep(300)
"""


@contextlib.contextmanager
def launched(tmp_path: Path):
    """A parent process that launches the wrapper over a fake ``sglang`` package; (parent, server
    pid, log, words).
    """
    for name, text in FAKE_PACKAGE.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    log = tmp_path / "server.log"
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
    parent = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, str(log)],
        stdout=subprocess.PIPE,
        env=environment,
        cwd=Path(server_wrapper.__file__).parents[2],
    )
    try:
        pid = int(parent.stdout.readline())
        deadline = time.monotonic() + 20
        while (
            "SERVING" not in (log.read_text() if log.exists() else "")
            and time.monotonic() < deadline
        ):
            time.sleep(0.05)
        words = next(
            (line.split() for line in log.read_text().splitlines() if line.startswith("SERVING")),
            None,
        )
        assert words, log.read_text()
        yield parent, pid, log, words
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        parent.kill()
        parent.wait()


def test_the_key_is_on_no_command_line_and_in_no_log(tmp_path: Path) -> None:
    """It reaches the arguments inside the process; SGLang's log of its arguments shows stars; its
    children inherit no environment variable with it. That real SGLang then asks for it is the real
    test's to show.
    """
    with launched(tmp_path) as (_, pid, log, words):
        lines = [
            " ".join(process.cmdline())
            for process in (psutil.Process(pid), *psutil.Process(pid).children())
        ]
    assert words[1:3] == ["12", "clean"]
    assert not any("a-secret-key" in line for line in lines)
    assert "a-secret-key" not in log.read_text() and "'api_key': '***'" in log.read_text()


@pytest.mark.parametrize("victim", ["parent", "server", "stopped server's parent"])
def test_nothing_of_a_server_outlives_a_sigkill(tmp_path: Path, victim: str) -> None:
    """The trainer dies, or the server's first process does: its workers go too, though they asked
    for nothing and even when the group was stopped.
    """
    with launched(tmp_path) as (parent, pid, _, words):
        family = [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]
        if victim.startswith("stopped"):
            os.killpg(pid, signal.SIGSTOP)
        os.kill(pid if victim == "server" else parent.pid, signal.SIGKILL)
        left = [one for one in family if not wait_gone(one)]
    assert len(family) == 3 and int(words[3]) in family and left == []
