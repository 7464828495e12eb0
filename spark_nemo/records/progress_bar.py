"""The progress bar of whatever takes long: tqdm on a terminal, a plain line now and then in a log."""

from __future__ import annotations

import sys
import time
from typing import Any, TextIO

from tqdm import tqdm

LINE_EVERY_S = 30.0
"""Seconds between two lines in a log. A terminal is redrawn ten times a second; in the file of a
run of days that would be tens of megabytes, all of it one line.
"""


def progress_bar(**options: Any) -> tqdm:
    """``tqdm(**options)`` on standard error. When that is no terminal: the first state, one every
    ``LINE_EVERY_S`` seconds, and the last when the bar is closed, each a line of its own.
    """
    if sys.stderr.isatty():
        return tqdm(**options)
    return tqdm(**options, file=_Lines(sys.stderr), bar_format="{desc}: {percentage:3.0f}%{r_bar}")


class _Lines:
    """The file that tqdm redraws on. It writes a carriage return and the bar, and a newline when it
    is done.
    """

    def __init__(self, target: TextIO) -> None:
        self._target, self._pending, self._written, self._next = target, "", "", float("-inf")

    def write(self, text: str) -> None:
        """Take a redrawn bar; pass it on when it is time, or the last."""
        self._pending = text.strip() or self._pending
        if (text == "\n" or time.monotonic() >= self._next) and self._pending != self._written:
            self._written, self._next = self._pending, time.monotonic() + LINE_EVERY_S
            self._target.write(self._pending + "\n")
            self._target.flush()

    def flush(self) -> None:
        """Every line is flushed when it is written."""
