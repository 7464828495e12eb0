"""The text of a final answer without what never changes its value."""

from __future__ import annotations

import re

_THOUSANDS = re.compile(r"[+-]?\d{1,3}(,\d{3})+(\.\d+)?", re.ASCII)
_ASSIGNMENT = re.compile(r"[A-Za-z](_\{?\w+\}?)?=", re.ASCII)


def normalize_answer(text: str) -> str:
    """Remove notation that never changes an answer's value.

    This drops dollar signs, spacing, thousands commas, ``x =`` and a final full stop, and percent
    and degree signs as units. ``\\dfrac`` and ``\\tfrac`` become ``\\frac``, ``\\text{...}`` its
    content. Majority voting groups answers by the result.
    """
    text = text.strip().strip("$").strip()
    text = re.sub(r"\\(?:left|right|quad|qquad)(?![A-Za-z])|\\[!,;: ]", "", text)
    text = re.sub(r"\\[dt]frac(?![A-Za-z])", r"\\frac", text)
    text = re.sub(r"\\(?:text|textbf|mathrm|mathbf|mbox)\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\^\{?\\circ\}?|\\degree|\\%|%|\\\$", "", text)
    text = re.sub(r"\\frac(\d)(\d)(?!\d)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"(?<![A-Za-z\\])\s+|\s+(?![A-Za-z])", "", text).removesuffix(".")
    assignment = _ASSIGNMENT.match(text)
    if assignment:
        text = text[assignment.end() :]
    return text.replace(",", "") if _THOUSANDS.fullmatch(text) else text
