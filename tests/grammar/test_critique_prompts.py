"""Prompts for critique, merge and reference-guided verification, and what they must not change."""

from __future__ import annotations

import re

import pytest

from spark_nemo.grammar import (
    CRITIQUE_PROMPTS,
    PROMPT_SETS,
    critique_prompts,
    parse_verification,
    prompt_set,
    verdict_line,
)
from spark_nemo.grammar.paper_prompts import VERIFY
from spark_nemo.records import Verdict

QUESTION, SOLUTION = "Is {{critique}} 4?", "Step 1: {{x}}\nAnswer: 4"
VERIFICATION, CRITIQUE = "## Step 1: a", "It is {{y}}."


def test_the_versions_of_the_prompt_sets_are_those_of_the_shipped_results():
    """Every stored key has them: a change here would make stored solutions and verifications
    unreachable.
    """
    assert {name: prompts.version for name, prompts in PROMPT_SETS.items()} == {
        "paper": "paper-g1-68ded788",
        "compact": "compact-g1-dbd2cb66",
    }


@pytest.mark.parametrize("name", sorted(CRITIQUE_PROMPTS))
def test_every_prompt_is_one_user_message_with_its_inputs(name):
    """Inputs stand in it as given, braces and all, and no place is left unfilled. The compact merge
    quotes neither question nor solution.
    """
    prompts, whole = critique_prompts(name), name == "paper"
    for messages, inputs in (
        (prompts.critique(QUESTION, SOLUTION, VERIFICATION), (QUESTION, SOLUTION, VERIFICATION)),
        (
            prompts.merge(QUESTION, SOLUTION, VERIFICATION, CRITIQUE, 1),
            (VERIFICATION, CRITIQUE, *((QUESTION, SOLUTION) if whole else ())),
        ),
        (
            prompts.verify_with_reference(QUESTION, SOLUTION, "1{{z}}8", 1),
            (QUESTION, SOLUTION, "1{{z}}8"),
        ),
    ):
        (message,) = messages
        assert message["role"] == "user"
        content = message["content"]
        for given in inputs:
            assert given in content
            content = content.replace(given, "")
        assert "{{" not in content


def test_a_version_covers_every_text():
    """Two sets differ, and neither version is a prompt set's."""
    versions = {prompts.version for prompts in CRITIQUE_PROMPTS.values()}
    assert len(versions) == 2 and versions.isdisjoint(
        prompts.version for prompts in PROMPT_SETS.values()
    )


def test_the_merge_asks_for_the_format_that_the_parser_reads():
    """The paper set's format parses, for both judgements and both verdicts."""
    (message,) = critique_prompts("paper").merge("q", "s", "v", "c", 2)
    labels = re.findall(r'"(\*\*This step is \w+\.\*\*)"', message["content"])
    verdicts = re.findall(r'"(\*\*Verification: [^"]*)"', message["content"])
    assert (
        verdicts == [verdict_line(True), verdict_line(False)]
        and "has 2 steps" in message["content"]
    )
    written = f"## Step 1: a\nb\n{labels[0]}\n\n## Step 2: a\nb\n{labels[1]}\n\n{verdicts[1]}"
    assert parse_verification(written, 2) == Verdict((True, False), False)


def test_the_critique_names_the_four_kinds_of_fault_and_its_heading():
    """The critic's prompt of the paper set names them."""
    (message,) = critique_prompts("paper").critique("q", "s", "v")
    for words in (
        "Missed error",
        "False alarm",
        "Wrong reason",
        "Inconsistent verdict",
        "<Original Verification>",
        "## Critique of the original verification",
    ):
        assert words in message["content"]


def test_the_reference_prompt_is_the_reference_free_one_with_an_answer_in_it():
    """Both examples and the solution to mark have an expected answer, which the reference-free
    prompt has nowhere.
    """
    (message,) = critique_prompts("paper").verify_with_reference("q", "s", "42", 3)
    (without,) = prompt_set("paper").verify("q", "s", 3)
    assert re.findall(r"Expected Answer: (\S+)\n\n", message["content"]) == ["216", "186.45", "42"]
    assert "Expected Answer" not in without["content"] and "expected" not in VERIFY.lower()
    assert (
        "No answer key" not in message["content"] and message["content"].count("has 3 steps") == 1
    )


def test_an_unknown_name_is_refused():
    """The error says which there are."""
    with pytest.raises(ValueError, match="compact, paper"):
        critique_prompts("long")
