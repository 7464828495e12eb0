"""The process behind ``checker.MathChecker``: ``python -m spark_nemo.evaluation.checker_worker MEMORY_BYTES ALARM_S``.

Reads ``{"gold": ..., "answer": ...}`` lines and writes ``true`` or ``false``. Two guards work even when the parent has
gone: an address-space limit, and an alarm whose default action ends the process.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import sys

from math_verify import parse, verify


def serve(memory_limit: int, alarm_s: int) -> None:
    """Answer questions until standard input ends."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints must not be taken for a reply
    logging.disable(logging.WARNING)  # math-verify warns at every call that its own limits are off; ours replace them
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_AS, (memory_limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    equivalent("1+x", "x+1")  # the first comparison builds parsers; no question should pay for that out of its limit
    replies.write("ready\n")
    for line in sys.stdin:
        question = json.loads(line)
        signal.alarm(alarm_s)
        equal = equivalent(question["gold"], question["answer"])
        signal.alarm(0)
        replies.write("true\n" if equal else "false\n")


def equivalent(gold: str, answer: str) -> bool:
    """math-verify's answer, its time limits off. What it cannot parse or compare it reports as not equal."""
    parsed = [parse("\\boxed{" + text + "}", parsing_timeout=None) for text in (gold, answer)]
    return bool(verify(*parsed, timeout_seconds=None))


if __name__ == "__main__":
    serve(int(sys.argv[1]), int(sys.argv[2]))
