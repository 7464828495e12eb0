"""What the tools over checkpoints share: their kinds of arguments, how an error in the input ends
them, and what a conversion says at its end.
"""

from __future__ import annotations

import argparse
import errno
import math
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from spark_nemo.config.errors import ConfigError

if TYPE_CHECKING:
    from spark_nemo.megatron.checkpoint.conversion import Converted


def folder(text: str) -> Path:
    """A path. The shell leaves the ~ of ``--hf-config=~/models`` and of quoted paths to us."""
    return Path(os.path.expanduser(text))


def gigabytes(text: str) -> float:
    """A size of files."""
    return _number(text, lambda value: 0 < value < math.inf, "a positive number")


def tolerance(text: str) -> float:
    """A difference to accept."""
    return _number(text, lambda value: value >= 0, "a number of at least 0")


def _number(text: str, allowed: Callable[[float], bool], what: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not allowed(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
    return value


def exit_status(work: Callable[[], int | None]) -> int:
    """The status of ``work``, 0 when it has none, 2 after an error in the input, which is printed,
    130 after Ctrl-C and 141 when nobody reads on (a pipe into head), as of a program that has no
    word in it.

    ``work`` imports what needs megatron-core, whose remarks on packages that are not installed are
    not shown.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", category=UserWarning, module=r"megatron\..*|torch\..*|spark_nemo\..*"
            )
            status = work() or 0
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # or Python complains when it flushes at the end
        return 141
    except (ConfigError, OSError) as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        advice = (
            ": make room where the output shall be, and the same command goes on" if full else ""
        )
        print(f"error: {error}{advice}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 130


def say(done: Converted) -> None:
    """Print what a conversion has made, and how fast."""
    print(
        f"{done.folder}: {done.num_tensors} tensors, {done.num_bytes / 1e9:.2f} GB in {done.seconds:.1f} s "
        f"({done.num_bytes / 1e6 / done.seconds:.0f} MB/s)"
    )
