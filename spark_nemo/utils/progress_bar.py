"""A progress bar for long work: tqdm on a terminal, one plain line now and then in a log file."""

from __future__ import annotations

import sys
import time
from typing import Any, TextIO

from tqdm import tqdm

LINE_EVERY_S = 30.0
"""Seconds between two lines in a log file."""


def progress_bar(**options: Any) -> tqdm:
    """Return ``tqdm(**options)`` on standard error, as plain lines when that is not a terminal.

    A log file gets the first state, one line every ``LINE_EVERY_S`` seconds, and the last state.
    """
    if sys.stderr.isatty():
        return tqdm(**options)
    return tqdm(
        **options, file=_LineWriter(sys.stderr), bar_format="{desc}: {percentage:3.0f}%{r_bar}"
    )


class _LineWriter:
    """The file that tqdm redraws on when standard error is not a terminal.

    tqdm redraws ten times a second with carriage returns. Passed on as it is, that would be one
    line of tens of megabytes in the log of a run that takes days.
    """

    def __init__(self, target: TextIO) -> None:
        self._target = target
        self._pending = ""
        self._written = ""
        self._next_write = float("-inf")

    def write(self, text: str) -> None:
        """Keep a redrawn bar; pass it on when a line is due, or when tqdm closes the bar."""
        self._pending = text.strip() or self._pending
        closing = text == "\n"
        due = closing or time.monotonic() >= self._next_write
        if due and self._pending != self._written:
            self._written = self._pending
            self._next_write = time.monotonic() + LINE_EVERY_S
            self._target.write(self._pending + "\n")
            self._target.flush()

    def flush(self) -> None:
        """Return at once: ``write`` flushes every line."""
