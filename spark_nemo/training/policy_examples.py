"""Examples of the policy's format: read, checked by the gate that stage III uses, divided by
problem, tokenised.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from spark_nemo.config import ConfigError
from spark_nemo.engines.tokenizer import Tokenizer
from spark_nemo.grammar import PromptSet, StepFormat, check_format, split_response
from spark_nemo.records import ParseFailure, PolicyExample, derive_seed
from spark_nemo.records.jsonl import DataFileError, id_hint, id_of, json_rows, text_of

from .packing import TrainSequence

FIELDS = ("problem_id", "question", "response")


def read_policy_examples(
    path: str | Path, *, drop_invalid: bool
) -> tuple[list[PolicyExample], Counter[str]]:
    """The examples of a JSONL file of ``problem_id``, ``question`` and ``response``, and how many
    were dropped by rule.

    A response that ``check_format`` refuses is an error, or is dropped and counted with
    ``drop_invalid``. Any other field is an error, so that no answer key comes along. Raises
    ``DataFileError`` naming file, line and rule.
    """
    examples: list[PolicyExample] = []
    dropped: Counter[str] = Counter()
    questions: dict[str, tuple[str, int]] = {}
    for number, row in json_rows(path):
        try:
            example = _example(row)
        except ValueError as error:
            raise DataFileError(f"{path}:{number}: {error}") from None
        question, first = questions.setdefault(example.problem_id, (example.question, number))
        if question != example.question:
            raise DataFileError(
                f"{path}:{number}: problem_id {example.problem_id!r} has another question on line "
                f"{first}: one id, one question{id_hint(example.problem_id)}"
            )
        violation = check_format(example.response)
        if violation is None:
            examples.append(example)
        elif drop_invalid:
            dropped[violation.rule] += 1
        else:
            raise DataFileError(
                f"{path}:{number}: 'response' breaks the format rule {violation.rule}"
                f"{_detail(example.response)}: mend it, or set sft.on_invalid=drop"
            )
    if not examples:
        raise DataFileError(f"{path}: no response keeps the format ({dict(dropped)})")
    return examples, dropped


def split_held_out(
    examples: Sequence[PolicyExample],
    share: float,
    seed: int,
) -> tuple[list[PolicyExample], list[PolicyExample]]:
    """``(trained, held out)``; a problem's responses are all on one side, and the file's order
    decides nothing.

    Raises ``ConfigError`` when a positive share leaves either side empty.
    """
    ids = sorted(
        {example.problem_id for example in examples},
        key=lambda each: derive_seed("sft-held-out", seed, each),
    )
    count = round(share * len(ids))
    if share > 0 and not 0 < count < len(ids):
        raise ConfigError(
            f"sft.val_fraction={share}: holds out {count} of {len(ids)} problems; choose another share, 0 "
            "for none"
        )
    chosen = frozenset(ids[:count])
    return (
        [example for example in examples if example.problem_id not in chosen],
        [example for example in examples if example.problem_id in chosen],
    )


def policy_sequences(
    examples: Sequence[PolicyExample],
    prompts: PromptSet,
    tokenizer: Tokenizer,
) -> list[TrainSequence]:
    """The policy's own prompt, and the response with the token that ends it to learn."""
    return [
        TrainSequence(
            tokenizer.encode_chat(prompts.policy(example.question)),
            (*tokenizer.encode(example.response), tokenizer.eos_ids[0]),
        )
        for example in examples
    ]


def _example(row: dict[str, object]) -> PolicyExample:
    if unknown := sorted(row.keys() - set(FIELDS)):
        raise ValueError(
            f"unknown field {unknown[0]!r}: an example has {', '.join(FIELDS)} and nothing else, no "
            "answer key above all"
        )
    values = {name: (id_of if name == "problem_id" else text_of)(row, name) for name in FIELDS}
    if blank := [name for name, value in values.items() if not value.strip()]:
        raise ValueError(f"{blank[0]!r} must not be empty")
    return PolicyExample(**values)


def _detail(response: str) -> str:
    parsed = split_response(response, StepFormat.TAGGED)
    return f" ({parsed.reason})" if isinstance(parsed, ParseFailure) else ""
