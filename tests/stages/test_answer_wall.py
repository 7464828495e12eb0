"""Separation of answer keys from stages I to III, by types, imports and code.

``test_poisoned_answers`` tests it by running the stages.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import pkgutil
import sys
import types
import typing
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import spark_nemo
from spark_nemo import records
from spark_nemo.config import SparkConfig
from spark_nemo.evaluation.answers import AnswerKey, EvalProblem

PACKAGE = Path(spark_nemo.__file__).parent
FORBIDDEN = ("gold", "truth", "reference", "answer_key", "expected")
STAGE_PACKAGES = (
    "records",
    "grammar",
    "verification",
    "rewards",
    "training",
    "engines",
    "megatron",
    "weight_sync",
)
"""Packages that do the work of stages I to III."""
ABOVE = ("stages", "rollout", "planning", "run")
"""Packages that put the work together; here only declared functions may name answers."""
BASELINES = "spark_nemo.verification.answer_key_baselines"
"""Module of ``STAGE_PACKAGES`` that may import answers, for the declared baselines' closures."""

ANSWER_FILES = {
    "data.eval_problems": "read by evaluation only",
    "data.rl_answers": "the RLVR baseline's",
    "pipeline.rl_answers": "the same, for the pipeline's rlvr variant",
    "stage1.reference_answers": "the reference-guided baseline's",
    "labels.reference_answers": "balancing by ground truth, a declared baseline",
}
"""Every setting that names a file with answers; ``ConfigError`` keeps each from having an effect
elsewhere.
"""
ABOUT_THE_BASELINE = {"stage1.reference_verifications", "labels.reference_pick"}
"""Settings of the reference-guided baseline that name no file."""
CLOSURES = {
    (
        "spark_nemo.rollout.generator",
        "RolloutGenerator",
        "checker",
    ): "the RLVR baseline's, None with any other reward",
    (
        "spark_nemo.rollout.engines",
        "RolloutEngines",
        "checker",
    ): "the same, where it is loaded",
    (
        "spark_nemo.rewards.designs",
        "RewardContext",
        "checker",
    ): "the same, as a reward that declares to read answers gets it",
    (
        "spark_nemo.verification.label_filter",
        "LabelFilter",
        "is_correct",
    ): "balancing by ground truth",
    (
        "spark_nemo.verification.early_stop",
        "StoppingRule",
        "is_settled",
    ): "numbers of votes alone",
    (
        "spark_nemo.rewards.hacking.constraints",
        "Constraint",
        "holds",
    ): "a rule of form: the text and settings alone",
}
"""Fields that hold a function from a text, or many, to right or wrong; but for the last, one with
answers behind it.
"""
READERS = {
    "spark_nemo.verification.answer_key_baselines": {
        "reference_guided_prompt",
        "ground_truth_check",
    },
    "spark_nemo.rollout.engines": {"answer_checker"},
    "spark_nemo.rollout.evaluator": {"Evaluator.__init__"},
    "spark_nemo.stages.stage3": {"_train"},
    "spark_nemo.planning.preflight": {
        "check_stage3",
        "check_pipeline",
        "check_data_here",
        "_has_answers",
    },
}
"""Every function of the stages that names an answer's type or a function that reads or compares
answers.
"""
OWN_ANSWER = (records.ParsedResponse, "answer")
"""The answer in a response's own text."""
KEY_NAMES = {
    "AnswerKey",
    "EvalProblem",
    "read_answer_keys",
    "read_eval_problems",
    "read_math",
    "read_math_sets",
    "answer_matches",
    "grade_answers",
    "grade_answer",
}
KEY_FIELDS = {
    "answer",
    "correct_answer",
    "original_answer",
    "final_answer",
    "gold",
    "ground_truth",
    "reward_model",
}
"""Names of a reference answer in data files."""


def modules(*packages: str) -> Iterator[types.ModuleType]:
    """Every module of these folders that can be imported here."""
    for package_name in packages:
        package = importlib.import_module(f"spark_nemo.{package_name}")
        for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            # Files that run inside a server's own environment.
            if not found.name.startswith(
                ("spark_nemo.engines.sglang.", "spark_nemo.engines.vllm.")
            ):
                yield importlib.import_module(found.name)


def data_types(*packages: str) -> dict[tuple[str, str], type]:
    """Dataclasses that are made there, by module and name."""
    return {
        (t.__module__, t.__qualname__): t
        for module in modules(*packages)
        for t in vars(module).values()
        if isinstance(t, type) and dataclasses.is_dataclass(t) and t.__module__ == module.__name__
    }


def parts_of(hint: object) -> Iterator[object]:
    """A type and, through all containers, its arguments."""
    yield hint
    for argument in typing.get_args(hint):
        for each in argument if isinstance(argument, list) else [argument]:
            yield from parts_of(each)


def reaches(hint: object, seen: list) -> Iterator[object]:
    """``parts_of`` a type, and of the fields of every dataclass of this package among them."""
    for part in parts_of(hint):
        if part not in seen:
            seen.append(part)
            yield part
            own = getattr(part, "__module__", "").startswith("spark_nemo.")
            if own and isinstance(part, type) and dataclasses.is_dataclass(part):
                for field_type in hints_of(part).values():
                    yield from reaches(field_type, seen)


def hints_of(data_type: type) -> dict[str, object]:
    """Types of the fields. A name that only type checkers import is looked for in every module that
    is loaded; one that only they define is taken for ``object``.
    """
    names = {"AnswerKey": AnswerKey, "EvalProblem": EvalProblem}
    while True:
        try:
            return typing.get_type_hints(data_type, localns=names)
        except NameError as error:
            found = [
                vars(module)[error.name]
                for name, module in sys.modules.items()
                if name.startswith(("spark_nemo", "torch")) and error.name in vars(module)
            ]
            names[error.name] = next(iter(found), object)


