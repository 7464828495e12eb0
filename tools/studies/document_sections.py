"""Sections of docs/results.md, each written by one tool between markers that carry its name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from spark_nemo.report.student_interval import mean_and_half_width
from spark_nemo.utils.files import write_text_atomic

_SECTION = re.compile(r"<!-- (?P<name>[a-z ]+): begin -->.*?<!-- (?P=name): end -->", re.DOTALL)


def update_document(path: Path, section: str) -> None:
    """Put ``section`` into a file, which need not exist yet; the write is atomic."""
    before = path.read_text() if path.exists() else ""
    write_text_atomic(path, put_section(before, section))


def put_section(document: str, section: str) -> str:
    """Replace the section of the same name in ``document``, or append ``section``."""
    name = _SECTION.fullmatch(section)["name"]  # type: ignore[index]
    for found in _SECTION.finditer(document):
        if found["name"] == name:
            return document[: found.start()] + section + document[found.end() :]
    return f"{document.rstrip()}\n\n{section}\n".lstrip()


def keep_sections(before: str, document: str) -> str:
    """Add all sections of ``before`` to a ``document`` that replaces it."""
    for found in _SECTION.finditer(before):
        document = put_section(document, found[0])
    return document


def titled_section(name: str, title: str, command: str, parts: Iterable[str]) -> str:
    """Return the section called ``name`` with its title, command and further paragraphs."""
    heading = [f"## {title}", produced_by([command])]
    return marked(name, "\n\n".join([*heading, *parts]))


def marked(name: str, text: str) -> str:
    """Put the markers of the section called ``name`` around ``text``."""
    return f"<!-- {name}: begin -->\n\n{text.strip()}\n\n<!-- {name}: end -->"


def produced_by(commands: Sequence[str]) -> str:
    """Return a paragraph with the commands that produced a section."""
    return "Produced by:\n\n```\n" + "\n".join(commands).replace("```", "` ` `") + "\n```"


def markdown_table(
    header: Sequence[str], rows: Iterable[Sequence[str]], left: Sequence[int] = (0,)
) -> str:
    """Return a table whose columns are aligned to the right except those in ``left``."""
    rule = ["---" if column in left else "---:" for column in range(len(header))]
    lines = [header, rule, *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def mean_cell(values: Sequence[float | None], factor: float = 1.0) -> str:
    """Write ``mean ± half-width`` of Student's 95% interval over seeds, times ``factor``.

    The number of seeds is added when some seeds do not have a value.
    """
    known = [factor * value for value in values if value is not None]
    if not known:
        return "–"
    mean, half = mean_and_half_width(known)
    text = f"{mean:.1f}"
    if half is not None:
        text += f" ± {half:.1f}"
    if len(known) < len(values):
        text += f" ({len(known)} seeds)"
    return text


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
