"""Processes of ``checker.MathChecker``.

Started as ``python -m spark_nemo.evaluation.checker_worker MEMORY_BYTES``. A supervisor imports
math-verify once and reads lines ``{"gold": ..., "answer": ..., "limit_s": ...}``; a child forked
from it compares. A child that times out or dies is replaced by another fork, which takes
milliseconds; a new process would spend two seconds on imports for every hostile answer. The
supervisor itself never parses an answer. Two limits of the child hold even when the supervisor is
gone: its address space, and an alarm whose default action ends the process.
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
from typing import NoReturn

from math_verify import parse, verify


def serve(memory_limit: int) -> None:
    """Reply to every line of standard input with an ``AnswerGrade``, until it ends."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    # What a library prints must not be read as a reply.
    os.dup2(2, 1)
    # math-verify warns at every call that its own limits are off; the limits here replace them.
    logging.disable(logging.WARNING)
    # The first comparison builds parsers; no question should spend its time limit on that.
    equivalent("1+x", "x+1")
    gc.freeze()
    child = None
    replies.write("ready\n")
    for line in sys.stdin.buffer:
        if child is None:
            child = Child(memory_limit)
        reply = child.ask(line, json.loads(line)["limit_s"])
        if reply in ("timeout", "crashed"):
            child.end()
            child = None
        replies.write(f"{reply}\n")
    if child is not None:
        child.end()


class Child:
    """A forked process that compares answers until it is killed."""

    def __init__(self, memory_limit: int) -> None:
        questions, self._questions = os.pipe()
        self._replies, replies = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._questions)
            os.close(self._replies)
            _run_child(questions, replies, memory_limit)
        os.close(questions)
        os.close(replies)

    def ask(self, line: bytes, limit_s: float) -> str:
        """Return ``timeout`` after ``limit_s`` seconds, ``crashed`` when the process has ended."""
        deadline = time.monotonic() + limit_s
        waiting = memoryview(line)
        os.set_blocking(self._questions, False)
        while time.monotonic() < deadline:
            remaining = max(0.0, deadline - time.monotonic())
            readable, writable, _ = select.select(
                [self._replies], [self._questions] if waiting else [], [], remaining
            )
            if readable:
                # At end of file the read is empty.
                return {b"=": "equal", b"#": "different"}.get(os.read(self._replies, 1), "crashed")
            if writable:
                try:
                    waiting = waiting[os.write(self._questions, waiting) :]
                except BrokenPipeError:
                    return "crashed"
        return "timeout"

    def end(self) -> None:
        """Kill the process."""
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self._questions)
        os.close(self._replies)


def _run_child(questions: int, replies: int, memory_limit: int) -> NoReturn:
    """Compare answers until the pipe closes, then exit the process."""
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
                equal = equivalent(question["gold"], question["answer"])
                os.write(replies, b"=" if equal else b"#")
                signal.alarm(0)
        status = 0
    except MemoryError:
        pass  # the parent process sees end of file in place of a reply
    finally:
        os._exit(status)


def equivalent(gold: str, answer: str) -> bool:
    """Compare with math-verify, its own time limits off; False for what it cannot parse."""
    parsed = [parse("\\boxed{" + text + "}", parsing_timeout=None) for text in (gold, answer)]
    return bool(verify(*parsed, timeout_seconds=None))


if __name__ == "__main__":
    serve(int(sys.argv[1]))
