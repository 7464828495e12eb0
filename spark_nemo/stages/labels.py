"""One method's labels from the stage I store: labelled, filtered, balanced, and written down for
whoever wants to read.

Answers are read here for the two declared baselines and for nothing else: balancing by ground truth
gets them as a closure, and the verifications of ``reference_guided``, made with answers in their
prompts, are read for that method alone.
"""

from __future__ import annotations

import json
import logging

from spark_nemo.config import REFERENCE_GUIDED, REVISED_METHODS, ConfigError, SparkConfig
from spark_nemo.evaluation.answers import answer_matches, read_answer_keys
from spark_nemo.grammar import ParsedResponse
from spark_nemo.records import LabelledSolution
from spark_nemo.records.store import RecordStore
from spark_nemo.run.run_folder import stage1_folder, stage2_folder
from spark_nemo.utils.files import write_json_atomic, write_text_atomic
from spark_nemo.verification import LabelOptions, Selection, select_labels
from spark_nemo.verification.label_filter import IsCorrect
from spark_nemo.verification.sampler import parse_solution
from spark_nemo.verification.store_reader import label_collected

log = logging.getLogger(__name__)


def make_labels(config: SparkConfig) -> list[LabelledSolution]:
    """The labels that ``stage2.method`` trains on. Writes ``labels.jsonl`` and, with all counts,
    ``labels.json``.

    Raises ``ConfigError`` when there is no store, or when not one label is left, with what would
    help.
    """
    method, folder = (
        config.stage2.method,
        stage2_folder(config.run, config.stage2.method, config.stage2.variant),
    )
    labelled, dropped = _label(config)
    log.info("%s: %d labelled, dropped %s", method, len(labelled), dropped or "none")
    if not labelled:
        raise ConfigError(
            f"stage2.method={method}: no solution could be labelled (dropped: {dropped})"
            + _remedy(config, dropped)
        )
    selected = select_labels(
        labelled, Selection.of(config.labels, _correctness(config)), config.run.seed
    )
    log.info(
        "%s: %d labels kept, removed %s", method, len(selected.kept), selected.removed or "none"
    )
    if not selected.kept:
        raise ConfigError(
            f"stage2.method={method}: the filters removed all {len(labelled)} labels ("
            f"{selected.removed}): loosen them, for example with labels.balance=none"
        )
    rows = (json.dumps(label.to_json()) + "\n" for label in selected.kept)
    write_text_atomic(folder / "labels.jsonl", "".join(rows))
    write_json_atomic(
        folder / "labels.json",
        {
            "labelled": len(labelled),
            "dropped": dropped,
            "removed": selected.removed,
            "kept": len(selected.kept),
            "reads_answer_keys": method == REFERENCE_GUIDED
            or config.labels.balance == "ground_truth",
        },
    )
    return selected.kept


def _label(config: SparkConfig) -> tuple[list[LabelledSolution], dict[str, int]]:
    store_folder = stage1_folder(config.run) / "store"
    if not store_folder.is_dir():
        raise ConfigError(
            f"run.dir={config.run.dir}: no stage1/store there; run `spark-nemo stage1` first"
        )
    with RecordStore(store_folder) as store:
        return label_collected(
            config.stage2.method, store, config.run.seed, LabelOptions.of(config.labels)
        )


def _remedy(config: SparkConfig, dropped: dict[str, int]) -> str:
    method = config.stage2.method
    if method in REVISED_METHODS and "critique_missing" in dropped:
        return (
            f": the store has no critique for it; run `spark-nemo stage1` with stage1.meta_critique="
            f"[{REVISED_METHODS[method]}] in this run.dir, what is there stays"
        )
    if method == REFERENCE_GUIDED and dropped.keys() <= {"no_votes", "vote_0_missing"}:
        return (
            ": the store has no verification that saw the answer; run `spark-nemo stage1` with "
            "stage1.reference_answers in this run.dir, what is there stays"
        )
    return ""


def _correctness(config: SparkConfig) -> IsCorrect | None:
    """Balancing by ground truth: is the final answer of a labelled solution right? None with any
    other balancing.
    """
    path = config.labels.reference_answers
    if path is None:
        return None
    log.warning(
        "labels.balance=ground_truth: a declared baseline, labels are chosen with the answers of %s",
        path,
    )
    keys = read_answer_keys(path)

    def correct(label: LabelledSolution) -> bool:
        problem_id, parsed = label.solution.problem_id, parse_solution(label.solution)
        if problem_id not in keys:
            raise ConfigError(
                f"labels.reference_answers={path}: no answer for problem {problem_id}"
            )
        return isinstance(parsed, ParsedResponse) and answer_matches(
            parsed.answer, keys[problem_id].answer
        )

    return correct
