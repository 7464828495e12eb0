"""``spark-nemo explain RUN ID``: trace a training example from its label back to the models."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import yaml

from spark_nemo.cli.data import label_files, read_store_fingerprint, store_folder
from spark_nemo.records import VERIFICATION, count_votes, outcome_from_json
from spark_nemo.records.store import RecordStore
from spark_nemo.verification.lineage import Descendant, Lineage, chosen_verification, trace

EXAMPLES = """examples:
  spark-nemo explain runs/first 0df7a627660cefc4
  spark-nemo explain runs/first step_consistency:0df7a6
  spark-nemo explain runs/first 5c1e --all
"""


def add_explain_command(commands: argparse._SubParsersAction) -> None:
    """Add the ``explain`` command."""
    command = commands.add_parser(
        "explain",
        help="walk from a training example back to its votes, solution, problem, prompts and "
        "models",
        description="Walk from a training example back to its votes, verifications, solution, "
        "problem, prompts and models. RUN is a run folder, or a store folder.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("run_folder", type=Path, metavar="RUN", help="run folder or store folder")
    command.add_argument(
        "id",
        metavar="ID",
        help="key of a solution, verification or other record, or its beginning; "
        "METHOD:KEY for the label that a method gave a solution",
    )
    command.add_argument(
        "--all",
        action="store_true",
        help="print the texts of all verifications, not the chosen only",
    )
    command.set_defaults(run=_explain, parser=command)


def _explain(arguments: argparse.Namespace) -> int:
    folder = store_folder(arguments.run_folder)
    with RecordStore(folder) as store:
        lineage = trace(store, arguments.id, label_files(folder), read_store_fingerprint(folder))
    print("\n".join(explain(lineage, arguments.all, _model_folders(folder))))
    return 0


def explain(lineage: Lineage, all_texts: bool, models: Mapping[str, str] = {}) -> Iterator[str]:
    """Yield the lines to print; ``models`` has the known model folders by role."""
    solution = lineage.solution
    yield f"{lineage.requested[0]} {lineage.requested[1]}"
    yield from (f"note: {note}" for note in lineage.notes)
    if not lineage.labels:
        yield from _section("label", "none: stage II gave this solution no label, or has not run")
        yield from _votes(lineage.descendants)
    chosen = set()
    for label in lineage.labels:
        yield from _label(label, lineage)
        source = chosen_verification(label, lineage.descendants)
        if source is not None:
            chosen.add(source.key)
    yield from _made(lineage.descendants, {*chosen, lineage.requested[1]}, all_texts)
    yield from _section(
        f"solution {solution.key}",
        f"{solution.num_tokens} tokens, finish_reason {solution.finish_reason}\n{solution.text}",
    )
    yield from _section(f"problem {solution.problem_id}", solution.question)
    for name, prompt in (("generator", lineage.solve_prompt), ("verifier", lineage.verify_prompt)):
        for message in prompt or []:
            yield from _section(f"prompt to the {name} ({message['role']})", message["content"])
    yield from _section(
        "made by", "\n".join(_fingerprint(lineage.fingerprint, models)) or "not recorded"
    )


def _label(label: Mapping[str, object], lineage: Lineage) -> Iterator[str]:
    evidence = dict(label["evidence"])
    yield from _section(
        f"label by {label['method']}", f"answer correct: {_yes(label['answer_correct'])}"
    )
    correct = evidence.pop("correct_votes", ())
    votes = evidence.pop("num_votes", 0)
    for step, (labelled, count) in enumerate(zip(label["step_labels"], correct), start=1):
        verdict = "correct" if labelled else "incorrect"
        share = f", agreement {max(count, votes - count) / votes:.2f}" if votes else ""
        yield f"  step {step}: {verdict} ({count} of {votes} votes for correct{share})"
    for name, value in evidence.items():
        yield f"  {name}: {_as_text(value)}"
    source = chosen_verification(label, lineage.descendants)
    why = label.get("reason") or f"drawn from {evidence.get('matching_votes')} that match"
    if source is None:
        yield "  target: the verification it was taken from is not in the store"
    elif source.payload.get("text") == label["target_text"]:
        yield f"  target: {source.kind} {source.key}, vote {evidence['chosen_vote']}: {why}"
    else:
        vote = evidence["chosen_vote"]
        yield f"  target, made from {source.kind} {source.key}, vote {vote} ({why}):"
        yield from _quoted(label["target_text"])
    shown = {
        "method",
        "solution",
        "step_labels",
        "answer_correct",
        "target_text",
        "evidence",
        "reason",
    }
    for name, value in label.items():
        if name not in shown:
            yield f"  {name}: {_as_text(value)}"


def _votes(descendants: Sequence[Descendant]) -> Iterator[str]:
    """Yield the votes per step of a solution without a label."""
    verdicts = [
        outcome_from_json(record.payload["outcome"])
        for record in descendants
        if record.kind == VERIFICATION
    ]
    count = count_votes(verdicts)
    for step, votes in enumerate(count.correct_votes, start=1):
        yield f"  step {step}: {votes} of {count.num_votes} votes for correct"


def _made(descendants: Sequence[Descendant], in_full: set[str], all_texts: bool) -> Iterator[str]:
    records = f"{len(descendants)} records" if descendants else "nothing"
    yield from _section("made of the solution", records)
    for record in descendants:
        vote = f" vote {record.payload['vote']}" if "vote" in record.payload else ""
        about = "" if record.kind == VERIFICATION else f" of {record.parent}"
        yield f"  {record.kind} {record.key}{vote}{about}: {_outcome(record.payload)}"
        # A merged label comes from records of other kinds: always print these, they are few.
        if all_texts or record.key in in_full or record.kind != VERIFICATION:
            yield from _quoted(str(record.payload.get("text", "")))


def _outcome(payload: Mapping[str, object]) -> str:
    outcome = payload.get("outcome")
    tokens = f"{payload['num_tokens']} tokens" if "num_tokens" in payload else ""
    if not isinstance(outcome, dict):
        return tokens
    if outcome.get("kind") != "verdict":
        details = ", ".join(str(value) for name, value in outcome.items() if name != "kind")
        return f"{outcome.get('kind')} ({details}), {tokens}"
    steps = "".join("C" if correct else "I" for correct in outcome["step_labels"])
    return f"steps {steps}, answer {_yes(outcome['answer_correct'])}, {tokens}"


def _fingerprint(fingerprint: Mapping[str, object], models: Mapping[str, str]) -> Iterator[str]:
    for name, value in fingerprint.items():
        role = name.removeprefix("models.")
        where = f" ({models[role]})" if role in models else ""
        yield f"{name}: {_as_text(value)}{where}"


def _model_folders(folder: Path) -> dict[str, str]:
    """Return the model folders by role from the pipeline's config.yaml; empty without the file."""
    path = folder.parent.parent / "config.yaml"
    if folder.parent.name != "stage1" or not path.is_file():
        return {}
    models = yaml.safe_load(path.read_text(encoding="utf-8"))["models"]
    return {role: name for role, name in models.items() if name}


def _section(title: str, text: str) -> Iterator[str]:
    yield f"\n== {title}"
    yield text


def _quoted(text: str) -> Iterator[str]:
    for line in text.split("\n"):
        yield f"    | {line}"


def _as_text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _yes(value: object) -> str:
    return "Yes" if value else "No"
