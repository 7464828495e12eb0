"""math-verify in a worker process, so that no answer string can hang, exhaust or crash the caller.

Symbolic comparison may run forever or fill the memory (``9^{9^{9^9}}``). math-verify's own limits are signals, which
do not interrupt a long C computation and work in the main thread only. The worker is another Python process that
answers JSON lines; it is started when first needed, killed when it is late and replaced for the next question.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import queue
import select
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from functools import cache

logger = logging.getLogger(__name__)

START_LIMIT_S = 120.0
"""How long the worker may take to import sympy and math-verify."""
MEMORY_LIMIT_BYTES = 4 << 30


@dataclass
class CheckerStats:
    """What the worker was asked and how often it gave no answer. Each timeout and crash was reported as "not equal"."""

    questions: int = 0
    timeouts: int = 0
    crashes: int = 0


class MathChecker:
    """Asks math-verify whether two answers are equal, with a time limit. Safe to share between threads."""

    def __init__(self, limit_s: float = 5.0) -> None:
        self.limit_s = limit_s
        self.stats = CheckerStats()
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = os.getpid()

    def equivalent(self, gold: str, answer: str) -> bool:
        """``math_verify.verify(gold, answer)``; the order matters. False when the worker is late or dies (counted).

        Raises ``RuntimeError`` when the worker cannot be started at all.
        """
        question = json.dumps({"gold": gold, "answer": answer}).encode() + b"\n"
        with self._lock:
            self.stats.questions += 1
            if os.getpid() != self._owner:  # after a fork the pipe belongs to the parent
                self._process, self._owner = None, os.getpid()
            if self._process is None or self._process.poll() is not None:
                self._start()
            reply = self._ask(question)
        return reply == "true"

    def close(self) -> None:
        """Stop the worker; the next question starts another."""
        process, self._process = self._process, None
        if process is not None and os.getpid() == self._owner:
            process.kill()
            process.wait()
            process.stdin.close()
            process.stdout.close()

    def _start(self) -> None:
        self.close()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "spark_nemo.evaluation.checker_worker", str(MEMORY_LIMIT_BYTES),
             str(int(self.limit_s) + 5)],
            bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1",
                 "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)})
        if self._read_line(START_LIMIT_S) != "ready":
            self.close()
            raise RuntimeError("the answer checker did not start: is math-verify installed in this environment?")

    def _ask(self, question: bytes) -> str | None:
        try:
            self._process.stdin.write(question)
            reply = self._read_line(self.limit_s)
        except BrokenPipeError:
            reply = ""
        if reply is None:
            self.stats.timeouts += 1
            logger.warning("answer checker: no result within %.1f s, counted as not equal", self.limit_s)
        elif reply == "":
            self.stats.crashes += 1
            logger.warning("answer checker: the worker died, counted as not equal")
        if not reply:
            self.close()
        return reply

    def _read_line(self, limit_s: float) -> str | None:
        """One line without its newline; None when it does not come in time, an empty string at end of file."""
        deadline = time.monotonic() + limit_s
        descriptor, line = self._process.stdout.fileno(), b""
        while not line.endswith(b"\n"):
            ready, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                return None
            piece = os.read(descriptor, 4096)
            if not piece:
                return ""
            line += piece
        return line.decode().strip()


class CheckerPool:
    """Several checkers behind one ``equivalent``: as many threads as there are workers ask at the same time.

    A worker starts when its checker is first needed, so a caller with one thread pays for one worker.
    """

    def __init__(self, workers: int, limit_s: float = 5.0) -> None:
        self.workers = workers
        self._checkers = [MathChecker(limit_s) for _ in range(workers)]
        self._free: queue.LifoQueue[MathChecker] = queue.LifoQueue()
        for checker in self._checkers:
            self._free.put(checker)

    @property
    def stats(self) -> CheckerStats:
        """The sums over the workers."""
        every = [checker.stats for checker in self._checkers]
        return CheckerStats(*(sum(getattr(s, name) for s in every) for name in ("questions", "timeouts", "crashes")))

    def equivalent(self, gold: str, answer: str) -> bool:
        """As ``MathChecker.equivalent``; waits for a free worker, which does not count against the time limit."""
        checker = self._free.get()
        try:
            return checker.equivalent(gold, answer)
        finally:
            self._free.put(checker)

    def close(self) -> None:
        """Stop every worker."""
        for checker in self._checkers:
            checker.close()


@cache
def shared_checker() -> CheckerPool:
    """The process-wide checkers, one per core up to eight, stopped at exit."""
    pool = CheckerPool(min(8, len(os.sched_getaffinity(0))))
    atexit.register(pool.close)
    return pool
