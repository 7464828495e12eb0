"""Parts of a generated document that other commands write: each stands between markers that carry
its name.
"""

from __future__ import annotations

import re
from pathlib import Path

from spark_nemo.utils.files import write_text_atomic

_SECTION = re.compile(r"<!-- (?P<name>[a-z ]+): begin -->.*?<!-- (?P=name): end -->", re.DOTALL)


def marked(name: str, text: str) -> str:
    """``text`` as the section called ``name``."""
    return f"<!-- {name}: begin -->\n\n{text.strip()}\n\n<!-- {name}: end -->"


def put_section(document: str, section: str) -> str:
    """``document`` with ``section`` in place of the one of that name, or at its end."""
    name = _SECTION.fullmatch(section)["name"]  # type: ignore[index]
    for found in _SECTION.finditer(document):
        if found["name"] == name:
            return document[: found.start()] + section + document[found.end() :]
    return f"{document.rstrip()}\n\n{section}\n".lstrip()


def update_document(path: Path, section: str) -> None:
    """``put_section`` on a file, which need not exist yet; atomic."""
    write_text_atomic(path, put_section(path.read_text() if path.exists() else "", section))


def keep_sections(before: str, document: str) -> str:
    """``document`` with all sections of ``before``, for whoever writes the rest of the file anew."""
    for found in _SECTION.finditer(before):
        document = put_section(document, found[0])
    return document
