"""The paper's process-aware reward: the format gate times the verifier's verdict."""

from __future__ import annotations

from spark_nemo.records import AnswerVerdict, Failure, FormatViolation, VariantOutcome, Verdict


def process_aware_reward(
    format_violation: FormatViolation | None, outcome: VariantOutcome | None
) -> float | Failure:
    """``r = f * y``: f is 0 for a response that broke the format and 1 otherwise, y is 1 for a
    final Yes, 0 for a No. No step is read, so any kind of reward model will do.

    Resists inflation: splitting a correct step in two changes nothing.

    A format violation is worth 0 by the definition of the method (arXiv 2512.03244, the f(s) gate),
    whether or not the verifier saw the response: pass ``outcome=None`` when it did not. Any other
    missing verdict is no reward at all and is returned as the ``Failure`` it is; ``failure_policy``
    decides what it costs.

    Raises ``ValueError`` for a well-formed response without an outcome.
    """
    if format_violation is not None:
        return 0.0
    match outcome:
        case Verdict() | AnswerVerdict():
            return float(outcome.answer_correct)
        case FormatViolation():
            return 0.0
        case None:
            raise ValueError(
                "process_aware_reward: a response in the format needs an outcome; it was not verified"
            )
    return outcome
