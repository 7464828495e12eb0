"""The verification text as it is written and read, and the reward-model variants."""

import pytest
from grammar_strategies import anything, verifications
from hypothesis import given, settings
from hypothesis import strategies as st

from spark_nemo.grammar import (
    AnswerVerdict,
    ParsedVerification,
    StepJudgement,
    Variant,
    parse_judgements,
    parse_variant,
    parse_verification,
    parse_verifier_output,
    render_target,
    render_verification,
    verdict_line,
)
from spark_nemo.records import EngineError, ParseFailure, Truncated, Verdict

quick = settings(max_examples=150, deadline=None)
YES, NO = verdict_line(True), verdict_line(False)
STEPS = (
    "## Step 1: a\nfine\n**This step is correct.**\n\n"
    "## Step 2: b\nbad\n**This step is incorrect.**"
)
BOLD_STEPS = STEPS.replace("## Step 1: a", "**Step 1: a**").replace("## Step 2: b", "**Step 2:** b")


def test_rendered_text_is_the_interchange_format():
    """The exact characters that other implementations of the format read and write."""
    judgements = [
        StepJudgement("Add", "1 + 2 = 3.\nYes.", True),
        StepJudgement("Halve", "3 / 2 is 1.5.", False),
    ]
    assert render_verification(judgements, False) == (
        "## Step 1: Add\n1 + 2 = 3.\nYes.\n**This step is correct.**\n\n"
        "## Step 2: Halve\n3 / 2 is 1.5.\n**This step is incorrect.**\n\n"
        "**Verification: Is the answer correct (Yes/No)? No**"
    )


@quick
@given(verifications())
def test_parse_inverts_render(verification):
    """Whatever can be written reads back exactly, titles and analyses included."""
    judgements, answer_correct = verification
    text = render_verification(judgements, answer_correct)
    assert parse_judgements(text, len(judgements)) == ParsedVerification(judgements, answer_correct)


@settings(max_examples=300, deadline=None)
@given(anything, st.sampled_from(Variant), st.none() | st.integers(1, 3))
def test_any_text_is_a_verdict_or_a_failure(text, variant, num_steps):
    """No text crashes a parser, and a step-wise verdict has one label for every step."""
    outcome = parse_variant(variant, text, num_steps)
    assert isinstance(outcome, Verdict | AnswerVerdict | ParseFailure)
    if isinstance(outcome, Verdict) and num_steps is not None:
        assert len(outcome.step_labels) == num_steps


@quick
@given(verifications(), st.data())
def test_truncated_verification_gives_no_verdict(verification, data):
    """A verification cut before its Yes or No is a failure: no prefix is guessed to be whole."""
    text = render_verification(*verification)
    cut = data.draw(st.integers(0, len(text) - len("Yes**")))
    assert isinstance(parse_verification(text[:cut], len(verification[0])), ParseFailure)


@pytest.mark.parametrize(
    "early",
    [
        "Is the answer correct (Yes/No)? Yes",
        YES,
        "The last line will be **Verification: Is the answer correct? Yes**.",
    ],
)
@pytest.mark.parametrize("place", ["before", "inside"])
def test_an_early_verdict_does_not_win(early, place):
    """Only a verdict after the last label counts; taking the first match anywhere would say Yes
    here.
    """
    steps = (
        f"{early}\n{STEPS}" if place == "before" else STEPS.replace("fine", f"hm\n{early}\nfine")
    )
    assert parse_verification(f"{steps}\n\n{NO}") == Verdict((True, False), False)


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("", "steps_missing"),
        (YES, "steps_missing"),
        (f"<think>{STEPS}\n{YES}", "think_unclosed"),
        (f"<think>ok</think>{STEPS}\n{YES}<think>", "think_unclosed"),
        (STEPS, "verdict_missing"),
        (f"{YES}\n{STEPS}", "verdict_missing"),
        (f"{STEPS}\n{NO}\n{YES}", "verdict_contradictory"),
        (f"{STEPS}\nIs the answer correct (Yes/No)? No\n{YES}", "verdict_contradictory"),
        (f"{STEPS}\n{NO} I mean Yes", "verdict_missing"),
        (f"{STEPS.replace('Step 2', 'Step 3')}\n{YES}", "step_numbering"),
        (f"{STEPS.replace('Step 2', 'Step 1')}\n{YES}", "step_numbering"),
        (f"{STEPS.replace('**This step is correct.**', '')}\n{YES}", "step_label"),
        (f"{STEPS}\n**This step is correct.**\n{YES}", "step_label"),
        (
            f"{STEPS.replace('## Step 1: a', '## Step 1: **This step is correct.**')}\n{YES}",
            "step_label",
        ),
    ],
)
def test_failures_name_their_rule(text, rule):
    """Each broken rule is told apart, and none of them yields a verdict."""
    assert parse_verification(text).reason.startswith(rule)


