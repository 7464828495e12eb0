"""What a run came to: ``summary.json``, a self-contained ``report.html`` and the results table over
seeds.
"""

from .compare import compare_runs, comparison_markdown, comparison_page, read_runs, write_comparison
from .model import (
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
from .page import report_page
from .results import results_markdown
from .write import REPORT_FILE, SUMMARY_FILE, write_report

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
    "results_markdown",
    "to_plain",
    "write_comparison",
    "write_report",
]
