"""Replay votes to measure the tokens that early stopping saves::

    python benchmarks/early_stop.py runs/full [--run exact=runs/a ...]

``runs/full`` is a run folder whose stage I took every vote::

    spark-nemo stage1 +experiment=toy run.dir=runs/full

Its votes are replayed in their order under every rule and vote batch size. The table compares the
tokens of the votes that would have been sampled with the tokens of all votes, and their majorities
with the majorities of all N votes (a tie is a result of its own). Tokens are completion tokens; the
votes of a solution share its prompt. The last column may be below 100 % unless the rule waits for
the verdict too (``+ verdict``).

``--run exact=runs/a`` compares a real run with ``stage1.early_stop=exact`` (likewise
``sequential``, whose ``--error`` must be the run's) with the replay: its store must contain
exactly the same votes.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from spark_nemo.records import VERIFICATION, Outcome, count_votes, majority, outcome_from_json
from spark_nemo.records.store import RecordStore
from spark_nemo.verification.early_stop import (
    StoppingRule,
    settled_exactly,
    settled_probably,
    votes_taken,
)


class Vote(NamedTuple):
    """One stored verification."""

    outcome: Outcome
    num_tokens: int


Votes = dict[str, list[Vote]]
"""Votes of each solution, by its key, in vote order."""


def read_votes(run_dir: Path) -> Votes:
    """Return every solution's votes in a run folder."""
    rows: dict[str, dict[int, Vote]] = {}
    with RecordStore(run_dir / "stage1/store") as store:
        for _, row in store.iter(VERIFICATION):
            vote = Vote(outcome_from_json(row["outcome"]), row["num_tokens"])
            rows.setdefault(row["solution_key"], {})[row["vote"]] = vote
    for key, by_number in rows.items():
        if sorted(by_number) != list(range(len(by_number))):
            raise SystemExit(
                f"{run_dir}: solution {key} has votes {sorted(by_number)}, some before them are missing"
            )
    return {
        key: [by_number[vote] for vote in range(len(by_number))] for key, by_number in rows.items()
    }


def report(rule: StoppingRule, label: str, votes: Votes) -> None:
    """Print one line of the table."""
    kept_tokens = equal_solutions = equal_steps = steps = equal_verdicts = solutions = 0
    for all_votes in votes.values():
        outcomes = [vote.outcome for vote in all_votes]
        taken = votes_taken(rule, outcomes)
        kept_tokens += sum(vote.num_tokens for vote in all_votes[:taken])
        wanted, wanted_verdict = majorities(outcomes)
        got, got_verdict = majorities(outcomes[:taken])
        solutions += 1
        steps += len(wanted)
        equal_steps += sum(a == b for a, b in zip(got, wanted))
        equal_solutions += got == wanted
        equal_verdicts += got_verdict == wanted_verdict
    saved = 1 - kept_tokens / sum(
        vote.num_tokens for all_votes in votes.values() for vote in all_votes
    )
    print(
        f"{label:<32}{rule.vote_batch_size:>5}{saved:>10.1%}{equal_solutions / solutions:>13.2%}"
        f"{equal_steps / steps:>10.2%}{equal_verdicts / solutions:>11.2%}"
    )


def majorities(outcomes: Sequence[Outcome]) -> tuple[list[bool | None], bool | None]:
    """Majority of each step, and of the final verdict; None is a tie."""
    count = count_votes(outcomes)
    steps = [majority(votes, count.num_votes) for votes in count.correct_votes]
    return steps, majority(count.yes_votes, count.num_votes)


def check_run(rule: StoppingRule, name: str, full: Votes, stopped: Votes) -> bool:
    """True if a real run took exactly the votes that the replay takes."""
    wanted = {
        key: votes[: votes_taken(rule, [vote.outcome for vote in votes])]
        for key, votes in full.items()
    }
    differ = sum(wanted.get(key) != stopped.get(key) for key in wanted.keys() | stopped.keys())
    before, after = (
        sum(vote.num_tokens for votes in run.values() for vote in votes) for run in (full, stopped)
    )
    print(
        f"real run, {name}: {sum(map(len, stopped.values()))} votes, {1 - after / before:.1%} of the tokens saved, "
        f"{differ} of {len(wanted)} solutions differ from the replay"
    )
    return differ == 0


def main() -> int:
    """Print the table; 1 when the exact rule changed a majority or a real run differs from the
    replay.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "run_dir", type=Path, nargs="+", help="run folders with every vote; several are pooled"
    )
    parser.add_argument(
        "--run", action="append", default=[], metavar="RULE=RUN_DIR", help="a real run of the first"
    )
    parser.add_argument(
        "--error", type=float, default=0.05, help="stage1.early_stop_error of the --run sequential="
    )
    arguments = parser.parse_args()
    each = [read_votes(folder) for folder in arguments.run_dir]
    pooled = {
        f"{index} {key}": votes for index, run in enumerate(each) for key, votes in run.items()
    }
    num_votes = max(map(len, pooled.values()))
    if any(len(votes) != num_votes for votes in pooled.values()):
        raise SystemExit(
            f"not every solution has {num_votes} votes: a run with stage1.early_stop=none is needed"
        )
    print(f"{len(pooled)} solutions, N = {num_votes}\n")
    print(
        f"{'rule':<32}{'wave':>5}{'saved':>10}{'solutions =':>13}{'steps =':>10}{'verdict =':>11}"
    )
    for with_verdict in (False, True):
        for error in (None, 0.01, 0.02, 0.03, 0.05, 0.1):
            name = "exact" if error is None else f"sequential, error {error}"
            is_settled = settled_exactly
            if error is not None:
                is_settled = partial(settled_probably, error=error)
            for vote_batch_size in (1, 2, 4):
                rule = StoppingRule(num_votes, is_settled, vote_batch_size, with_verdict)
                report(rule, name + (" + verdict" if with_verdict else ""), pooled)
    same = True
    for name, _, folder in (argument.partition("=") for argument in arguments.run):
        is_settled = settled_exactly
        if name == "sequential":
            is_settled = partial(settled_probably, error=arguments.error)
        rule = StoppingRule(num_votes, is_settled)
        same &= check_run(rule, name, each[0], read_votes(Path(folder)))
    exact = StoppingRule(num_votes)
    for votes in pooled.values():
        outcomes = [vote.outcome for vote in votes]
        same &= majorities(outcomes)[0] == majorities(outcomes[: votes_taken(exact, outcomes)])[0]
    return 0 if same else 1


if __name__ == "__main__":
    raise SystemExit(main())
