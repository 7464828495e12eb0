"""Held-out evaluation: the only room that knows answers, true step labels and ProcessBench labels. No torch."""

from .accuracy import (
    GradedSample,
    accuracy_difference,
    greedy_accuracy,
    majority_at_k,
    mean_accuracy,
    pass_at_k,
)
from .answers import AnswerKey, EvalProblem, answer_matches, normalise_answer, read_answer_keys, read_eval_problems
from .bootstrap import Estimate, f1_difference, f1_estimate, mean_difference, mean_estimate, ratio_estimate
from .checker import MathChecker, shared_checker
from .label_quality import LabelQuality, label_quality
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
    "AnswerKey", "DataFileError", "Estimate", "EvalProblem", "GradedSample", "LabelQuality", "MathChecker",
    "ProcessBenchCase", "ProcessBenchScore", "accuracy_difference", "answer_matches", "average_f1", "f1_difference",
    "f1_estimate", "greedy_accuracy", "label_quality", "majority_at_k", "majority_prediction", "mean_accuracy",
    "mean_difference", "mean_estimate", "normalise_answer", "parse_critic_box", "pass_at_k", "predict_first_error",
    "ratio_estimate", "read_answer_keys", "read_eval_problems", "read_processbench", "score_processbench",
    "shared_checker",
]
