"""A server process of ours: started in a process group of its own, watched, killed with all it
started.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import logging
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil

from spark_nemo.config.engine import START_TIMEOUT_S

from ..base import Engine, EngineFailure
from .replica import ServerLauncher

log = logging.getLogger(__name__)

PARENT_VARIABLE = "SPARK_NEMO_PARENT"
"""Tells the child whose death is to be its own; see ``engines/sglang/serve.py``."""
_TAIL_BYTES, _TAIL_LINES = 4000, 12
_PORT_TAKEN = "address already in use"
_PROGRESS_EVERY_S = 15.0
_READY_POLL_S = 0.25
_PROBE_S = 10.0


class ServerProcess(ServerLauncher):
    """``command(host, port)`` runs the server; ``connect(url)`` makes a client, whose ``probe``
    tells when it serves. stdout and stderr go to the end of ``log_path``.
    """

    def __init__(
        self,
        name: str,
        command: Callable[[str, int], Sequence[str]],
        connect: Callable[[str], Engine],
        *,
        log_path: Path,
        environment: Mapping[str, str] | None = None,
        host: str = "127.0.0.1",
        start_timeout_s: float = START_TIMEOUT_S,
        max_restarts: int = 3,
    ) -> None:
        self.name, self.log_path, self.max_restarts = name, log_path, max_restarts
        self._command, self._connect = command, connect
        self._environment, self._host, self._start_timeout_s = (
            dict(environment or {}),
            host,
            start_timeout_s,
        )
        self._process: subprocess.Popen[bytes] | None = None
        self._port = 0
        self._launched_ahead = False

    @property
    def url(self) -> str:
        """Of the present process; another one after a restart."""
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"http://{host}:{self._port}"

    @property
    def pid(self) -> int | None:
        """The process, which leads its own group."""
        return self._process.pid if self._process is not None else None

    def launch(self) -> None:
        """Start the process without waiting for it, so that several come up together; ``start``
        takes it over.

        Raises ``EngineFailure`` when there is no such program.
        """
        self._port = free_port(self._host)
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        command = list(self._command(self._host, self._port))
        try:
            with self.log_path.open("ab") as output:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    env={**os.environ, **self._environment, PARENT_VARIABLE: str(os.getpid())},
                )
        except OSError as error:
            raise EngineFailure(
                f"{self.name}: cannot run {command[0]}: {error.strerror}"
            ) from error
        self._launched_ahead = True
        atexit.register(self.kill)
        log.info(
            "%s: process %d starts on port %d, log in %s",
            self.name,
            self._process.pid,
            self._port,
            self.log_path,
        )

    async def start(self) -> Engine:
        """See ``ServerLauncher.start``. A port that another program took in the meantime is changed once."""
        for last_try in (False, True):
            if not self._launched_ahead:
                await self.stop()
                self.launch()
            self._launched_ahead = False
            try:
                return await self._until_ready()
            except EngineFailure as failure:
                await self.stop()
                if last_try or _PORT_TAKEN not in str(failure).lower():
                    raise
        raise AssertionError("unreachable")

    async def _until_ready(self) -> Engine:
        begin = told = last = time.monotonic()
        waited = 0.0  # as long as the event loop ran: a training step may have held it for longer than a start takes
        engine, waiting_for = self._connect(self.url), "nothing yet"
        try:
            while waited < self._start_timeout_s:
                now = time.monotonic()
                waited, last = waited + min(now - last, _READY_POLL_S + _PROBE_S), now
                if (death := self.death()) is not None:
                    raise EngineFailure(f"{self.name}: {death}, before it served")
                try:
                    await engine.probe(_PROBE_S)
                    log.info(
                        "%s serves at %s after %.1f s",
                        self.name,
                        self.url,
                        time.monotonic() - begin,
                    )
                    return engine
                except EngineFailure as failure:
                    waiting_for = str(failure)
                if now - told >= _PROGRESS_EVERY_S:
                    told = now
                    log.info(
                        "%s: starting for %.0f s; %s",
                        self.name,
                        now - begin,
                        self.tail(1) or waiting_for,
                    )
                await asyncio.sleep(_READY_POLL_S)
        except BaseException:
            await engine.close()
            raise
        await engine.close()
        raise EngineFailure(
            f"{self.name}: did not serve within {self._start_timeout_s:.0f} s ({waiting_for}); the end "
            f"of {self.log_path}: {self.tail()}"
        )

    def death(self) -> str | None:
        """See ``ServerLauncher.death``; with the end of the log."""
        if self._process is None:
            return "was not started"
        code = self._process.poll()
        if code is None:
            return None
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        return f"{how}; the end of {self.log_path}: {self.tail()}"

    def tail(self, lines: int = _TAIL_LINES) -> str:
        """The last lines of its log, joined into one."""
        try:
            with self.log_path.open("rb") as file:
                file.seek(max(0, self.log_path.stat().st_size - _TAIL_BYTES))
                text = file.read().decode(errors="replace")
        except OSError:
            return ""
        return " | ".join([line.strip() for line in text.splitlines() if line.strip()][-lines:])

    async def stop(self) -> None:
        """See ``ServerLauncher.stop``."""
        self.kill()
        deadline = time.monotonic() + 10.0
        while (
            self._process is not None
            and self._process.poll() is None
            and time.monotonic() < deadline
        ):
            await asyncio.sleep(0.01)

    def kill(self) -> None:
        """SIGKILL the process, its group, and what of its children left the group. Also reaches
        stopped ones.
        """
        process, self._launched_ahead = self._process, False
        atexit.unregister(self.kill)
        if process is None:
            return
        family: list[psutil.Process] = []
        with contextlib.suppress(psutil.Error):
            family = (
                psutil.Process(process.pid).children(recursive=True)
                if process.poll() is None
                else []
            )
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        for child in family:
            with contextlib.suppress(psutil.Error):
                child.kill()


def free_port(host: str) -> int:
    """A port that nobody listens on at ``host`` just now."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]
