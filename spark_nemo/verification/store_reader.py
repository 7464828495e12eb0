"""What stage I collected, read back one solution at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from spark_nemo.config import REFERENCE_GUIDED, REVISED_METHODS
from spark_nemo.grammar import ParsedResponse
from spark_nemo.records import LabelledSolution, Revision, Solution, Verification
from spark_nemo.records.store import RecordStore

from .labelling import label_all
from .meta_critique import revisions_of
from .reference import reference_verifications_of
from .sampler import SOLUTION, VERIFICATION, parse_solution
from .vote_choice import DEFAULT_OPTIONS, LabelOptions


def stream_collected(store: RecordStore) -> Iterator[tuple[Solution, list[Verification]]]:
    """Usable solutions in the order of their keys, each with its verifications in the order of
    theirs.

    Memory holds one solution and its verifications, however many the store has.
    """
    adopt_verifications(store)
    for key, row in store.iter(SOLUTION, by_key=True):
        solution = Solution.from_json(row)
        if isinstance(parse_solution(solution), ParsedResponse):
            yield (
                solution,
                [Verification.from_json(vote) for _, vote in store.children(key, VERIFICATION)],
            )


def read_collected(store: RecordStore) -> tuple[list[Solution], list[Verification]]:
    """``stream_collected`` as two lists, for stores that fit into memory."""
    solutions: list[Solution] = []
    verifications: list[Verification] = []
    for solution, votes in stream_collected(store):
        solutions.append(solution)
        verifications += votes
    return solutions, verifications


def stream_for(
    method: str,
    store: RecordStore,
) -> Iterator[tuple[Solution, Sequence[Verification], dict[str, Revision]]]:
    """What a label method reads: usable solutions, each with its verifications and, where it needs
    them, revisions.

    Only ``reference_guided`` gets the verifications that saw the answer, and it gets no others.
    """
    for solution, votes in stream_collected(store):
        if method == REFERENCE_GUIDED:
            yield solution, reference_verifications_of(store, solution.key), {}
        else:
            yield (
                solution,
                votes,
                revisions_of(store, solution.key) if method in REVISED_METHODS else {},
            )


def label_collected(
    method: str,
    store: RecordStore,
    seed: int,
    options: LabelOptions = DEFAULT_OPTIONS,
) -> tuple[list[LabelledSolution], dict[str, int]]:
    """``label_all`` of a store's usable solutions, in the order of their keys, read one by one.

    Of the dropped only the numbers are kept. Raises ``ValueError`` where ``label_all`` does.
    """
    labelled: list[LabelledSolution] = []
    dropped: Counter[str] = Counter()
    for solution, votes, revisions in stream_for(method, store):
        label, reasons = label_all(method, [solution], votes, seed, options, revisions)
        labelled += label
        dropped.update(reasons)
    return labelled, dict(dropped)


def adopt_verifications(store: RecordStore) -> None:
    """Stores made before records could name a parent: a verification's solution is in its payload."""
    store.adopt(VERIFICATION, lambda payload: str(payload["solution_key"]))
