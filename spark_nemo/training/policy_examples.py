"""Examples for the format SFT: reading, the format check of stage III, split and tokenisation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from spark_nemo.config import ConfigError
from spark_nemo.engines.tokenizer import Tokenizer
from spark_nemo.grammar import PromptSet, StepFormat, check_format, split_response
from spark_nemo.records import ParseFailure, PolicyExample, derive_seed
from spark_nemo.records.rows import DataFileError, id_hint, id_of, read_rows, text_of

from .packing import TrainSequence

FIELDS = ("problem_id", "question", "response")


def read_policy_examples(
    path: str | Path, *, drop_invalid: bool
) -> tuple[list[PolicyExample], Counter[str]]:
    """Read a JSONL file of ``problem_id``, ``question`` and ``response``.

    Returns the examples and the number dropped by rule. A response that breaks the format is an
    error, or is dropped with ``drop_invalid``. Any other field is an error, so that an answer key
    cannot come along. Raises ``DataFileError`` naming file, line and rule.
    """
    examples: list[PolicyExample] = []
    dropped: Counter[str] = Counter()
    questions: dict[str, tuple[str, str]] = {}
    for place, row in read_rows(path):
        try:
            example = _example(row)
        except ValueError as error:
            raise DataFileError(f"{place}: {error}") from None
        # The first line of an id decides its question.
        question, first = questions.setdefault(example.problem_id, (example.question, place))
        if question != example.question:
            raise DataFileError(
                f"{place}: problem_id {example.problem_id!r} has another question on "
                f"{first.removeprefix(f'{path}:')}: one id, one question"
                f"{id_hint(example.problem_id)}"
            )
        violation = check_format(example.response)
        if violation is None:
            examples.append(example)
        elif drop_invalid:
            dropped[violation.rule] += 1
        else:
            raise DataFileError(
                f"{place}: 'response' breaks the format rule {violation.rule}"
                f"{_detail(example.response)}; correct it, or set sft.on_invalid=drop"
            )
    if not examples:
        raise DataFileError(f"{path}: no response keeps the format ({dict(dropped)})")
    return examples, dropped


def split_held_out(
    examples: Sequence[PolicyExample],
    share: float,
    seed: int,
) -> tuple[list[PolicyExample], list[PolicyExample]]:
    """Split into training and held-out examples by problem, whatever the order of the file.

    All responses to a problem are on one side. Raises ``ConfigError`` when a positive share leaves
    either side empty.
    """
    ids = sorted(
        {example.problem_id for example in examples},
        key=lambda each: derive_seed("sft-held-out", seed, each),
    )
    count = round(share * len(ids))
    if share > 0 and not 0 < count < len(ids):
        raise ConfigError(
            f"sft.val_fraction={share}: holds out {count} of {len(ids)} problems; choose another "
            "share, or 0 for none"
        )
    chosen = frozenset(ids[:count])
    trained = [example for example in examples if example.problem_id not in chosen]
    held_out = [example for example in examples if example.problem_id in chosen]
    return trained, held_out


def policy_sequences(
    examples: Sequence[PolicyExample],
    prompts: PromptSet,
    tokenizer: Tokenizer,
) -> list[TrainSequence]:
    """Tokenise examples: the policy's prompt, and the response with its end token."""
    return [
        TrainSequence(
            tokenizer.encode_chat(prompts.policy(example.question)),
            (*tokenizer.encode(example.response), tokenizer.eos_ids[0]),
        )
        for example in examples
    ]


def _example(row: dict[str, object]) -> PolicyExample:
    unknown = sorted(row.keys() - set(FIELDS))
    if unknown:
        raise ValueError(
            f"unknown field {unknown[0]!r}: an example has {', '.join(FIELDS)} and nothing else, "
            "above all no answer key"
        )
    example = PolicyExample(
        problem_id=id_of(row, "problem_id"),
        question=text_of(row, "question"),
        response=text_of(row, "response"),
    )
    for name in FIELDS:
        if not getattr(example, name).strip():
            raise ValueError(f"{name!r} must not be empty")
    return example


def _detail(response: str) -> str:
    parsed = split_response(response, StepFormat.TAGGED)
    return f" ({parsed.reason})" if isinstance(parsed, ParseFailure) else ""
