"""Stage II: the generative reward model.

In: the store of stage I and a base model. One method labels the solutions, the base is fine-tuned
on the labels, and the result is scored on ProcessBench-format cases: a PRM or PRM-CoT by F1, an ORM,
which names no step, by its verdicts. Out: ``model/`` and its score.
"""

from __future__ import annotations

import logging
from pathlib import Path

from spark_nemo.config import ConfigError, SparkConfig
from spark_nemo.engines.tokenizer import Tokenizer
from spark_nemo.evaluation.reward_model_scores import score_orm, score_prm
from spark_nemo.grammar import Variant, prompt_set
from spark_nemo.planning.memory_check import check_memory
from spark_nemo.planning.preflight import check_stage2
from spark_nemo.records import LabelledSolution
from spark_nemo.run.completion import fingerprint_before_work, record_fingerprint
from spark_nemo.run.run_folder import (
    PROCESSBENCH,
    WHOLE_SOLUTION,
    Clock,
    mark_done,
    stage1_folder,
    stage2_folder,
)
from spark_nemo.run.run_lock import run_lock
from spark_nemo.training.fine_tuning import fine_tune
from spark_nemo.training.packing import TrainSequence, drop_longer_than
from spark_nemo.verification.training_labels import make_labels, sft_example

log = logging.getLogger(__name__)


def run_stage2(config: SparkConfig) -> bool:
    """Label, fine-tune, export, score. Returns False if stopped early; run again to resume.

    Collective over the trainer ranks. Raises ``ConfigError`` before any work, on bad input or while
    another process runs this stage.
    """
    check_stage2(config)
    check_memory(config, "stage2")
    folder = stage2_folder(config.run, config.stage2.method, config.stage2.variant)
    fingerprint = fingerprint_before_work(config, "stage2")
    with run_lock(folder):
        finished = _train(config, folder)
        if finished:
            record_fingerprint(folder, fingerprint)
        return finished


def _train(config: SparkConfig, folder: Path) -> bool:
    stage = config.stage2
    base = Path(config.models.reward_base)
    labelled = make_labels(config, stage1_folder(config.run) / "store", folder)
    sequences = _sequences(config, labelled, Tokenizer.load(base))
    clock = Clock(folder)
    worker, result = fine_tune(
        base, sequences, stage, config.megatron, seed=config.run.seed, run_folder=folder
    )
    if worker.is_main:
        clock.save()
    if not result.finished:
        return False
    worker.save_hf(folder / "model", source_dir=base)
    if worker.is_main:
        scored = _scored(folder, config)
        clock.save()
        mark_done(
            folder,
            {
                **scored,
                "variant": stage.variant,
                "seconds": clock.seconds,
                "examples": len(sequences),
                "tokens": sum(s.num_positions for s in sequences) * stage.epochs,
            },
        )
    return True


def _scored(folder: Path, config: SparkConfig) -> dict[str, float]:
    """Score of the trained model, by its name."""
    if config.stage2.variant == Variant.ORM:
        whole = score_orm(folder / "model", config, folder / WHOLE_SOLUTION)
        return {"verdict_harmonic_mean": whole.verdict_harmonic_mean}
    return {"f1": score_prm(folder / "model", config, folder / PROCESSBENCH).f1}


def _sequences(
    config: SparkConfig, labelled: list[LabelledSolution], tokenizer: Tokenizer
) -> list[TrainSequence]:
    """Tokenised training examples; overlong ones are dropped."""
    prompts = prompt_set(config.stage1.prompt_set)
    variant = Variant(config.stage2.variant)
    sequences = []
    for label in labelled:
        messages, target = sft_example(label, prompts, variant)
        response = (*tokenizer.encode(target), tokenizer.eos_ids[0])
        sequences.append(TrainSequence(tokenizer.encode_chat(messages), response))
    kept, num_dropped = drop_longer_than(sequences, config.stage2.max_length)
    if num_dropped:
        log.warning(
            "%d of %d examples are longer than stage2.max_length=%d and were dropped",
            num_dropped,
            len(sequences),
            config.stage2.max_length,
        )
    if not kept:
        raise ConfigError(
            f"stage2.max_length={config.stage2.max_length}: every example is longer; raise it"
        )
    return kept
