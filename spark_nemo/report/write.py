"""Writes a run's summary and page, each whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spark_nemo.utils.files import write_json_atomic, write_text_atomic

from .model import read_summary, to_plain
from .page import report_page

SUMMARY_FILE = "summary.json"
REPORT_FILE = "report.html"


def write_report(folder: str | Path, summary: Mapping[str, Any]) -> Path:
    """Write ``summary.json`` and ``report.html`` into ``folder`` (made if absent) and return the
    page's path.

    Raises ``SummaryError`` before anything is written when the summary does not fit
    ``report.model``.
    """
    plain = to_plain(read_summary(summary))
    page = report_page(plain)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json_atomic(folder / SUMMARY_FILE, plain)
    write_text_atomic(folder / REPORT_FILE, page)
    return folder / REPORT_FILE
