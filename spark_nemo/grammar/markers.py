r"""Markers in model text that several parsers share: step and answer headers, and boxes.

A header is at the start of a line, and a line ends at a newline character only. ASCII case is
ignored. Accepted, with optional leading blanks and one to six ``#``::

    Step 1: text      **Step 1:** text      **Step 1**: text      **Step 1: title**      ## Step 1: text
    Answer: text      **Answer:** text      **Answer**: text      **Answer: text**       ## Answer: text

The colon is required: a prose line such as "Step 2 follows from ..." is not a header.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

FLAGS = re.ASCII | re.IGNORECASE | re.MULTILINE
_MARK = r"^[ \t]*+(?P<hash>\#{1,6}[ \t]++)?(?P<bold>\*\*)?"
_COLON = r"(?P<closed>\*\*)?[ \t]*+:"

STEP_HEADER = re.compile(_MARK + r"Step[ \t]++(?P<number>[0-9]++)" + _COLON, FLAGS)
ANSWER_HEADER = re.compile(_MARK + r"Answer" + _COLON, FLAGS)
ANY_HEADER = re.compile(_MARK + r"(?:Step[ \t]++[0-9]++|Answer)" + _COLON, FLAGS)

# The order matters: a backslash takes the next character with it, so "\\boxed{" (two backslashes)
# opens no box and "\{" opens no group.
_BOX_TOKEN = re.compile(r"\\boxed\{|\\.|[{}]", re.DOTALL)


def after_header(text: str, header: re.Match[str], end: int) -> str:
    """Text from a header to ``end``, stripped, without the ``**`` that closes a bold header."""
    body = text[header.end() : end]
    if header["bold"] and not header["closed"]:
        first_line, newline, rest = body.partition("\n")
        body = first_line.replace("**", "", 1) + newline + rest
    return body.strip()


@dataclass(frozen=True, slots=True)
class Box:
    r"""One complete ``\boxed{content}``: ``text[start:end]``, backslash included."""

    text: str = field(repr=False)
    start: int
    content_start: int
    end: int

    @property
    def content(self) -> str:
        """Text inside the box."""
        # Sliced on demand: the contents of a megabyte of nested boxes would take gigabytes.
        return self.text[self.content_start : self.end - 1]


def find_boxes(text: str) -> tuple[Box, ...]:
    """All complete boxes in the order they open, nested ones included. One pass over the text."""
    open_groups: list[tuple[bool, int, int]] = []
    boxes = []
    for token in _BOX_TOKEN.finditer(text):
        if token.group() in ("\\boxed{", "{"):
            open_groups.append((token.group() != "{", token.start(), token.end()))
        elif token.group() == "}" and open_groups:
            is_box, start, content_start = open_groups.pop()
            if is_box:
                boxes.append(Box(text, start, content_start, token.end()))
    return tuple(sorted(boxes, key=lambda box: box.start))


def extract_boxed(text: str) -> str | None:
    """Content of the box that closes last, stripped: the outer one of nested boxes. None if absent."""
    boxes = find_boxes(text)
    if not boxes:
        return None
    return max(boxes, key=lambda box: box.end).content.strip()
