"""A server process of ours: started in its own process group, watched, killed with its children."""

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
"""Names the process whose death ends the server; see ``engines/server_wrapper.py``."""
_TAIL_BYTES = 4000
_TAIL_LINES = 12
_PORT_TAKEN = "address already in use"
_PROGRESS_EVERY_S = 15.0
_READY_POLL_S = 0.25
_PROBE_S = 10.0


class ServerProcess(ServerLauncher):
    """Launch the server that ``command(host, port)`` runs.

    ``connect(url)`` makes a client, whose ``probe`` tells when the server is ready. stdout and
    stderr are appended to ``log_path``.
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
        self.name = name
        self.command = command
        self.environment = dict(environment or {})
        self.log_path = log_path
        self.max_restarts = max_restarts
        self._connect = connect
        self._host = host
        self._start_timeout_s = start_timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self._port = 0
        self._launched_ahead = False

    @property
    def url(self) -> str:
        """Address of the present process; another one after a restart."""
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"http://{host}:{self._port}"

    @property
    def pid(self) -> int | None:
        """Id of the process, which leads its own group."""
        return self._process.pid if self._process is not None else None

    def launch(self) -> None:
        """Start the process without waiting for it; ``start`` then takes it over.

        Several servers can so start together. Raises ``EngineFailure`` when the program does not
        exist.
        """
        self._port = free_port(self._host)
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        command = list(self.command(self._host, self._port))
        try:
            with self.log_path.open("ab") as output:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    env={**os.environ, **self.environment, PARENT_VARIABLE: str(os.getpid())},
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
        """See ``ServerLauncher.start``. Retries once if another program took the port meanwhile."""
        try:
            return await self._start_once()
        except EngineFailure as failure:
            if _PORT_TAKEN not in str(failure).lower():
                raise
        return await self._start_once()

    async def _start_once(self) -> Engine:
        if not self._launched_ahead:
            await self.stop()
            self.launch()
        self._launched_ahead = False
        try:
            return await self._wait_ready()
        except EngineFailure:
            await self.stop()
            raise

    async def _wait_ready(self) -> Engine:
        engine = self._connect(self.url)
        try:
            await self._poll_until_ready(engine)
        except BaseException:
            await engine.close()
            raise
        return engine

    async def _poll_until_ready(self, engine: Engine) -> None:
        begin = time.monotonic()
        polled_at = begin
        reported_at = begin
        # Counts only while the event loop runs: a training step may block it for longer than a
        # start takes.
        waited_s = 0.0
        last_failure = "nothing yet"
        while waited_s < self._start_timeout_s:
            now = time.monotonic()
            waited_s += min(now - polled_at, _READY_POLL_S + _PROBE_S)
            polled_at = now
            death = self.death()
            if death is not None:
                raise EngineFailure(f"{self.name}: {death}, before it served")
            try:
                await engine.probe(_PROBE_S)
            except EngineFailure as failure:
                last_failure = str(failure)
            else:
                log.info(
                    "%s serves at %s after %.1f s", self.name, self.url, time.monotonic() - begin
                )
                return
            if now - reported_at >= _PROGRESS_EVERY_S:
                reported_at = now
                log.info(
                    "%s: starting for %.0f s; %s",
                    self.name,
                    now - begin,
                    self.tail(1) or last_failure,
                )
            await asyncio.sleep(_READY_POLL_S)
        raise EngineFailure(
            f"{self.name}: did not serve within {self._start_timeout_s:.0f} s ({last_failure}); "
            f"the end of {self.log_path}: {self.tail()}"
        )

    def death(self) -> str | None:
        """See ``ServerLauncher.death``; includes the end of the log."""
        if self._process is None:
            return "was not started"
        code = self._process.poll()
        if code is None:
            return None
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        return f"{how}; the end of {self.log_path}: {self.tail()}"

    def tail(self, lines: int = _TAIL_LINES) -> str:
        """Return the last lines of the log, joined into one."""
        try:
            with self.log_path.open("rb") as file:
                file.seek(max(0, self.log_path.stat().st_size - _TAIL_BYTES))
                text = file.read().decode(errors="replace")
        except OSError:
            return ""
        stripped = [line.strip() for line in text.splitlines()]
        return " | ".join([line for line in stripped if line][-lines:])

    async def stop(self) -> None:
        """See ``ServerLauncher.stop``."""
        self.kill()
        process = self._process
        deadline = time.monotonic() + 10.0
        while process is not None and process.poll() is None and time.monotonic() < deadline:
            await asyncio.sleep(0.01)

    def kill(self) -> None:
        """SIGKILL the process, its group, and children that left the group; also stopped ones."""
        self._launched_ahead = False
        atexit.unregister(self.kill)
        process = self._process
        if process is None:
            return
        children: list[psutil.Process] = []
        # Listed first: once their parent is dead, its children can no longer be found.
        with contextlib.suppress(psutil.Error):
            if process.poll() is None:
                children = psutil.Process(process.pid).children(recursive=True)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        for child in children:
            with contextlib.suppress(psutil.Error):
                child.kill()


def free_port(host: str) -> int:
    """Return a port of ``host`` on which no program listens just now."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]
