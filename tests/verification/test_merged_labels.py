"""Labels from merges and from verifications that saw the answer, and solutions without a label."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from label_cases import meta_critique, reference_votes, solution, text, verdict, votes

from spark_nemo.config import LABEL_METHODS as CONFIGURED
from spark_nemo.config import REFERENCE_GUIDED, REVISED_METHODS, LabelsConfig
from spark_nemo.grammar import Variant, parse_variant, prompt_set
from spark_nemo.grammar.variants import AnswerVerdict
from spark_nemo.records import EngineError, ParseFailure, Truncated, Verdict
from spark_nemo.verification.labelling import LABEL_METHODS, label_all, method_tokens
from spark_nemo.verification.training_labels import sft_example
from spark_nemo.verification.vote_choice import Dropped, LabelInputs

REFERENCE_FREE = [method for method in CONFIGURED if method != REFERENCE_GUIDED]


def apply(method, given_votes, meta_critiques=None, seed=0, **options):
    inputs = LabelInputs(
        solution(), given_votes, seed, LabelsConfig(**options), meta_critiques or {}
    )
    return LABEL_METHODS[method](inputs)


def merged(method, given_votes, said, options=None, **critique):
    """The label of ``method`` when every verification has a merge saying ``said``."""
    meta_critiques = {v.key: meta_critique(v.key, said, **critique) for v in given_votes}
    return apply(method, given_votes, meta_critiques, **(options or {}))


@pytest.mark.parametrize("method", REVISED_METHODS)
def test_a_merge_that_flips_a_step_flips_the_label(method):
    """The label, its verdict and its target are the merge's and not those of the verification it
    was made from.
    """
    unrevised = apply(REVISED_METHODS[method], votes("CC", "CC", "CI"))
    taken = merged(method, votes("CC", "CC", "CI"), "CI")
    assert (unrevised.step_labels, unrevised.answer_correct) == ((True, True), True)
    assert (taken.step_labels, taken.answer_correct, taken.target_text) == (
        (True, False),
        False,
        text("CI"),
    )


@pytest.mark.parametrize("method", REVISED_METHODS)
def test_the_revision_read_is_the_one_of_the_pick(method):
    """A merge of any other verification is not looked at: without the pick's own the solution is
    dropped.
    """
    given_votes = votes("CC", "CC", "CI")
    picked = apply(REVISED_METHODS[method], given_votes).evidence.chosen_key
    others = {v.key: meta_critique(v.key, "CI") for v in given_votes if v.key != picked}
    assert apply(method, given_votes, others) == Dropped("critique_missing")
    taken = apply(method, given_votes, {**others, picked: meta_critique(picked, "CC")})
    assert (taken.step_labels, taken.evidence.merge_key) == ((True, True), f"m-{picked}")


@pytest.mark.parametrize(
    ("said", "critique", "reason"),
    [
        (None, {}, "merge_missing"),
        (None, {"finish_reason": "length"}, "critique_truncated"),
        ("CC", {"finish_reason": "length"}, "critique_truncated"),
        (None, {"critique": "<think>and so on"}, "critique_parse_failure"),
        (None, {"critique": "<think>done</think>  "}, "critique_parse_failure"),
        (ParseFailure("step_count"), {}, "merge_parse_failure"),
        (Truncated(120), {}, "merge_truncated"),
        (EngineError("died"), {}, "merge_engine_error"),
        (verdict("CI", True), {}, "merge_incoherent"),
        (verdict("CCC"), {}, "merge_step_count"),
    ],
)
def test_whatever_is_wrong_with_a_merge_drops_the_solution_by_name(said, critique, reason):
    """No failure becomes a label, and the unrevised verification is never used instead."""
    assert merged("meta_critique", votes("CC"), said, **critique) == Dropped(reason)


def test_a_solution_without_a_pick_keeps_the_reason_of_the_pick():
    """Meta-critique drops what single drops, and the hybrids what their consistency drops."""
    assert merged("meta_critique", votes(Truncated(9), "CC"), "CC") == Dropped("vote_0_truncated")
    assert merged("hybrid_outcome", votes("CC", "CI"), "CC") == Dropped("tie")
    assert merged("hybrid_step", votes("CI", "IC", "CC", "II"), "CC") == Dropped("tie")


def test_an_incoherent_merge_is_kept_when_the_last_line_is_not_looked_at():
    """``require_consistent_verdict=false`` keeps the critic's text, contradictions included."""
    taken = merged(
        "meta_critique",
        votes("CC"),
        verdict("CI", True),
        {"require_consistent_verdict": False},
    )
    assert (taken.step_labels, taken.answer_correct) == ((True, False), True)


@pytest.mark.parametrize("method", REFERENCE_FREE)
def test_no_reference_free_method_reads_a_verification_that_saw_the_answer(method):
    """Proves every other method rejects the type, alone and among honest votes. That stages never
    hand them over is tests/stages/test_label_methods.py's to prove.
    """
    mixed = [*votes("CC"), *reference_votes("CC", "CI", "CI")[1:]]
    for given_votes in (reference_votes("CC"), mixed):
        with pytest.raises(ValueError, match="saw the answer"):
            merged(method, given_votes, "CC")
        with pytest.raises(ValueError, match="saw the answer"):
            label_all(method, [solution()], given_votes, seed=0)


