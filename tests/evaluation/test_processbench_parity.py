"""ProcessBench scores against a scorer written without the package (``independent_scorer``)."""

from __future__ import annotations

import json
import os
import random
import re
import time
from pathlib import Path

import independent_scorer
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spark_nemo.evaluation import ProcessBenchCase, read_processbench
from spark_nemo.evaluation.processbench import boxed_vote, majority_vote
from spark_nemo.evaluation.saved_predictions import score_saved_predictions, score_votes

pytestmark = pytest.mark.slow

DATA = (
    Path(os.environ.get("SPARK_NEMO_DATA") or Path(__file__).parents[2].parent / "shared" / "data")
    / "processbench"
)
BOXED = (
    "",
    " 1 ",
    "-1",
    "-7",
    "2.0",
    "1.5",
    "99999999999999999999",
    "01",
    "\\text{1}",
    "\\frac{1}{2}",
    "one",
    "+1",
    "1_0",
    "\n0\n",
    "{1}",
    "3",
    "\uff12",
    "\u0663",
    "\u2212" + "1",
    "\u20031\u2003",
    "1e0",
    "0x1",
    "None",
    "nan",
    "-0",
    "- 1",
    "paragraph_1",
    "\\boxed{2",
    "9" * 5000,
    "\ud800",
    "\x00",
    "1\x00",
)
TEXTS = (
    "",
    "no box",
    "\\boxed{0}\\boxed{2}",
    "\\boxed{1",
    "boxed{1}",
    "\\boxed{1}\\boxed{}",
    "\\boxed {1}",
    "\\Boxed{1}",
    "\\\\boxed{1}",
    "\\boxed{1}} \\boxed{",
    "\\boxed{\\boxed{1}}",
    "\\boxed{-1}\n\\boxed{",
    "} \\boxed{2} {",
    "\\fbox{1}",
    "\\boxed\n{1}",
    *(f"so \\boxed{{{content}}}." for content in BOXED),
)
PIECES = ("\\boxed{", "}", "{", "\\", "boxed{", "1", "-1", " ", "\n", "\uff12", "\\text{")


def text_of(rng: random.Random, label: int, few: list[str]) -> str | None:
    """Make a critic's text: often correct, often one of ``few`` to make ties, at times rubble."""
    kind = rng.random()
    if kind < 0.35:
        return f"The answer is \\boxed{{{label}}}."
    if kind < 0.7:
        return rng.choice(few)
    if kind < 0.9:
        return rng.choice(TEXTS)
    return None if kind < 0.92 else "".join(rng.choices(PIECES, k=rng.randrange(12)))


def random_set(rng: random.Random) -> dict[str, list[tuple[int, list[str | None]]]]:
    """One to four splits of cases, each ``(label, texts)``, with the same number of votes
    everywhere.
    """
    votes, few = rng.choice((1, 1, 2, 3, 4, 8)), rng.sample(TEXTS, 3)
    return {
        name: [
            (label, [text_of(rng, label, few) for _ in range(votes)])
            for label in [-1, rng.randrange(4)]
            + [rng.randrange(-1, 4) for _ in range(rng.randrange(12))]
        ]
        for name in ("gsm8k", "math", "olympiadbench", "omnimath")[: rng.randrange(1, 5)]
    }


def cases_of(splits: dict) -> dict[str, list[ProcessBenchCase]]:
    return {
        name: [
            ProcessBenchCase(f"{name}-{i}", "g", "1?", ("a",) * 4, label == -1, label)
            for i, (label, _) in enumerate(split)
        ]
        for name, split in splits.items()
    }


def check(score, splits: dict) -> None:
    for name, split in splits.items():
        ours = score.splits[name]
        assert (100 * ours.acc_error, 100 * ours.acc_correct, 100 * ours.f1) == pytest.approx(
            independent_scorer.percentages(split), abs=1e-9
        )
    assert 100 * score.average == pytest.approx(independent_scorer.overall(splits), abs=1e-9)


