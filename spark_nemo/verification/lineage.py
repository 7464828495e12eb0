"""Lineage of a training example: votes, verifications, solution, problem, prompts and models."""

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
    """A record made from the solution, directly or through others; ``parent`` is its source."""

    kind: str
    key: str
    parent: str
    payload: Payload


@dataclass(frozen=True, slots=True)
class Lineage:
    """Sources of one solution and its labels; ``labels`` are rows of labels.jsonl by method."""

    requested: tuple[str, str]
    """Kind and key of the record that the user named."""
    solution: Solution
    labels: Sequence[Payload]
    descendants: Sequence[Descendant]
    """Verifications first, in the order of their votes; then the records made from them."""
    fingerprint: Payload
    solve_prompt: ChatMessages | None
    verify_prompt: ChatMessages | None
    notes: Sequence[str]
    """Parts that were not found, or may differ from what was sent."""


def find_record(store: RecordStore, name: str) -> tuple[str, str]:
    """Kind and key of the only record whose key is ``name`` or begins with it.

    Raises ``ConfigError`` if there is none, or more than one, naming the first few.
    """
    matches = [
        (kind, key)
        for kind in store.kinds()
        for key in store.keys_with_prefix(kind, name, _SHOWN_MATCHES + 1)
    ]
    exact = [match for match in matches if match[1] == name]
    matches = exact or matches
    if not matches:
        raise ConfigError(f"{name}: no record of {store.folder} has a key that begins with this")
    if len(matches) > 1:
        shown = ", ".join(f"{kind} {key}" for kind, key in matches[:_SHOWN_MATCHES])
        more = ", ..." if len(matches) > _SHOWN_MATCHES else ""
        raise ConfigError(
            f"{name}: several records have keys that begin with this: {shown}{more}; write more of it"
        )
    return matches[0]


def trace(
    store: RecordStore, name: str, label_files: Sequence[Path], fingerprint: Payload
) -> Lineage:
    """Lineage of a solution, a verification, a record made from them, or a label.

    ``name`` is a key, the beginning of one, or ``method:key`` for a label, which has the key of its
    solution; labels of other methods are then left out. Raises ``ConfigError`` if it does not name
    exactly one record, or if the solution is missing.
    """
    method, _, key_part = name.rpartition(":")
    requested = find_record(store, key_part)
    solution_key = _solution_of(store, *requested)
    row = store.get(solution_key, SOLUTION)
    if row is None:
        raise ConfigError(
            f"{requested[0]} {requested[1]}: its solution {solution_key} is not in {store.folder}"
        )
    solution = Solution.from_json(row)
    labels = [
        label for label in _labels(label_files, solution_key) if method in ("", label["method"])
    ]
    if method and not labels:
        raise ConfigError(f"{name}: no label of this method for solution {solution_key}")
    prompts, notes = _prompts(fingerprint)
    parsed = parse_solution(solution)
    solve_prompt = prompts.solve(solution.question) if prompts is not None else None
    verify_prompt = None
    if not isinstance(parsed, ParsedResponse):
        notes.append(f"the solution was never verified: {parsed.reason}")
    elif prompts is not None:
        verify_prompt = prompts.verify(
            solution.question, canonical_solution(parsed), len(parsed.steps)
        )
    return Lineage(
        requested=requested,
        solution=solution,
        labels=labels,
        descendants=list(_descendants(store, solution_key)),
        fingerprint=fingerprint,
        solve_prompt=solve_prompt,
        verify_prompt=verify_prompt,
        notes=notes,
    )


def chosen_verification(label: Payload, descendants: Sequence[Descendant]) -> Descendant | None:
    """The verification that a label was made from, by the key or else the vote in its evidence."""
    evidence = label["evidence"]
    if key := evidence.get("chosen_key"):
        return next((d for d in descendants if d.key == key), None)
    chosen = evidence.get("chosen_vote")
    return next(
        (d for d in descendants if d.kind == VERIFICATION and d.payload.get("vote") == chosen), None
    )


def _solution_of(store: RecordStore, kind: str, key: str) -> str:
    """Key of the solution above a record; the last key found if the chain is broken."""
    met = {key}
    while kind != SOLUTION:
        parent = store.parent(key, kind)
        if parent is None:
            raise ConfigError(f"{kind} {key}: names no parent, so its solution is not known")
        kinds = [name for name in store.kinds() if store.location(parent, name)]
        if not kinds or parent in met:
            return parent
        met.add(parent)
        key, kind = parent, kinds[0]
    return key


def _descendants(store: RecordStore, key: str) -> Iterator[Descendant]:
    """Yield children by kind (verifications first), each generation before the next."""
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
                # A substring test first: parsing every line of a large file takes minutes.
                if solution_key not in line:
                    continue
                label = json.loads(line)
                if label["solution"]["key"] == solution_key:
                    yield label


def _prompts(fingerprint: Payload) -> tuple[PromptSet | None, list[str]]:
    """The recorded prompt set as it is today, and a note if it has changed since."""
    recorded = str(fingerprint.get("stage1.prompt_set", ""))
    if not recorded:
        return None, [
            "no fingerprint.json next to the store: prompts, models and sampling are not known"
        ]
    name = recorded.rsplit("-g", 1)[0]
    try:
        prompts = prompt_set(name)
    except ValueError:
        return None, [f"the prompts were {recorded}, which this version does not have"]
    if prompts.version != recorded:
        return prompts, [
            f"the prompts were sent in the words of {recorded}; shown are today's, {prompts.version}"
        ]
    return prompts, []
