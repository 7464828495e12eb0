r"""A second scorer of ProcessBench, written from its description, without the package's code.

The description: a critic's last ``\boxed{}`` counts, and a box ends at the first closing brace;
what is in it is stripped. Of several critiques the most frequent string counts, the earliest seen
among equals; critiques without a box do not vote. The string must read as a Python integer and
equal the label. Accuracy is over cases with an error (label other than -1) and over cases without;
F1 is their harmonic mean, here 0 where the formula divides by zero; the overall figure is the plain
mean of the splits' F1.
"""

from __future__ import annotations

OPEN = "\\boxed{"


def content_of_last_box(text: str) -> str | None:
    """Walk over the characters: a box begins after the opening words and ends at a brace."""
    found, inside, collected, seen = None, False, "", ""
    for character in text:
        if inside:
            if character == "}":
                found, inside, seen = collected, False, ""
            else:
                collected += character
        else:
            seen = (seen + character)[-len(OPEN) :]
            if seen == OPEN:
                inside, collected = True, ""
    return None if found is None else found.strip()


def elected(texts: list[str | None]) -> str | None:
    """Return the string with most votes; a later string needs one vote more than an earlier one."""
    ballots = [
        box for text in texts if text is not None and (box := content_of_last_box(text)) is not None
    ]
    leader, most = None, 0
    for position, ballot in enumerate(ballots):
        if ballot not in ballots[:position] and ballots.count(ballot) > most:
            leader, most = ballot, ballots.count(ballot)
    return leader


def is_hit(texts: list[str | None], label: int) -> bool:
    """Return True if the elected string is the label."""
    string = elected(texts)
    try:
        return string is not None and int(string) == label
    except ValueError:
        return False


def percentages(split: list[tuple[int, list[str | None]]]) -> tuple[float, float, float]:
    """Return the accuracies with and without an error, and F1, out of 100."""
    hits: dict[bool, list[int]] = {True: [], False: []}
    for label, texts in split:
        hits[label == -1].append(1 if is_hit(texts, label) else 0)
    with_error, without = (100 * sum(hits[kind]) / len(hits[kind]) for kind in (False, True))
    return (
        with_error,
        without,
        2 * with_error * without / (with_error + without) if with_error + without else 0.0,
    )


def overall(splits: dict[str, list[tuple[int, list[str | None]]]]) -> float:
    """Return the mean of the splits' F1."""
    return sum(percentages(split)[2] for split in splits.values()) / len(splits)