def test_2500_adversarial_prediction_sets_score_as_by_the_independent_scorer() -> None:
    """2,500 random sets of one to four splits score alike.

    They have boxes (none, several, unclosed, nested), integers (negative, out of range, odd
    spellings and scripts), words, missing texts, votes and ties.
    """
    rng = random.Random(0)
    seen, ties = 0, 0
    for _ in range(2500):
        splits = random_set(rng)
        votes = {
            f"{name}-{i}": [None if text is None else boxed_vote(text) for text in texts]
            for name, split in splits.items()
            for i, (_, texts) in enumerate(split)
        }
        check(score_votes(cases_of(splits), votes), splits)
        seen += len(votes)
        ties += sum(len(set(cast)) == len(cast) > 1 and None not in cast for cast in votes.values())
    assert seen > 30_000 and ties > 1_000, (seen, ties)


def test_a_hundred_sets_score_alike_from_files(tmp_path: Path) -> None:
    """An official split and predictions in the official format score alike from files."""
    rng = random.Random(1)
    for _ in range(100):
        splits = {
            name: [(label, [text or "" for text in texts]) for label, texts in split]
            for name, split in random_set(rng).items()
        }
        for name, cases in cases_of(splits).items():
            (tmp_path / f"{name}.json").write_text(
                json.dumps(
                    [
                        {
                            "id": c.case_id,
                            "generator": c.generator,
                            "problem": c.problem,
                            "steps": list(c.steps),
                            "final_answer_correct": c.final_answer_correct,
                            "label": c.label,
                        }
                        for c in cases
                    ]
                )
            )
        rows = [
            {
                "id": f"{name}-{i}",
                "generated_critique": texts[0] if len(texts) == 1 else texts,
                "prediction": 0,
            }
            for name, split in splits.items()
            for i, (_, texts) in enumerate(split)
        ]
        (tmp_path / "said.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        data = [tmp_path / f"{name}.json" for name in splits]
        check(score_saved_predictions([tmp_path / "said.jsonl"], data), splits)


@given(
    st.text(st.sampled_from("\\boxed{}{1 \n"), max_size=60)
    | st.lists(st.sampled_from(PIECES)).map("".join)
)
def test_the_last_box_is_that_of_the_official_pattern(text: str) -> None:
    """The one-pass parser equals the regular expression of the official code on any text."""
    found = re.findall(r"\\boxed\{([^}]*)\}", text)
    assert boxed_vote(text) == (found[-1].strip() if found else None)


def test_a_megabyte_of_boxes_is_read_at_once() -> None:
    """No text takes quadratic time; the official pattern would take minutes on the first."""
    begin = time.monotonic()
    assert boxed_vote("\\boxed{" * 150_000) is None
    assert boxed_vote("\\boxed{1}" * 100_000) == "1"
    assert time.monotonic() - begin < 2


@pytest.mark.parametrize(
    ("votes", "winner"),
    [
        (["1", "2", "2", "1"], 1),
        (["2", "1", "1", "2"], 2),
        (["x", "1", "x", "1"], None),
        (["1", "01", "1.0", "+1"], 1),
        (["01", "1", "1", "01", "1"], 1),
        (["-1", "0"], -1),
        (["0", "-1"], 0),
        (["3", "2", "1", "0"], 3),
    ],
)
def test_a_tie_goes_to_the_string_seen_first(votes: list[str], winner: int | None) -> None:
    """Ties are won by the string seen first, and different spellings of a number are two strings.

    A word that wins is not a prediction. The independent scorer agrees.
    """
    texts = [f"\\boxed{{{vote}}}" for vote in votes]
    assert majority_vote(map(boxed_vote, texts)) == winner
    assert all(
        independent_scorer.is_hit(texts, label) == (label == winner) for label in range(-2, 5)
    )


@pytest.mark.skipif(not DATA.is_dir(), reason=f"no ProcessBench files in {DATA}")
def test_random_critics_on_the_two_real_files_score_alike() -> None:
    """All scores agree on the 1,400 official labels with eight votes each, half of them right."""
    rng = random.Random(2)
    cases = {name: read_processbench(DATA / f"{name}.json") for name in ("gsm8k", "math")}
    splits = {
        name: [
            (case.label, [text_of(rng, case.label, list(TEXTS[:3])) for _ in range(8)])
            for case in split
        ]
        for name, split in cases.items()
    }
    votes = {
        case.case_id: [None if text is None else boxed_vote(text) for text in texts]
        for name, split in cases.items()
        for case, (_, texts) in zip(split, splits[name])
    }
    score = score_votes(cases, votes)
    check(score, splits)
    assert score.average > 0.3