def test_reference_guided_reads_nothing_else():
    """The converse: a verification that saw no answer is not evidence for the baseline."""
    with pytest.raises(ValueError, match="did not see the answer"):
        apply(REFERENCE_GUIDED, [*reference_votes("CC"), *votes("CC", "CI")[1:]])


@pytest.mark.parametrize(
    ("pick", "rule"),
    [
        ("single", "first_vote"),
        ("outcome_consistency", "verdict_majority"),
        ("step_consistency", "step_majority"),
    ],
)
def test_reference_guided_chooses_as_configured(pick, rule):
    """The rule the paper does not state is an option; step consistency is the default."""
    given_votes = reference_votes("CC", "CI", "CI")
    taken = apply(REFERENCE_GUIDED, given_votes, reference_pick=pick)
    assert (taken.evidence.chosen_by, taken.method) == (rule, REFERENCE_GUIDED)
    assert taken.step_labels == ((True, True) if pick == "single" else (True, False))
    assert apply(REFERENCE_GUIDED, given_votes).evidence.chosen_by == "step_majority"


def test_the_evidence_says_how_sure_the_votes_were_and_why_this_text_is_the_label():
    """Three of four votes call step 2 incorrect: agreement 3/4, entropy 0.81 bits; it goes into the
    file as JSON.
    """
    taken = apply("step_consistency", votes("CI", "CI", "CC", "CI"))
    assert taken.step_agreement == (1.0, 0.75)
    assert taken.evidence.step_entropy == (0.0, pytest.approx(0.8113, abs=1e-4))
    assert taken.reason == "one of 3 votes with the majority's label on every step"
    row = json.loads(json.dumps(taken.to_json()))
    assert (row["step_agreement"], row["reason"], row["evidence"]["merge_key"]) == (
        [1.0, 0.75],
        taken.reason,
        None,
    )


def test_a_merged_label_shows_the_votes_it_went_against():
    """Agreement is that of the votes with the label, so a revised step has little of it; both texts
    are named.
    """
    taken = merged("hybrid_outcome", votes("CC", "CC", "CC"), "CI")
    assert taken.step_agreement == (1.0, 0.0)
    key = taken.evidence.chosen_key
    assert (taken.evidence.critique_key, taken.evidence.merge_key) == (f"c-{key}", f"m-{key}")
    assert (
        taken.reason == "one of 3 votes with the majority's verdict, merged with a critique of it"
    )


@pytest.mark.parametrize("variant", list(Variant))
@pytest.mark.parametrize("method", REVISED_METHODS)
def test_a_merged_label_renders_as_orm_prm_and_prm_cot(method, variant):
    """One record, three targets, each read back as what the merge says."""
    taken = merged(method, votes("CC", "CC", "CI"), "CI")
    _, target = sft_example(taken, prompt_set("compact"), variant)
    expected = AnswerVerdict(False) if variant is Variant.ORM else Verdict((True, False), False)
    assert parse_variant(variant, target, 2) == expected
    assert ("Checked." in target) == (variant is Variant.PRM_COT)


def test_a_method_pays_for_what_it_reads():
    """Votes cost 10 tokens each, a critique 7, a merge 12; a method needs at most its report."""
    given_votes = votes("CC", "CC", "CI")
    meta_critiques = {v.key: meta_critique(v.key, "CC") for v in given_votes}
    inputs = LabelInputs(solution(), given_votes, 0, meta_critiques=meta_critiques)
    cost = {method: method_tokens(method, inputs) for method in REFERENCE_FREE}
    assert cost == {
        "single": 10,
        "outcome_consistency": 30,
        "step_consistency": 30,
        "meta_critique": 10 + 19,
        "hybrid_outcome": 30 + 19,
        "hybrid_step": 30 + 19,
    }
    reference_inputs = LabelInputs(solution(), reference_votes("CC", "CI"), 0)
    assert method_tokens(REFERENCE_GUIDED, reference_inputs) == 20


@given(
    st.lists(st.sampled_from(["CC", "CI", "IC", "II"]), min_size=1, max_size=7),
    st.sampled_from(["CC", "CI", "II"]),
    st.sampled_from(sorted(REVISED_METHODS)),
    st.randoms(),
    st.integers(0, 3),
)
@settings(max_examples=100, deadline=None)
def test_a_merged_label_depends_on_content_and_seed_alone(said, merge, method, shuffler, seed):
    """In whatever order the votes arrive, the same merge is the label."""
    given_votes = votes(*said)
    meta_critiques = {v.key: meta_critique(v.key, merge) for v in given_votes}
    labels = [
        apply(method, each, meta_critiques, seed)
        for each in (given_votes, shuffler.sample(given_votes, len(given_votes)))
    ]
    assert labels[0] == labels[1]
    assert isinstance(labels[0], Dropped) or labels[0].step_labels == verdict(merge).step_labels
