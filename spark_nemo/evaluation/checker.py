"""math-verify in a worker process, so that no answer string can hang, exhaust or crash the caller.

Symbolic comparison may run forever or fill the memory (``9^{9^{9^9}}``). math-verify's own limits
are signals, which do not interrupt a long C computation and work in the main thread only. The
worker is another Python process, started when first needed, that answers JSON lines through a child
of its own; a child that is late is killed and replaced.
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
"""How long the worker may take to import sympy and math-verify."""
MEMORY_LIMIT_BYTES = 2 << 30
"""Address space of one worker's child; an answer that needs more is not judged."""
GRACE_S = 2.0
"""How much later than its limit a worker may report a late answer, before it is taken for hanging
itself.
"""


class AnswerGrade(StrEnum):
    """What came of comparing an answer with its key. ``TIMEOUT`` and ``CRASHED`` say nothing about the
    answer: nobody could tell within the limits of time and memory; a score counts them as wrong and
    says how many there were.
    """

    EQUAL = "equal"
    DIFFERENT = "different"
    TIMEOUT = "late"
    CRASHED = "died"


@dataclass
class CheckerStats:
    """What the worker was asked and how often it gave no answer. Each timeout and crash was
    reported as "not equal".
    """

    questions: int = 0
    timeouts: int = 0
    crashes: int = 0


class MathChecker:
    """Asks math-verify whether two answers are equal, with a time limit. Safe to share between
    threads.
    """

    def __init__(self, limit_s: float = 5.0) -> None:
        self.limit_s = limit_s
        self.stats = CheckerStats()
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = os.getpid()

    def equivalent(self, gold: str, answer: str) -> bool:
        """``math_verify.verify(gold, answer)``; the order matters. False when the worker is late or
        dies (counted).
        """
        return self.judge(gold, answer) is AnswerGrade.EQUAL

    def judge(self, gold: str, answer: str) -> AnswerGrade:
        """``equivalent`` with the reason. Raises ``RuntimeError`` when the worker cannot be started
        at all.
        """
        question = (
            json.dumps({"gold": gold, "answer": answer, "limit_s": self.limit_s}).encode() + b"\n"
        )
        with self._lock:
            self.stats.questions += 1
            if os.getpid() != self._owner:  # after a fork the pipe belongs to the parent
                self._process, self._owner = None, os.getpid()
            try:
                if self._process is None or self._process.poll() is not None:
                    self._start()
                return self._ask(question)
            except BaseException:  # Ctrl-C too: the reply that still comes would be taken for that of the next question
                self.close()
                raise

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
            [sys.executable, "-m", "spark_nemo.evaluation.checker_worker", str(MEMORY_LIMIT_BYTES)],
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "OPENBLAS_NUM_THREADS": "1",
                "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            },
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
        if not reply:
            self.close()  # the worker itself hangs or has died, not its child
        judgement = (
            AnswerGrade(reply)
            if reply
            else AnswerGrade.TIMEOUT
            if reply is None
            else AnswerGrade.CRASHED
        )
        if judgement is AnswerGrade.TIMEOUT:
            self.stats.timeouts += 1
            logger.warning(
                "answer checker: no result within %.1f s, counted as not equal", self.limit_s
            )
        elif judgement is AnswerGrade.CRASHED:
            self.stats.crashes += 1
            logger.warning("answer checker: the worker died, counted as not equal")
        return judgement

    def _read_line(self, limit_s: float) -> str | None:
        """One line without its newline; None when it does not come in time, an empty string at end
        of file.
        """
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
    """Several checkers behind one ``equivalent``: as many threads as there are workers ask at the
    same time.

    A worker starts when its checker is first needed, so a caller with one thread pays for one
    worker.
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
        return CheckerStats(
            *(sum(getattr(s, name) for s in every) for name in ("questions", "timeouts", "crashes"))
        )

    def equivalent(self, gold: str, answer: str) -> bool:
        """As ``MathChecker.equivalent``; waits for a free worker, which does not count against the
        time limit.
        """
        return self.judge(gold, answer) is AnswerGrade.EQUAL

    def judge(self, gold: str, answer: str) -> AnswerGrade:
        """As ``MathChecker.judge``, by a free worker."""
        checker = self._free.get()
        try:
            return checker.judge(gold, answer)
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
