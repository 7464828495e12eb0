"""Score a run's labels against the true step labels: accuracy, share kept and cost by method."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from spark_nemo.config import SparkConfig
from spark_nemo.config.designs import variant_suffix
from spark_nemo.config.reward import VARIANTS
from spark_nemo.evaluation import label_quality
from spark_nemo.evaluation.bootstrap import Estimate
from spark_nemo.grammar import ParsedResponse
from spark_nemo.records import Solution
from spark_nemo.records.store import RecordStore
from spark_nemo.verification.labelling import method_tokens
from spark_nemo.verification.sampler import parse_solution
from spark_nemo.verification.store_reader import label_store, stream_label_inputs

from .summary import Figure, LabelScores

Oracle = Callable[[str, Sequence[str]], tuple[bool, ...]]
"""``oracle(question, steps)``: whether each step is truly correct; only the toy task has one."""


def label_scores(folder: Path, config: SparkConfig, oracle: Oracle) -> dict[str, LabelScores]:
    """Score every method of ``pipeline.label_methods`` before stage II's filters."""
    with RecordStore(folder / "stage1/store") as store:
        return {
            method: _scores(method, store, config, oracle, _removed(folder, method))
            for method in config.pipeline.label_methods
        }


def _scores(
    method: str,
    store: RecordStore,
    config: SparkConfig,
    oracle: Oracle,
    removed: dict[str, int],
) -> LabelScores:
    seed = config.run.seed
    truths = {}
    tokens = 0
    for inputs in stream_label_inputs(method, store, seed, config.labels):
        solution = inputs.solution
        truths[solution.key] = oracle(solution.question, _steps(solution))
        tokens += method_tokens(method, inputs)
    labelled, dropped = label_store(method, store, seed, config.labels)
    quality = label_quality(labelled, truths)
    return LabelScores(
        share_kept=quality.share_kept,
        step_accuracy=figure(quality.step_accuracy),
        first_error_accuracy=figure(quality.first_error_accuracy),
        dropped=dropped,
        removed=removed,
        tokens_per_solution=tokens / len(truths),
        tokens_per_label=tokens / len(labelled) if labelled else None,
    )


def _steps(solution: Solution) -> tuple[str, ...]:
    parsed = parse_solution(solution)
    assert isinstance(parsed, ParsedResponse)
    return parsed.step_texts


def _removed(folder: Path, method: str) -> dict[str, int]:
    """Return the number of labels that stage II's filters removed, by rule."""
    # Reward models of all kinds have the same labels.
    for variant in VARIANTS:
        path = folder / "stage2" / f"{method}{variant_suffix(variant)}" / "labels.json"
        if path.exists():
            return json.loads(path.read_text())["removed"]
    return {}


def figure(estimate: Estimate | None) -> Figure | None:
    """Convert an estimate to the summary's type."""
    return Figure(**estimate._asdict()) if estimate is not None else None
