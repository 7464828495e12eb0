"""The processes behind ``checker.MathChecker``: ``python -m spark_nemo.evaluation.checker_worker
MEMORY_BYTES``.

A supervisor imports math-verify once and reads questions, ``{"gold": ..., "answer": ..., "limit_s":
...}`` lines. A child forked from it answers them. A child that is late or dies is replaced by
another fork, which costs milliseconds where a new process would pay two seconds of imports for
every hostile answer. The supervisor itself never looks at an answer. Two guards of the child work
even when everybody else has gone: an address-space limit, and an alarm whose default action ends
the process.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import resource
import select
import signal
import sys
import time

from math_verify import parse, verify


def serve(memory_limit: int) -> None:
    """Answer every question with a line, ``equal``, ``different``, ``late`` or ``died``, until
    standard input ends.
    """
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints must not be taken for a reply
    logging.disable(
        logging.WARNING
    )  # math-verify warns at every call that its own limits are off; ours replace them
    equivalent(
        "1+x", "x+1"
    )  # the first comparison builds parsers; no question should pay for that out of its limit
    gc.freeze()
    child = None
    replies.write("ready\n")
    for line in sys.stdin.buffer:
        child = child or Child(memory_limit)
        reply = child.ask(line, json.loads(line)["limit_s"])
        if reply in ("late", "died"):
            child.end()
            child = None
        replies.write(f"{reply}\n")
    if child is not None:
        child.end()


class Child:
    """A forked process that answers questions until it is ended."""

    def __init__(self, memory_limit: int) -> None:
        questions, self._questions = os.pipe()
        self._replies, replies = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._questions)
            os.close(self._replies)
            _answer(questions, replies, memory_limit)
        os.close(questions)
        os.close(replies)

    def ask(self, line: bytes, limit_s: float) -> str:
        """``late`` after ``limit_s`` seconds, ``died`` when the process ended before it answered."""
        deadline = time.monotonic() + limit_s
        waiting = memoryview(line)
        os.set_blocking(self._questions, False)
        while time.monotonic() < deadline:
            left = max(0.0, deadline - time.monotonic())
            readable, writable, _ = select.select(
                [self._replies], [self._questions] if waiting else [], [], left
            )
            if readable:
                return {b"=": "equal", b"#": "different"}.get(os.read(self._replies, 1), "died")
            if writable:
                try:
                    waiting = waiting[os.write(self._questions, waiting) :]
                except BrokenPipeError:
                    return "died"
        return "late"

    def end(self) -> None:
        """Kill it, whatever it is doing."""
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self._questions)
        os.close(self._replies)


def _answer(questions: int, replies: int, memory_limit: int) -> None:
    """What the child does; never returns."""
    status = 1
    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        resource.setrlimit(
            resource.RLIMIT_AS, (memory_limit, resource.getrlimit(resource.RLIMIT_AS)[1])
        )
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with os.fdopen(questions, "rb") as lines:
            for line in lines:
                question = json.loads(line)
                signal.alarm(int(question["limit_s"]) + 5)
                os.write(
                    replies, b"=" if equivalent(question["gold"], question["answer"]) else b"#"
                )
                signal.alarm(0)
        status = 0
    except MemoryError:
        pass  # the parent sees that the process ended without an answer
    finally:
        os._exit(status)


def equivalent(gold: str, answer: str) -> bool:
    """math-verify's answer, its time limits off. What it cannot parse or compare it reports as not
    equal.
    """
    parsed = [parse("\\boxed{" + text + "}", parsing_timeout=None) for text in (gold, answer)]
    return bool(verify(*parsed, timeout_seconds=None))


if __name__ == "__main__":
    serve(int(sys.argv[1]))
