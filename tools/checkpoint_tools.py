"""Shared by the checkpoint tools: argument types, one conversion, and the exit status."""

from __future__ import annotations

import argparse
import errno
import math
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

from spark_nemo.config.errors import ConfigError


def folder(text: str) -> Path:
    """Return a path, with ~ expanded: shells leave it in ``--hf-config=~/models`` and in quotes."""
    return Path(os.path.expanduser(text))


def gigabytes(text: str) -> float:
    """Return a positive file size."""
    return _number(text, lambda value: 0 < value < math.inf, "a positive number")


def tolerance(text: str) -> float:
    """Return a difference to accept."""
    return _number(text, lambda value: value >= 0, "a number of at least 0")


def add_conversion_arguments(parser: argparse.ArgumentParser, source: str) -> None:
    """Add source (described by ``source``), target and ``--dtype``."""
    parser.add_argument("source", type=folder, help=source)
    parser.add_argument("target", type=folder, help="folder to make")
    parser.add_argument(
        "--dtype",
        choices=["float32", "float16", "bfloat16"],
        help="convert all tensors to this type; by default they keep theirs, bit for bit",
    )


def convert_checkpoint(given: argparse.Namespace, **options: object) -> None:
    """Convert ``given.source`` to ``given.target`` and print the result."""
    import torch

    from spark_nemo.megatron.checkpoint.conversion import convert

    dtype = getattr(torch, given.dtype) if given.dtype else None
    done = convert(given.source, given.target, given.to, dtype=dtype, show_progress=True, **options)
    print(
        f"{done.folder}: {done.num_tensors} tensors, {done.num_bytes / 1e9:.2f} GB in "
        f"{done.seconds:.1f} s ({done.num_bytes / 1e6 / done.seconds:.0f} MB/s)"
    )


def exit_status(work: Callable[[], int | None]) -> int:
    """Run ``work`` and return the exit status of the command.

    That is the result of ``work`` or 0; 2 after an error in the input, which is printed; 130 after
    Ctrl-C; 141 when the reader of a pipe (head) has closed it, as for other programs.

    ``work`` imports what needs megatron-core, whose warnings about missing packages are not shown.
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
        # Python would complain when it flushes standard output at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ConfigError, OSError) as error:
        advice = ""
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            advice = "; free some space there and run the same command to resume"
        print(f"error: {error}{advice}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; run the same command to resume", file=sys.stderr)
        return 130


def _number(text: str, allowed: Callable[[float], bool], what: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not allowed(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
    return value
