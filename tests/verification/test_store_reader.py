"""Reading the store of stage I back, solution by solution."""

import tracemalloc

from spark_nemo.records import ParseFailure, Solution, Verdict, Verification
from spark_nemo.records.store import RecordStore
from spark_nemo.verification.labelling import label_all
from spark_nemo.verification.store_reader import label_store, stream_solutions

TEXT = "Step 1: 1+1=2\nAnswer: 2"


def write(folder, solutions=4, votes=3, text=TEXT):
    """Solutions and votes in the order in which an engine might finish them."""
    with RecordStore(folder, "w", fsync_every=1000) as store:
        for vote in reversed(range(votes)):
            for number in reversed(range(solutions)):
                key = f"s{number}"
                solution = Solution(key, "p", "1+1?", text, "length" if number == 3 else "stop", 9)
                fields = {name: getattr(solution, name) for name in solution.__slots__}
                store.append(key, "solution", fields)
                outcome = ParseFailure("x") if vote == 2 else Verdict((vote == 0,), vote == 0)
                record = Verification(f"v{number}{vote}", key, vote, text, outcome, 5)
                store.append(record.key, "verification", record.to_json(), parent=key)


def test_solutions_come_with_their_verifications_in_key_order(tmp_path):
    """A truncated solution is left out, with its votes."""
    write(tmp_path)
    with RecordStore(tmp_path) as store:
        groups = list(stream_solutions(store))
    assert [solution.key for solution, _ in groups] == ["s0", "s1", "s2"]
    assert [[v.key for v in votes] for _, votes in groups] == [
        [f"v{n}{vote}" for vote in range(3)] for n in range(3)
    ]
    assert groups[0][1][1].outcome == Verdict((False,), False)


def test_labels_of_the_stream_are_those_of_the_lists(tmp_path):
    """Streaming changes no label and no count of the dropped."""
    write(tmp_path)
    with RecordStore(tmp_path) as store:
        groups = list(stream_solutions(store))
        solutions = [solution for solution, _ in groups]
        verifications = [vote for _, votes in groups for vote in votes]
        for method in ("single", "step_consistency"):
            assert label_store(method, store, 0) == label_all(method, solutions, verifications, 0)


def test_memory_holds_one_solution_at_a_time(tmp_path):
    """Streaming 2,000 solutions takes a tenth of the memory that their records would: a page of
    places, one solution.

    Python's memory; SQLite's own cache is bounded by ``records.index`` and measured in the store's
    tests.
    """
    write(tmp_path, 2000, text=TEXT.replace("1+1", "1+1 " * 300))
    size = sum(path.stat().st_size for path in tmp_path.glob("*.records"))
    with RecordStore(tmp_path) as store:
        tracemalloc.start()
        try:
            assert sum(len(votes) for _, votes in stream_solutions(store)) > 2 * 2000
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert peak < size / 10, (peak, size)
