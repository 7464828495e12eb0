"""Summaries of runs (``summary.json``, ``report.html``) and comparisons over seeds."""

from .page import REPORT_FILE, SUMMARY_FILE, report_page, write_report
from .seed_comparison import (
    compare_runs,
    comparison_markdown,
    comparison_page,
    read_runs,
    write_comparison,
)
from .summary import (
    CurvePoint,
    Figure,
    LabelScores,
    MethodScores,
    ScoredSolution,
    ScoredStep,
    Stage1Summary,
    Stage2Summary,
    Stage3Summary,
    Summary,
    SummaryError,
    WholeSolutionScores,
    read_summary,
    to_plain,
)

__all__ = [
    "REPORT_FILE",
    "SUMMARY_FILE",
    "CurvePoint",
    "Figure",
    "LabelScores",
    "MethodScores",
    "ScoredSolution",
    "ScoredStep",
    "Stage1Summary",
    "Stage2Summary",
    "Stage3Summary",
    "Summary",
    "SummaryError",
    "WholeSolutionScores",
    "compare_runs",
    "comparison_markdown",
    "comparison_page",
    "read_runs",
    "read_summary",
    "report_page",
    "to_plain",
    "write_comparison",
    "write_report",
]
