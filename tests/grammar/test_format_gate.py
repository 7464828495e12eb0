r"""The format gate on the published function's golden cases, and ``\boxed`` extraction."""

import pytest
from grammar_strategies import anything, tagged
from hypothesis import given, settings

from spark_nemo.grammar import (
    ParsedResponse,
    StepFormat,
    check_format,
    extract_boxed,
    split_response,
)
from spark_nemo.records import FormatViolation

OK = tagged(["4 + 5 = 9."], "9")


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        (OK, None),
        (OK + "\n", None),
        (OK + "\nHope this helps", "nothing_after_answer"),
        (OK.replace("4 + 5", "\\boxed{4} + 5"), "one_box"),
        (OK + "<answer>9</answer>", "one_answer_tag"),
        (OK.replace("<answer>", "").replace("</answer>", ""), "one_answer_tag"),
        (tagged(["Half of one."], "\\frac{1}{2}"), None),
        (tagged(["4 + 5 = 9."], "9\n"), "box_complete_on_one_line"),
        (OK.replace("\\boxed", "\\\\boxed"), "box_complete_on_one_line"),
    ],
)
def test_golden_cases_of_the_published_gate(text, rule):
    """Where the published gate is right, ours agrees: same inputs (with steps around them), same
    pass or fail.
    """
    assert check_format(text) == (None if rule is None else FormatViolation(rule))


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("\\boxed{9}<answer>nine</answer>", "box_in_answer"),
        ("<think><step>It is \\boxed{9}.</step></think><answer>nine</answer>", "box_in_answer"),
        ("<answer>\\boxed{9}</answer>", "tagged_steps"),
        ("<think>4 + 5 = 9.</think><answer>\\boxed{9}</answer>", "tagged_steps"),
        (OK.replace("4 + 5", "\\\\boxed{4} + 5"), "one_box"),
        (OK.replace("4 + 5", "\\boxed 4 + 5"), "one_box"),
        ("</answer><think><step>x</step></think><answer>\\boxed{9}", "one_answer_tag"),
    ],
)
def test_loopholes_of_the_published_gate_are_closed(text, rule):
    """Texts the published gate lets through (its box may be anywhere, steps are not looked at) are
    violations here.
    """
    assert check_format(text) == FormatViolation(rule)


@settings(max_examples=300, deadline=None)
@given(anything)
def test_any_text_passes_or_names_a_rule(text):
    """No text crashes the gate, and what passes has steps and an answer to verify."""
    violation = check_format(text)
    assert violation is not None or isinstance(
        split_response(text, StepFormat.TAGGED), ParsedResponse
    )
    extract_boxed(text)


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("so \\boxed{9}", "9"),
        ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\boxed{1} or \\boxed{2}", "2"),
        ("\\boxed{\\boxed{5}}", "\\boxed{5}"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("\\boxed{a \\} b}", "a \\} b"),
        ("{ \\boxed{5}", "5"),
        ("\\boxed{5", None),
        ("\\\\boxed{5}", None),
        ("\\boxed 5", None),
        ("", None),
        ("\\boxed{ 5 } and \\boxed{6", "5"),
    ],
)
def test_extract_boxed_follows_latex_braces(text, content):
    """The last complete box counts, with nested and escaped braces; an open one does not."""
    assert extract_boxed(text) == content


def test_extract_boxed_is_linear():
    """A degenerate text of nothing but openers takes one pass (a pass per opener would take
    minutes).
    """
    assert extract_boxed("\\boxed{" * 100_000) is None
