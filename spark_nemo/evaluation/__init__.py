"""Held-out evaluation: the only package that reads answers and true step labels.

Imports no torch.
"""

from spark_nemo.records.rows import DataFileError

from .accuracy import GradedSample, mean_accuracy
from .answers import (
    AnswerKey,
    EvalProblem,
    answer_matches,
    grade_answers,
    read_answer_keys,
    read_eval_problems,
)
from .bootstrap import (
    Estimate,
    f1_difference,
    f1_estimate,
    mean_difference,
    mean_estimate,
    ratio_estimate,
)
from .checker import CheckerPool, MathChecker, shared_checker
from .label_accuracy import LabelQuality, label_quality
from .math_data import read_math
from .processbench import (
    ProcessBenchCase,
    ProcessBenchScore,
    average_f1,
    predict_first_error,
    read_processbench,
    score_processbench,
)

__all__ = [
    "AnswerKey",
    "CheckerPool",
    "DataFileError",
    "Estimate",
    "EvalProblem",
    "GradedSample",
    "LabelQuality",
    "MathChecker",
    "ProcessBenchCase",
    "ProcessBenchScore",
    "answer_matches",
    "average_f1",
    "f1_difference",
    "f1_estimate",
    "grade_answers",
    "label_quality",
    "mean_accuracy",
    "mean_difference",
    "mean_estimate",
    "predict_first_error",
    "ratio_estimate",
    "read_answer_keys",
    "read_eval_problems",
    "read_math",
    "read_processbench",
    "score_processbench",
    "shared_checker",
]
