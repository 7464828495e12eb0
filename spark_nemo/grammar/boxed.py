r"""Finds ``\boxed{...}`` with nested braces, in one pass over the text."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

# The order matters: a backslash takes the next character with it, so "\\boxed{" (two backslashes)
# opens no box and "\{" opens no group.
_TOKEN = re.compile(r"\\boxed\{|\\.|[{}]", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Box:
    r"""One complete ``\boxed{content}`` of ``text``; ``start`` and ``end`` bound all of it,
    backslash too.
    """

    text: str = field(repr=False)
    start: int
    content_start: int
    end: int

    @property
    def content(self) -> str:
        """What is inside. Cut out when asked for: those of a megabyte of nested boxes would take
        gigabytes.
        """
        return self.text[self.content_start : self.end - 1]


def find_boxes(text: str) -> tuple[Box, ...]:
    """All complete boxes in the order they open; a box inside a box counts too, an unclosed one
    does not.
    """
    open_groups: list[tuple[bool, int, int]] = []
    boxes = []
    for token in _TOKEN.finditer(text):
        if token.group() in ("\\boxed{", "{"):
            open_groups.append((token.group() != "{", token.start(), token.end()))
        elif token.group() == "}" and open_groups:
            is_box, start, content_start = open_groups.pop()
            if is_box:
                boxes.append(Box(text, start, content_start, token.end()))
    return tuple(sorted(boxes, key=lambda box: box.start))


def extract_boxed(text: str) -> str | None:
    """Content of the box that closes last (the outer one of nested boxes), stripped; None when
    there is no box.
    """
    boxes = find_boxes(text)
    return max(boxes, key=lambda box: box.end).content.strip() if boxes else None
