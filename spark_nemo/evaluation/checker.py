"""math-verify in worker processes, so that no answer can hang, exhaust or crash the caller.

Symbolic comparison may run indefinitely or fill the memory (``9^{9^{9^9}}``). math-verify's own
limits are signals, which do not interrupt a long C computation and work in the main thread only.
A worker is a separate Python process (``checker_worker``), started on first use, that exchanges
JSON lines and replies through a forked child. A child beyond its limit is killed and replaced.
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
from enum import StrEnum
from functools import cache

logger = logging.getLogger(__name__)

START_LIMIT_S = 120.0
"""Time limit for a worker to import sympy and math-verify."""
MEMORY_LIMIT_BYTES = 2 << 30
"""Address space of a worker's child; a comparison that needs more is ``CRASHED``."""
GRACE_S = 2.0
"""Time after its limit for a worker to report a timeout; without a report the worker hangs."""


class AnswerGrade(StrEnum):
    """Result of comparing an answer with its key.

    ``TIMEOUT`` and ``CRASHED`` mean that the comparison did not finish within its limits of time
    and memory. Scores count both as wrong and report their number.
    """

    EQUAL = "equal"
    DIFFERENT = "different"
    TIMEOUT = "timeout"
    CRASHED = "crashed"


@dataclass
class CheckerStats:
    """Number of comparisons of a checker, and of those without a result."""

    questions: int = 0
    timeouts: int = 0
    crashes: int = 0


class MathChecker:
    """math-verify in one worker process, with a time limit per comparison; thread-safe."""

    def __init__(self, limit_s: float = 5.0) -> None:
        self.limit_s = limit_s
        self.stats = CheckerStats()
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = os.getpid()

    def grade(self, gold: str, answer: str) -> AnswerGrade:
        """Run ``math_verify.verify(gold, answer)``; the order matters.

        Raises ``RuntimeError`` when the worker cannot be started.
        """
        question = json.dumps({"gold": gold, "answer": answer, "limit_s": self.limit_s})
        with self._lock:
            self.stats.questions += 1
            if os.getpid() != self._owner:
                # After a fork the pipe belongs to the parent process.
                self._process = None
                self._owner = os.getpid()
            try:
                if self._process is None or self._process.poll() is not None:
                    self._start()
                return self._ask(question.encode() + b"\n")
            except BaseException:
                # After Ctrl-C, too: the next question would read the pending reply.
                self.close()
                raise

    def close(self) -> None:
        """Stop the worker; the next comparison starts another."""
        process = self._process
        self._process = None
        if process is not None and os.getpid() == self._owner:
            process.kill()
            process.wait()
            process.stdin.close()
            process.stdout.close()

    def _start(self) -> None:
        self.close()
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "spark_nemo.evaluation.checker_worker", str(MEMORY_LIMIT_BYTES)],
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
        )
        if self._read_line(START_LIMIT_S) != "ready":
            self.close()
            raise RuntimeError(
                "the answer checker did not start: is math-verify installed in this environment?"
            )

    def _ask(self, question: bytes) -> AnswerGrade:
        try:
            self._process.stdin.write(question)
            reply = self._read_line(self.limit_s + GRACE_S)
        except BrokenPipeError:
            reply = ""
        if reply:
            grade = AnswerGrade(reply)
        else:
            # The worker itself hangs or died, not its child.
            self.close()
            grade = AnswerGrade.TIMEOUT if reply is None else AnswerGrade.CRASHED
        if grade is AnswerGrade.TIMEOUT:
            self.stats.timeouts += 1
            logger.warning(
                "answer checker: no result within %.1f s, counted as not equal", self.limit_s
            )
        elif grade is AnswerGrade.CRASHED:
            self.stats.crashes += 1
            logger.warning("answer checker: the worker died, counted as not equal")
        return grade

    def _read_line(self, limit_s: float) -> str | None:
        """Read one line; None after ``limit_s`` seconds, an empty string at end of file."""
        deadline = time.monotonic() + limit_s
        descriptor = self._process.stdout.fileno()
        line = b""
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
    """Several checkers for threads that compare answers in parallel.

    A checker's worker starts on first use, so a single-threaded caller runs one worker.
    """

    def __init__(self, workers: int, limit_s: float = 5.0) -> None:
        self.workers = workers
        self._checkers = [MathChecker(limit_s) for _ in range(workers)]
        self._free: queue.LifoQueue[MathChecker] = queue.LifoQueue()
        for checker in self._checkers:
            self._free.put(checker)

    @property
    def stats(self) -> CheckerStats:
        """Sums over the workers."""
        total = CheckerStats()
        for checker in self._checkers:
            total.questions += checker.stats.questions
            total.timeouts += checker.stats.timeouts
            total.crashes += checker.stats.crashes
        return total

    def grade(self, gold: str, answer: str) -> AnswerGrade:
        """Grade with the next free worker; waiting for it does not count as its time."""
        checker = self._free.get()
        try:
            return checker.grade(gold, answer)
        finally:
            self._free.put(checker)

    def close(self) -> None:
        """Stop every worker."""
        for checker in self._checkers:
            checker.close()


@cache
def shared_checker() -> CheckerPool:
    """Return the process-wide checkers: one per core, at most eight; stopped at exit."""
    pool = CheckerPool(min(8, len(os.sched_getaffinity(0))))
    atexit.register(pool.close)
    return pool
