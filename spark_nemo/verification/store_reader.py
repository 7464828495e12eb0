"""Results of stage I, read from the store one solution at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from spark_nemo.config import REFERENCE_GUIDED, REVISED_METHODS, LabelsConfig
from spark_nemo.grammar import ParsedResponse
from spark_nemo.records import SOLUTION, VERIFICATION, LabelledSolution, Solution, Verification
from spark_nemo.records.store import RecordStore

from .labelling import label_all
from .meta_critique import stored_meta_critiques
from .reference import stored_reference_verifications
from .sampler import parse_solution
from .vote_choice import LabelInputs


def stream_solutions(store: RecordStore) -> Iterator[tuple[Solution, list[Verification]]]:
    """Yield usable solutions in the order of their keys, each with its verifications.

    Memory holds one solution and its verifications.
    """
    for key, row in store.iter(SOLUTION, by_key=True):
        solution = Solution.from_json(row)
        if isinstance(parse_solution(solution), ParsedResponse):
            rows = store.children(key, VERIFICATION)
            yield solution, [Verification.from_json(row) for _, row in rows]


def stream_label_inputs(
    method: str, store: RecordStore, seed: int, labels: LabelsConfig | None = None
) -> Iterator[LabelInputs]:
    """Yield what a label method reads, by usable solution.

    Only ``reference_guided`` gets the verifications that saw the answer, and it gets no others.
    """
    labels = labels or LabelsConfig()
    for solution, votes in stream_solutions(store):
        if method == REFERENCE_GUIDED:
            reference_votes = stored_reference_verifications(store, solution.key)
            yield LabelInputs(solution, reference_votes, seed, labels)
        elif method in REVISED_METHODS:
            meta_critiques = stored_meta_critiques(store, solution.key)
            yield LabelInputs(solution, votes, seed, labels, meta_critiques)
        else:
            yield LabelInputs(solution, votes, seed, labels)


def label_store(
    method: str, store: RecordStore, seed: int, labels: LabelsConfig | None = None
) -> tuple[list[LabelledSolution], dict[str, int]]:
    """``label_all`` of a store's usable solutions, in the order of their keys, read one by one.

    Raises ``ValueError`` where ``label_all`` does.
    """
    labelled: list[LabelledSolution] = []
    dropped: Counter[str] = Counter()
    for inputs in stream_label_inputs(method, store, seed, labels):
        label, reasons = label_all(
            method,
            [inputs.solution],
            inputs.verifications,
            seed,
            inputs.labels,
            inputs.meta_critiques,
        )
        labelled += label
        dropped.update(reasons)
    return labelled, dict(dropped)
