"""Held-out evaluation: the only room that knows answers, true step labels and ProcessBench labels.
No torch.
"""

from .accuracy import (
    GradedSample,
    accuracy_difference,
    greedy_accuracy,
    majority_at_k,
    mean_accuracy,
    pass_at_k,
)
from .answers import (
    AnswerKey,
    EvalProblem,
    answer_matches,
    grade_answers,
    normalise_answer,
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
from .math_data import read_math, read_skywork_prompts
from .processbench import (
    ProcessBenchCase,
    ProcessBenchScore,
    average_f1,
    majority_prediction,
    parse_critic_box,
    predict_first_error,
    read_processbench,
    score_processbench,
)
from .reading import DataFileError

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
    "accuracy_difference",
    "answer_matches",
    "average_f1",
    "f1_difference",
    "f1_estimate",
    "grade_answers",
    "greedy_accuracy",
    "label_quality",
    "majority_at_k",
    "majority_prediction",
    "mean_accuracy",
    "mean_difference",
    "mean_estimate",
    "normalise_answer",
    "parse_critic_box",
    "pass_at_k",
    "predict_first_error",
    "ratio_estimate",
    "read_answer_keys",
    "read_eval_problems",
    "read_math",
    "read_processbench",
    "read_skywork_prompts",
    "score_processbench",
    "shared_checker",
]
