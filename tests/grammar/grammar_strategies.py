"""Texts that the grammar allows, and texts that come close to it."""

from hypothesis import assume
from hypothesis import strategies as st

from spark_nemo.grammar import StepJudgement, render_solution, render_verification

# Pieces that parsers react to, so that random texts reach their branches.
FRAGMENTS = st.sampled_from(
    [
        "Step 1:",
        "Step 2:",
        "Step 03:",
        "Step 99999999999999999999:",
        "**Step 1:**",
        "## Step 1: t",
        "## Step 2: t",
        "Answer:",
        "**Answer: 4**",
        "\n",
        "\n\n",
        "\r\n",
        " ",
        "\t",
        "**",
        "*",
        "#",
        "## ",
        "<think>",
        "</think>",
        "<step>",
        "</step>",
        "<answer>",
        "</answer>",
        "\\boxed{",
        "\\boxed",
        "\\\\boxed{",
        "{",
        "}",
        "\\",
        "4",
        "so",
        "é",
        "\U0001f600",
        "\x00",
        "\x1c",
        "\x85",
        "\u2028",
        "\ud800",
        "**This step is correct.**",
        "**This step is incorrect.**",
        "**This step is",
        "**Verification: Is the answer correct (Yes/No)? Yes**",
        "**Verification: Is the answer correct (Yes/No)? No**",
        "Is the answer correct?",
        "Step 1: Correct",
        "Step 2: Incorrect",
        "Yes",
        "No.",
    ]
)
anything = st.one_of(st.text(), st.lists(FRAGMENTS | st.text(max_size=3), max_size=25).map("".join))
stripped = anything.map(str.strip)


@st.composite
def solutions(draw):
    """``(steps, answer)`` that ``render_solution`` accepts."""
    steps = draw(st.lists(stripped.filter(bool), min_size=1, max_size=4))
    answer = draw(stripped.filter(bool))
    try:
        render_solution(steps, answer)
    except ValueError:
        assume(False)
    return tuple(steps), answer


@st.composite
def verifications(draw):
    """``(judgements, answer_correct)`` that ``render_verification`` accepts."""
    judgement = st.builds(StepJudgement, stripped, stripped, st.booleans())
    judgements = tuple(draw(st.lists(judgement, min_size=1, max_size=4)))
    answer_correct = draw(st.booleans())
    try:
        render_verification(judgements, answer_correct)
    except ValueError:
        assume(False)
    return judgements, answer_correct


def tagged(steps, answer, gap="\n"):
    """A policy response with these steps."""
    inside = gap.join(f"<step>{step}</step>" for step in steps)
    return f"<think>{gap}{inside}{gap}</think>{gap}<answer>\\boxed{{{answer}}}</answer>"
