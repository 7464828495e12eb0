"""Pure labelling: N verification outcomes of a solution become one label, or a named reason for
dropping it.

Nothing here knows an answer or a true step label; how good the labels are is measured in
``spark_nemo.evaluation``.
"""

from .label_filter import REASONS, Selected, Selection, select_labels
from .labelling import LABEL_METHODS, NO_REVISIONS, Revisions, label_all
from .vote_choice import PICKS, Dropped, LabelOptions
from .voting import VoteCount, count_votes, failure_rates, majority

__all__ = [
    "LABEL_METHODS",
    "NO_REVISIONS",
    "PICKS",
    "REASONS",
    "Dropped",
    "LabelOptions",
    "Revisions",
    "Selected",
    "Selection",
    "VoteCount",
    "count_votes",
    "failure_rates",
    "label_all",
    "majority",
    "select_labels",
]
