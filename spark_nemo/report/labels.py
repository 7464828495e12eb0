"""Label quality of a run's store against the hidden truth, by method: how right, how many kept, how many tokens."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from spark_nemo.config import REFERENCE_GUIDED, REVISED_METHODS, SparkConfig
from spark_nemo.evaluation import label_quality
from spark_nemo.evaluation.bootstrap import Estimate
from spark_nemo.grammar import ParsedResponse
from spark_nemo.records import Solution, Verification
from spark_nemo.records.store import RecordStore
from spark_nemo.verification import NO_REVISIONS, LabelOptions, label_all
from spark_nemo.verification.collect import parse_solution, read_collected
from spark_nemo.verification.cost import method_tokens
from spark_nemo.verification.reference import iter_reference_verifications
from spark_nemo.verification.revise import StoredRevisions

from .model import Figure, LabelScores

Oracle = Callable[[str, Sequence[str]], tuple[bool, ...]]
"""``oracle(question, steps)``: which steps are truly right. Only worlds made by a program have one."""


def label_scores(folder: Path, config: SparkConfig, oracle: Oracle) -> dict[str, LabelScores]:
    """Scores of every method of ``pipeline.label_methods`` before filters, and what stage II's filters removed."""
    scores = {}
    with RecordStore(folder / "stage1/store") as store:
        solutions, votes = read_collected(store)
        truths = {solution.key: oracle(solution.question, _steps(solution)) for solution in solutions}
        for method in config.pipeline.label_methods:
            revisions = StoredRevisions(store) if method in REVISED_METHODS else NO_REVISIONS
            read = votes
            if method == REFERENCE_GUIDED:
                read = [v for v in iter_reference_verifications(store) if v.solution_key in truths]
            scores[method] = _scores(method, solutions, read, truths, config, revisions, _removed(folder, method))
    return scores


def _scores(
    method: str, solutions: list[Solution], votes: list[Verification], truths: dict[str, tuple[bool, ...]],
    config: SparkConfig, revisions: StoredRevisions, removed: dict[str, int],
) -> LabelScores:
    options, seed = LabelOptions.of(config.labels), config.run.seed
    labelled, dropped = label_all(method, solutions, votes, seed, options, revisions)
    by_solution: dict[str, list[Verification]] = {solution.key: [] for solution in solutions}
    for vote in votes:
        by_solution[vote.solution_key].append(vote)
    tokens = sum(method_tokens(method, s, by_solution[s.key], seed, options, revisions) for s in solutions)
    quality = label_quality(labelled, truths)
    return LabelScores(
        quality.share_kept, figure(quality.step_accuracy), figure(quality.first_error_accuracy), dropped, removed,
        tokens_per_solution=tokens / len(solutions), tokens_per_label=tokens / len(labelled) if labelled else None)


def _steps(solution: Solution) -> tuple[str, ...]:
    parsed = parse_solution(solution)
    assert isinstance(parsed, ParsedResponse)
    return parsed.step_texts


def _removed(folder: Path, method: str) -> dict[str, int]:
    """What stage II's filters removed; nothing where it has not run, or ran before there were any."""
    path = folder / "stage2" / method / "labels.json"
    return json.loads(path.read_text()).get("removed", {}) if path.exists() else {}


def figure(estimate: Estimate | None) -> Figure | None:
    """For the summary."""
    return Figure(**estimate._asdict()) if estimate is not None else None