@pytest.mark.parametrize("num_steps", [1, 3])
def test_another_number_of_steps_is_a_failure(num_steps):
    """Labels are never padded or cut to the solution's step count."""
    assert parse_verification(f"{STEPS}\n\n{NO}", num_steps).reason.startswith("step_count")


@pytest.mark.parametrize(
    "text",
    [
        f"<think>## Step 1: ?\n{YES}</think>\n{STEPS}\n\n{NO}",
        f"no opening tag, the chat template wrote it</think>{STEPS}\n\n{NO}",
        f"Here is my check.\n\n{STEPS}\n\n---\n\nSo the answer is wrong.\n\n{NO}\n",
        f"{STEPS.replace('## ', '### ')}\n\n{NO}",
        f"{BOLD_STEPS}\n\n{NO}",
        f"{STEPS.replace('ct.**', 'ct**')}\n\nIs the answer correct? no.",
        f"{STEPS}\n\nVerification: Is the answer correct (Yes/No)? **No**",
        f"{STEPS}\n\n{NO}\n{NO}",
        f"{STEPS}\n\n{NO}".replace("\n", "\r\n"),
        f"{STEPS}\n\n{NO}".upper(),
    ],
)
def test_unambiguous_spellings_are_read(text):
    """Spellings that language models use for the same thing give the same judgements."""
    parsed = parse_judgements(text, 2)
    assert parsed.verdict == Verdict((True, False), False)
    assert [item.title.lower() for item in parsed.judgements] == ["a", "b"]
    assert [item.analysis.lower() for item in parsed.judgements] == ["fine", "bad"]


@pytest.mark.parametrize(
    ("title", "analysis", "match"),
    [
        ("t", "see\n## Step 2: x", "step header"),
        ("t", "**Step 4:** x", "step header"),
        ("t", "so **This step is correct.** then", "step label"),
        ("**This step is incorrect.**", "x", "step label"),
        ("t", f"x\n{YES}\ny", "verdict line"),
        ("t", "a </think> b", "think tag"),
        ("t", " x", "white space"),
        ("t\nu", "x", "more than one line"),
    ],
)
def test_render_refuses_what_would_break_the_grammar(title, analysis, match):
    """An analysis that forges structure is rejected with its place named."""
    with pytest.raises(ValueError, match=match):
        render_verification(
            [StepJudgement("ok", "ok", True), StepJudgement(title, analysis, True)], True
        )


def test_finish_reason_decides_before_the_text():
    """A complete-looking text that ran into the limit or was aborted is still no verdict."""
    text = f"{STEPS}\n\n{NO}"
    assert parse_verifier_output(text, "stop", 9, 2) == Verdict((True, False), False)
    assert parse_verifier_output(text, "length", 9, 2) == Truncated(9)
    assert isinstance(parse_verifier_output(text, "abort", 9, 2), EngineError)
    with pytest.raises(ValueError, match="finish_reason"):
        parse_verifier_output(text, "tool_calls", 9, 2)


@quick
@given(verifications(), st.sampled_from(Variant))
def test_every_variant_reads_its_own_target(verification, variant):
    """The parser reads back the text that the reward model is trained to write."""
    judgements, answer_correct = verification
    outcome = parse_variant(
        variant, render_target(variant, judgements, answer_correct), len(judgements)
    )
    if variant is Variant.ORM:
        assert outcome == AnswerVerdict(answer_correct)
    else:
        assert outcome == Verdict(tuple(item.correct for item in judgements), answer_correct)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Yes", AnswerVerdict(True)),
        (" no\n", AnswerVerdict(False)),
        ("YES.", AnswerVerdict(True)),
        ("<think>No</think>\nYes", AnswerVerdict(True)),
        ("Yes, it is", ParseFailure("orm_answer: neither Yes nor No")),
        ("", ParseFailure("orm_answer: neither Yes nor No")),
        ("Yes..", ParseFailure("orm_answer: neither Yes nor No")),
        ("<think>Yes", ParseFailure("think_unclosed")),
    ],
)
def test_orm_reads_one_word(text, expected):
    """One closing period is accepted (the published parser scores it 0); anything else is a
    failure, not a No.
    """
    assert parse_variant(Variant.ORM, text) == expected


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        (f"Step 1: Correct\nStep 3: Correct\n{YES}", "step_numbering"),
        (f"Step 1: Correct\nwell\n{YES}", "prm_line"),
        ("Step 1: Correct", "verdict_missing"),
        (f"{YES}\nStep 1: Correct", "verdict_missing"),
        (f"Step 1: Correct\n{NO}\n{YES}", "verdict_contradictory"),
        (f"Step 1: Correct\nStep 2: Correct\n{YES}", "step_count"),
        (YES, "steps_missing"),
    ],
)
def test_prm_failures_name_their_rule(text, rule):
    """The label-only variant has the same rules and allows no other line."""
    assert parse_variant(Variant.PRM, text, 1).reason.startswith(rule)
