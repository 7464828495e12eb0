"""Prompts: what they say about the format is what the parsers accept."""

import re
from dataclasses import replace

import pytest

from spark_nemo.grammar import (
    PROMPT_SETS,
    StepFormat,
    Variant,
    check_format,
    parse_verification,
    prompt_set,
    split_response,
)
from spark_nemo.grammar.paper_prompts import BAKERY_EXAMPLE, POLICY, TANK_EXAMPLE
from spark_nemo.records import Verdict


@pytest.mark.parametrize(
    ("example", "labels", "answer_correct"),
    [
        (BAKERY_EXAMPLE, (True,) * 3, True),
        (TANK_EXAMPLE, (True,) * 3 + (False,) * 3, False),
    ],
)
def test_worked_examples_are_in_the_grammar(example, labels, answer_correct):
    """The verifier is shown solutions and verifications that our own parsers read completely."""
    solution, verification = example.split("Student Solution:\n")[1].split(
        "\n\nTeacher Verification:\n"
    )
    assert len(split_response(solution, StepFormat.PLAIN).steps) == len(labels)
    assert parse_verification(verification, len(labels)) == Verdict(labels, answer_correct)


def test_policy_example_passes_the_format_gate():
    """The response the policy is told to imitate would earn a reward."""
    assert check_format(re.search(r"<think>\n.*</answer>", POLICY, re.DOTALL).group()) is None


@pytest.mark.parametrize("name", sorted(PROMPT_SETS))
def test_every_prompt_is_one_user_message_with_its_inputs(name):
    """Each prompt holds question and solution as given, braces and all, and no place is left
    unfilled.
    """
    prompts, question, solution = (
        prompt_set(name),
        "Is {{solution}} \\frac{1}{2}?",
        "Step 1: {{x}}\nAnswer: 4",
    )
    for messages in (prompts.solve(question), prompts.policy(question)):
        assert [message["role"] for message in messages] == ["user"]
        assert question in messages[0]["content"]
    filled = [
        prompts.verify(question, solution),
        *(prompts.reward(kind, question, solution) for kind in Variant),
    ]
    for messages in filled:
        assert question in messages[0]["content"] and solution in messages[0]["content"]
        rest = messages[0]["content"].replace(question, "").replace(solution, "")
        assert "{{" not in rest


def test_compact_prompts_are_bare():
    """The toy task's prompts are exactly these characters."""
    prompts = prompt_set("compact")
    stepwise = "Problem: Q\n\nStudent Solution: S\n\nLet's verify step by step."
    assert prompts.solve("Q")[0]["content"] == "Q"
    assert prompts.policy("Q")[0]["content"] == "Q\nUse tags."
    assert prompts.verify("Q", "S", 3)[0]["content"] == stepwise
    assert prompts.reward(Variant.PRM_COT, "Q", "S")[0]["content"] == stepwise
    assert prompts.reward(Variant.ORM, "Q", "S")[0]["content"] == (
        "Problem: Q\n\nSolution: S\n\nIs the answer correct (Yes/No)?"
    )


def test_paper_verify_states_the_step_count():
    """A verifier told how many steps there are miscounts less; without a count the sentence is
    absent.
    """
    prompts = prompt_set("paper")
    assert "has 3 steps" in prompts.verify("Q", "S", 3)[0]["content"]
    assert "student solution has" not in prompts.verify("Q", "S")[0]["content"]


def test_version_changes_with_any_word():
    """Content keys made with other words differ, without anyone remembering to raise a number."""
    prompts = prompt_set("compact")
    assert replace(prompts, policy_template="{{question}}\nUse  tags.").version != prompts.version
    assert len({item.version for item in PROMPT_SETS.values()}) == len(PROMPT_SETS)


def test_unknown_set_is_named():
    """The error lists what there is."""
    with pytest.raises(ValueError, match="compact, paper"):
        prompt_set("long")
