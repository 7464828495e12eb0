"""The examples of the policy's format SFT: errors, dropped examples, and held-out problems."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from spark_nemo.config import ConfigError
from spark_nemo.engines.tokenizer import Tokenizer
from spark_nemo.grammar import prompt_set
from spark_nemo.records import PolicyExample
from spark_nemo.records.rows import DataFileError
from spark_nemo.toy.resolve import ASSETS
from spark_nemo.training.policy_examples import (
    policy_sequences,
    read_policy_examples,
    split_held_out,
)

GOOD = "<think><step>1+1=2</step></think><answer>\\boxed{2}</answer>"
ROW = {"problem_id": "a", "question": "Compute 1+1.", "response": GOOD}


def written(folder: Path, *rows: dict) -> Path:
    path = folder / "examples.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answer": "2"}, "unknown field 'answer'"),
        ({"correct_answer": "2"}, "unknown field 'correct_answer'"),
        (
            {"response": GOOD.replace("<step>", "")},
            "breaks the format rule tagged_steps (tag_order: ",
        ),
        ({"response": f"{GOOD} Done."}, "breaks the format rule nothing_after_answer"),
        ({"response": GOOD.replace("\\boxed{2}", "2")}, "breaks the format rule one_box"),
        ({"response": " "}, "'response' must not be empty"),
        ({"question": 7}, "'question' must be a string"),
        ({"question": "Compute 2+2."}, "has another question on line 1"),
    ],
)
def test_a_bad_row_is_named_by_file_line_and_reason(
    tmp_path: Path, changes: dict, message: str
) -> None:
    """Proves nothing is trained on by accident: no answer key, no response that stage III would
    give reward 0.
    """
    path = written(tmp_path, ROW, {**ROW, **changes})
    with pytest.raises(DataFileError) as raised:
        read_policy_examples(path, drop_invalid=False)
    assert str(raised.value).startswith(f"{path}:line 2: ") and message in str(raised.value)


def test_a_number_identifies_a_problem_here_too(tmp_path: Path) -> None:
    """Proves an integer is read as its digits, and that the same digits as a string are the same
    problem.
    """
    assert read_policy_examples(written(tmp_path, {**ROW, "problem_id": 7}), drop_invalid=False)[
        0
    ] == [PolicyExample(**{**ROW, "problem_id": "7"})]
    two = written(
        tmp_path, {**ROW, "problem_id": 7}, {**ROW, "problem_id": "7", "question": "another?"}
    )
    with pytest.raises(
        DataFileError,
        match=r":line 2: problem_id '7' has another question .*an integer and a string",
    ):
        read_policy_examples(two, drop_invalid=False)


def test_responses_out_of_format_can_be_dropped_and_are_counted_by_rule(tmp_path: Path) -> None:
    """Proves sft.on_invalid=drop forgives the format and nothing else; a file without one good
    response is an error.
    """
    broken = {**ROW, "response": GOOD + GOOD}
    examples, dropped = read_policy_examples(
        written(tmp_path, broken, ROW, broken), drop_invalid=True
    )
    assert examples == [PolicyExample(**ROW)] and dropped == {"one_box": 2}
    with pytest.raises(DataFileError, match="unknown field"):
        read_policy_examples(written(tmp_path, {**ROW, "gold": "2"}), drop_invalid=True)
    with pytest.raises(DataFileError, match="no response keeps the format"):
        read_policy_examples(written(tmp_path, broken), drop_invalid=True)


def test_a_problem_is_held_out_whole_whatever_the_order_of_the_file() -> None:
    """Proves no question is on both sides, and that the seed alone decides which: not the file's
    order.
    """
    examples = [PolicyExample(f"p{n % 10}", f"q{n % 10}", f"r{n}") for n in range(30)]
    trained, held = split_held_out(examples, 0.3, seed=1)
    assert len(held) == 9 and not {e.problem_id for e in held} & {e.problem_id for e in trained}
    backwards = split_held_out(examples[::-1], 0.3, seed=1)
    assert sorted(e.response for e in backwards[1]) == sorted(e.response for e in held)
    assert {e.problem_id for e in split_held_out(examples, 0.3, seed=2)[1]} != {
        e.problem_id for e in held
    }
    assert split_held_out(examples, 0, seed=1) == (examples, [])
    with pytest.raises(ConfigError, match="holds out 0 of 10"):
        split_held_out(examples, 0.01, seed=1)


def test_the_prompt_is_the_policys_and_the_response_ends() -> None:
    """Proves stage III's own prompt is what the response is learnt after, and that ending is learnt
    with it.
    """
    tokenizer, prompts = Tokenizer.load(ASSETS / "generator"), prompt_set("compact")
    (sequence,) = policy_sequences([PolicyExample(**ROW)], prompts, tokenizer)
    assert sequence.prompt_ids == tokenizer.encode_chat(prompts.policy(ROW["question"]))
    assert (
        tokenizer.decode(sequence.response_ids[:-1]) == GOOD
        and sequence.response_ids[-1] in tokenizer.eos_ids
    )
