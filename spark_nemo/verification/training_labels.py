"""Labels of stage II: label the solutions of the stage I store, filter and balance, write the files.

Answer keys are read only for balancing by ground truth, a declared baseline, and arrive as a function
(``answer_key_baselines``). Verifications that saw an answer are read for ``reference_guided`` alone.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

from spark_nemo.config import REFERENCE_GUIDED, REVISED_METHODS, ConfigError, SparkConfig
from spark_nemo.grammar import (
    ChatMessages,
    ParsedResponse,
    PromptSet,
    StepFormat,
    Variant,
    canonical_solution,
    parse_judgements,
    render_target,
    split_response,
)
from spark_nemo.grammar.verification import ParsedVerification
from spark_nemo.records import LabelledSolution
from spark_nemo.records.store import RecordStore
from spark_nemo.utils.files import write_json_atomic, write_text_atomic

from .answer_key_baselines import ground_truth_check
from .label_filter import LabelFilter, filter_labels
from .store_reader import label_store

log = logging.getLogger(__name__)


def make_labels(
    config: SparkConfig, store_folder: Path, output_folder: Path
) -> list[LabelledSolution]:
    """Labels of ``stage2.method``, also written to ``labels.jsonl``; all counts to ``labels.json``.

    Raises ``ConfigError`` without a store or without any label, naming a setting that would help.
    """
    method = config.stage2.method
    labelled, dropped = _label(config, store_folder)
    log.info("%s: %d labelled, dropped %s", method, len(labelled), dropped or "none")
    if not labelled:
        raise ConfigError(
            f"stage2.method={method}: no solution could be labelled (dropped: {dropped})"
            + _remedy(method, dropped)
        )
    answers = config.labels.reference_answers
    is_correct = ground_truth_check(answers) if answers is not None else None
    rules = LabelFilter.from_config(config.labels, is_correct)
    selected = filter_labels(labelled, rules, config.run.seed)
    log.info(
        "%s: %d labels kept, removed %s", method, len(selected.kept), selected.removed or "none"
    )
    if not selected.kept:
        raise ConfigError(
            f"stage2.method={method}: the filters removed all {len(labelled)} labels "
            f"({selected.removed}); loosen them, for example with labels.balance=none"
        )
    rows = (json.dumps(label.to_json()) + "\n" for label in selected.kept)
    write_text_atomic(output_folder / "labels.jsonl", "".join(rows))
    reads_answer_keys = method == REFERENCE_GUIDED or config.labels.balance == "ground_truth"
    write_json_atomic(
        output_folder / "labels.json",
        {
            "labelled": len(labelled),
            "dropped": dropped,
            "removed": selected.removed,
            "kept": len(selected.kept),
            "reads_answer_keys": reads_answer_keys,
        },
    )
    return selected.kept


def sft_example(
    label: LabelledSolution, prompts: PromptSet, variant: Variant
) -> tuple[ChatMessages, str]:
    """Prompt and target text that a reward model of this variant is trained on for one label.

    Raises ``ValueError`` if the stored texts are not in the grammar; such solutions get no label.
    """
    parsed = split_response(label.solution.text, StepFormat.PLAIN)
    judged = parse_judgements(label.target_text, len(label.step_labels))
    if not isinstance(parsed, ParsedResponse) or not isinstance(judged, ParsedVerification):
        raise ValueError(
            f"solution {label.solution.key}: solution or chosen verification is not in the grammar"
        )
    messages = prompts.reward(variant, label.solution.question, canonical_solution(parsed))
    return messages, render_target(variant, judged.judgements, judged.answer_correct)


def _label(
    config: SparkConfig, store_folder: Path
) -> tuple[list[LabelledSolution], dict[str, int]]:
    if not store_folder.is_dir():
        raise ConfigError(
            f"run.dir={config.run.dir}: {store_folder} does not exist; "
            "run `spark-nemo stage1` first"
        )
    with RecordStore(store_folder) as store:
        return label_store(config.stage2.method, store, config.run.seed, config.labels)


def _remedy(method: str, dropped: dict[str, int]) -> str:
    """Hint for a run in which nothing was labelled because stage I did not sample what it needs."""
    if method in REVISED_METHODS and "critique_missing" in dropped:
        return (
            "; the store has no critiques for it: run `spark-nemo stage1` with "
            f"stage1.meta_critique=[{REVISED_METHODS[method]}] in this run.dir, stored results are reused"
        )
    if method == REFERENCE_GUIDED and dropped.keys() <= {"no_votes", "vote_0_missing"}:
        return (
            "; the store has no verifications that saw the answer: run `spark-nemo stage1` with "
            "stage1.reference_answers in this run.dir, stored results are reused"
        )
    return ""
