"""Pure labelling: N verification outcomes of a solution become one label, or a named reason for dropping it.

Nothing here knows an answer or a true step label; how good the labels are is measured in ``spark_nemo.evaluation``.
"""

from .labelling import (
    LABEL_METHODS,
    Dropped,
    LabelOptions,
    label_all,
    label_outcome_consistency,
    label_single,
    label_step_consistency,
)
from .voting import VoteCount, count_votes, failure_rates, majority

__all__ = [
    "LABEL_METHODS", "Dropped", "LabelOptions", "VoteCount", "count_votes", "failure_rates", "label_all",
    "label_outcome_consistency", "label_single", "label_step_consistency", "majority",
]
