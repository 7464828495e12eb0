"""The line-start markers that several parsers share, so that they can never disagree about what a
header is.

A line ends at a newline character only. Matching ignores ASCII case. Accepted, with optional
leading blanks::

    Step 1: text      **Step 1:** text      **Step 1**: text      **Step 1: title**      ## Step 1: text
    Answer: text      **Answer:** text      **Answer**: text      **Answer: text**       ## Answer: text

(one to six ``#``). The colon is required: a prose line such as "Step 2 follows from ..." is no
header.
"""

from __future__ import annotations

import re

FLAGS = re.ASCII | re.IGNORECASE | re.MULTILINE
_MARK = r"^[ \t]*+(?P<hash>\#{1,6}[ \t]++)?(?P<bold>\*\*)?"
_COLON = r"(?P<closed>\*\*)?[ \t]*+:"

STEP_HEADER = re.compile(_MARK + r"Step[ \t]++(?P<number>[0-9]++)" + _COLON, FLAGS)
ANSWER_HEADER = re.compile(_MARK + r"Answer" + _COLON, FLAGS)
ANY_HEADER = re.compile(_MARK + r"(?:Step[ \t]++[0-9]++|Answer)" + _COLON, FLAGS)


def after_header(text: str, header: re.Match[str], end: int) -> str:
    """What follows a header up to ``end``, stripped, without the ``**`` that closes a bold header."""
    body = text[header.end() : end]
    if header["bold"] and not header["closed"]:
        first_line, newline, rest = body.partition("\n")
        body = first_line.replace("**", "", 1) + newline + rest
    return body.strip()
