"""Solutions, votes and critiques written by hand, for the labelling tests."""

from __future__ import annotations

from spark_nemo.grammar import StepJudgement, parse_verification, render_verification
from spark_nemo.records import (
    Critique,
    LabelEvidence,
    LabelledSolution,
    Merge,
    MetaCritique,
    ReferenceVerification,
    Solution,
    Verdict,
    Verification,
)


def solution(key="s", problem_id="p", num_steps=2):
    steps = "\n".join(f"Step {k}: {k}+1={k + 1}" for k in range(1, num_steps + 1))
    return Solution(
        key=key,
        problem_id=problem_id,
        question="q",
        text=f"{steps}\nAnswer: 3",
        finish_reason="stop",
        num_tokens=3,
    )


def text(labels, answer=None, analysis="Checked."):
    """A verification in the grammar; ``labels`` such as ``"CI"``."""
    judgements = [StepJudgement("", analysis, letter == "C") for letter in labels]
    return render_verification(judgements, "I" not in labels if answer is None else answer)


def votes(*labels, key="s", kind=Verification):
    """One vote per string of labels; an outcome is put in as it is."""
    return [
        kind(
            f"{key}-{i}",
            key,
            i,
            *(
                (text(said), parse_verification(text(said)))
                if isinstance(said, str)
                else ("", said)
            ),
            10,
        )
        for i, said in enumerate(labels)
    ]


def reference_votes(*labels, key="s"):
    return votes(*labels, key=key, kind=ReferenceVerification)


def meta_critique(
    verification_key, said, critique="All of it was looked at again.", finish_reason="stop"
):
    """A critique and its merge; ``said`` is labels, an outcome, or None for no merge."""
    one = Critique(f"c-{verification_key}", "s", verification_key, critique, finish_reason, 7)
    if said is None:
        return MetaCritique(one, None)
    merged = (text(said), parse_verification(text(said))) if isinstance(said, str) else ("", said)
    return MetaCritique(
        one, Merge(f"m-{verification_key}", "s", verification_key, one.key, *merged, 12)
    )


def labelled(key, problem_id, yes, correct_votes=(8, 8), num_votes=8):
    labels = (True, True) if yes else (True, False)
    return LabelledSolution(
        "single",
        solution(key, problem_id),
        labels,
        yes,
        text("CC" if yes else "CI"),
        LabelEvidence(correct_votes, num_votes, num_votes if yes else 0, 0, 1, "first_vote"),
    )


def verdict(labels, answer=None):
    marks = tuple(letter == "C" for letter in labels)
    return Verdict(marks, all(marks) if answer is None else answer)