def trees(*packages: str) -> Iterator[tuple[str, ast.Module]]:
    """Parsed sources by module name."""
    for package_name in packages:
        for path in sorted((PACKAGE / package_name).rglob("*.py")):
            name = ".".join(("spark_nemo", *path.relative_to(PACKAGE).with_suffix("").parts))
            yield name, ast.parse(path.read_text())


def test_no_record_has_a_field_for_an_answer_key() -> None:
    """Proves it for every dataclass of ``records`` by field name and type; a verdict's
    ``answer_correct`` is a vote.

    Does not prove that a question's text is free of answers.
    """
    types = [
        t for t in vars(records).values() if isinstance(t, type) and dataclasses.is_dataclass(t)
    ]
    assert len(types) >= 10
    for record in types:
        for field in dataclasses.fields(record):
            if (record, field.name) == OWN_ANSWER:
                continue
            assert field.name != "answer" and not any(word in field.name for word in FORBIDDEN), (
                record,
                field.name,
            )
            assert "AnswerKey" not in str(field.type) and "EvalProblem" not in str(field.type), (
                record,
                field.name,
            )


def test_no_type_of_the_stages_can_hold_an_answer_key() -> None:
    """Proves it by type, through containers and nested dataclasses, for every dataclass of stages I
    to III and of what they are made of. A name would not do: the type decides.

    Does not cover a value typed ``object`` or ``Any``; what runs is compared in
    test_poisoned_answers.
    """
    found = data_types(*STAGE_PACKAGES, *ABOVE)
    assert len(found) > 60
    holders = {
        key for key, each in found.items() if {AnswerKey, EvalProblem} & set(reaches(each, []))
    }
    assert holders == set()


def test_functions_with_answers_behind_them_are_held_where_declared_and_nowhere_else() -> None:
    """Proves the only fields of a stage's types that hold a function from a problem or a text to
    right or wrong are the declared baselines' closures.
    """
    holders = set()
    for (module, name), each in data_types("rewards", "verification", "training", *ABOVE).items():
        for field, hint in hints_of(each).items():
            functions_in = [part for part in parts_of(hint) if typing.get_origin(part) is Callable]
            if any(bool in parts_of(typing.get_args(part)[-1]) for part in functions_in):
                holders.add((module, name, field))
    assert holders == set(CLOSURES)


def test_the_settings_that_name_a_file_with_answers_are_the_declared_ones() -> None:
    """Proves no other setting's name speaks of answers, keys or references. Each declared one is
    rejected where its baseline is not asked for: test_compose, test_label_knobs.
    """
    words, found = (*FORBIDDEN, "answer"), set()
    for section in dataclasses.fields(SparkConfig):
        kind = hints_of(SparkConfig)[section.name]
        for field in dataclasses.fields(kind) if dataclasses.is_dataclass(kind) else ():
            if any(word in field.name for word in words):
                found.add(f"{section.name}.{field.name}")
    assert found == (ANSWER_FILES.keys() - {"data.eval_problems"}) | ABOUT_THE_BASELINE


def test_no_package_below_the_stages_imports_or_names_an_answer_key() -> None:
    """Proves the packages where labels, rewards, losses and samples are made import nothing of
    evaluation, directly or through one another (import-linter: the layers), and do not even name an
    answer's type or reader: a declared baseline reaches them as a closure.
    """
    count = 0
    for name, tree in trees(*STAGE_PACKAGES):
        if name == BASELINES:
            continue
        count += 1
        for node in ast.walk(tree):
            assert not any("evaluation" in module for module in imported(node)), name
            assert not KEY_NAMES & {getattr(node, "id", None), getattr(node, "attr", None)}, name
    assert count > 60


def test_the_functions_that_touch_answers_are_the_declared_ones() -> None:
    """Proves which functions name an answer's type, reader or comparison: evaluation,
    checks before work, and the declared baselines' three closures. A new one fails here and has to
    be declared.
    """
    found = defaultdict(set)
    for name, tree in trees(*STAGE_PACKAGES, *ABOVE):
        for function, body in functions(tree):
            names = {getattr(node, "id", getattr(node, "attr", None)) for node in ast.walk(body)}
            if names & KEY_NAMES:
                found[name].add(function)
    assert dict(found) == READERS


def test_no_training_code_looks_for_an_answer_in_a_row_of_data() -> None:
    """Proves no ``row["answer"]`` or ``row.get("ground_truth")``, by any name that the data files
    at hand use, in any package: an answer cannot come in next to the typed readers.
    """
    for name, tree in trees(*STAGE_PACKAGES, *ABOVE):
        for node in ast.walk(tree):
            keys = []
            if isinstance(node, ast.Subscript):
                keys = [node.slice]
            elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("get", "pop"):
                keys = node.args[:1]
            looked_for = {key.value for key in keys if isinstance(key, ast.Constant)} & KEY_FIELDS
            assert not looked_for, (name, node.lineno, looked_for)


def imported(node: ast.AST) -> list[str]:
    """Modules that an import statement names."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module or ""] if isinstance(node, ast.ImportFrom) else []


def functions(tree: ast.Module) -> Iterator[tuple[str, ast.AST]]:
    """Top-level functions and methods by name; module-level statements under ``<module>``, imports
    aside.
    """
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            yield from (
                (f"{node.name}.{getattr(each, 'name', '<class>')}", each) for each in node.body
            )
        elif not isinstance(node, ast.Import | ast.ImportFrom):
            yield getattr(node, "name", "<module>"), node
