"""From a training example back to what it was made of: votes, verifications, solution, problem,
prompts and models.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from spark_nemo.config import ConfigError
from spark_nemo.grammar import ParsedResponse, PromptSet, canonical_solution, prompt_set
from spark_nemo.grammar.prompts import ChatMessages
from spark_nemo.records import SOLUTION, VERIFICATION, Solution
from spark_nemo.records.store import RecordStore

from .sampler import parse_solution

Payload = Mapping[str, object]
_SHOWN_MATCHES = 5


@dataclass(frozen=True, slots=True)
class Descendant:
    """A record made from the solution: a verification, or what was made of one. ``parent`` is the
    key of its source.
    """

    kind: str
    key: str
    parent: str
    payload: Payload


@dataclass(frozen=True, slots=True)
class Lineage:
    """All that one solution and its labels were made of. ``labels`` are rows of labels.jsonl, one
    per method.
    """

    asked: tuple[str, str]
    """Kind and key of the record that was asked for."""
    solution: Solution
    labels: Sequence[Payload]
    descendants: Sequence[Descendant]
    """Verifications first, in the order of their votes; then what was made of them."""
    made_by: Payload
    solve_prompt: ChatMessages | None
    verify_prompt: ChatMessages | None
    notes: Sequence[str]
    """What could not be found, or may differ from what was sent."""


def find_record(store: RecordStore, name: str) -> tuple[str, str]:
    """Kind and key of the one record whose key is ``name`` or begins with it.

    Raises ``ConfigError`` when there is none, or more than one, naming the first few.
    """
    matches = []
    for kind in store.kinds():
        for key in store.keys_with_prefix(kind, name, _SHOWN_MATCHES + 1):
            matches.append((kind, key))
    exact = [match for match in matches if match[1] == name]
    matches = exact or matches
    if not matches:
        raise ConfigError(f"{name}: no record of {store.folder} begins so")
    if len(matches) > 1:
        shown = ", ".join(f"{kind} {key}" for kind, key in matches[:_SHOWN_MATCHES])
        more = ", ..." if len(matches) > _SHOWN_MATCHES else ""
        raise ConfigError(
            f"{name}: more than one record begins so: {shown}{more}: write more of it"
        )
    return matches[0]


def trace(store: RecordStore, name: str, label_files: Sequence[Path], made_by: Payload) -> Lineage:
    """The lineage of a solution, a verification, anything made of them, or a label.

    ``name`` is a key, the beginning of one, or ``method:key`` for a label, whose key is its
    solution's; the labels of other methods are left out then. Raises ``ConfigError`` when it does
    not name one record, or its solution is gone.
    """
    method, _, key_part = name.rpartition(":")
    asked = find_record(store, key_part)
    solution_key = _solution_of(store, *asked)
    row = store.get(solution_key, SOLUTION)
    if row is None:
        raise ConfigError(
            f"{asked[0]} {asked[1]}: its solution {solution_key} is not in {store.folder}"
        )
    solution = Solution.from_json(row)
    labels = [
        label for label in _labels(label_files, solution_key) if method in ("", label["method"])
    ]
    if method and not labels:
        raise ConfigError(f"{name}: no label of this method for solution {solution_key}")
    prompts, notes = _prompts(made_by)
    parsed = parse_solution(solution)
    usable = isinstance(parsed, ParsedResponse)
    if not usable:
        notes.append(f"the solution was never verified: {parsed.reason}")
    return Lineage(
        asked,
        solution,
        labels,
        list(_descendants(store, solution_key)),
        made_by,
        prompts.solve(solution.question) if prompts else None,
        prompts.verify(solution.question, canonical_solution(parsed), len(parsed.steps))
        if prompts and usable
        else None,
        notes,
    )


def chosen_verification(label: Payload, descendants: Sequence[Descendant]) -> Descendant | None:
    """The verification that a label's evidence names, by its key or else by its vote."""
    evidence = label["evidence"]
    if key := evidence.get("chosen_key"):
        return next((d for d in descendants if d.key == key), None)
    chosen = evidence.get("chosen_vote")
    return next(
        (d for d in descendants if d.kind == VERIFICATION and d.payload.get("vote") == chosen), None
    )


def _solution_of(store: RecordStore, kind: str, key: str) -> str:
    """Walk up the parents to a solution; the last one met where the chain is broken."""
    met = {key}
    while kind != SOLUTION:
        parent = store.parent(key, kind)
        if parent is None:
            raise ConfigError(f"{kind} {key}: names no parent, so what it was made of is not known")
        kinds = [name for name in store.kinds() if store.location(parent, name)]
        if not kinds or parent in met:
            return parent
        met.add(parent)
        key, kind = parent, kinds[0]
    return key


def _descendants(store: RecordStore, key: str) -> Iterator[Descendant]:
    """Children by kind (verifications first), each generation before the next."""
    kinds = sorted(store.kinds(), key=lambda kind: (kind != VERIFICATION, kind))
    generation, met = [key], {key}
    while generation:
        found = [
            Descendant(kind, child, parent, payload)
            for kind in kinds
            for parent in generation
            for child, payload in store.children(parent, kind)
            if child not in met
        ]
        met |= {d.key for d in found}
        yield from sorted(found, key=lambda d: (kinds.index(d.kind), d.payload.get("vote", 0)))
        generation = [d.key for d in found]


def _labels(files: Sequence[Path], solution_key: str) -> Iterator[Payload]:
    for path in files:
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                if (
                    solution_key in line
                    and (label := json.loads(line))["solution"]["key"] == solution_key
                ):
                    yield label


def _prompts(made_by: Payload) -> tuple[PromptSet | None, list[str]]:
    """The prompt set that was recorded, as it is today, and a note when it has changed since."""
    recorded = str(made_by.get("stage1.prompt_set", ""))
    if not recorded:
        return None, [
            "no fingerprint.json beside the store: prompts, models and sampling are not known"
        ]
    name = recorded.rsplit("-g", 1)[0]
    try:
        prompts = prompt_set(name)
    except ValueError:
        return None, [f"the prompts were those of {recorded}, which this version does not have"]
    if prompts.version != recorded:
        return prompts, [
            f"the prompts were sent in the words of {recorded}; shown are today's, {prompts.version}"
        ]
    return prompts, []
