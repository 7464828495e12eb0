"""Format SFT of the policy, before stage III.

In: a base model and example responses in the policy's format. Out: ``model/``, which writes steps in
tags and its answer in a box, and its loss on held-out examples.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from spark_nemo.config import ConfigError, SparkConfig
from spark_nemo.engines.tokenizer import Tokenizer
from spark_nemo.grammar import prompt_set
from spark_nemo.planning.memory_check import check_memory
from spark_nemo.planning.preflight import check_sft
from spark_nemo.run.completion import fingerprint_before_work, record_fingerprint
from spark_nemo.run.run_folder import Clock, mark_done, sft_folder
from spark_nemo.run.run_lock import run_lock
from spark_nemo.training.fine_tuning import fine_tune, held_out_loss
from spark_nemo.training.packing import TrainSequence, drop_longer_than
from spark_nemo.training.policy_examples import (
    policy_sequences,
    read_policy_examples,
    split_held_out,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SftData:
    """Examples to train on, examples to validate on, and counts of all examples of the file."""

    trained: list[TrainSequence]
    held_out: list[TrainSequence]
    counts: dict[str, object]


def run_sft(config: SparkConfig) -> bool:
    """Check every example, fine-tune, export. Returns False if stopped early; run again to resume.

    Collective over the trainer ranks. Raises ``ConfigError`` or ``DataFileError`` before any work,
    on bad input or while another process runs this stage.
    """
    data = sft_data(config)
    check_memory(config, "sft")
    folder = sft_folder(config.run)
    fingerprint = fingerprint_before_work(config, "sft")
    with run_lock(folder):
        finished = _train(config, data, folder)
        if finished:
            record_fingerprint(folder, fingerprint)
        return finished


def _train(config: SparkConfig, data: SftData, folder: Path) -> bool:
    log.info("%s", data.counts)
    clock = Clock(folder)
    worker, result = fine_tune(
        config.models.policy_base,
        data.trained,
        config.sft,
        config.megatron,
        seed=config.run.seed,
        run_folder=folder,
        held_out=data.held_out,
        eval_every=config.sft.measured_every,
        data_summary=data.counts,
    )
    if worker.is_main:
        clock.save()
    if not result.finished:
        return False
    val_loss = None
    if data.held_out:
        val_loss = held_out_loss(worker, data.held_out, config.megatron.tokens_per_micro_batch)
    worker.save_hf(folder / "model", source_dir=config.models.policy_base)
    if worker.is_main:
        mark_done(
            folder,
            {
                **data.counts,
                "held_out_loss": val_loss,
                "seconds": clock.seconds,
                "steps": result.total_steps,
                "tokens": sum(s.num_positions for s in data.trained) * config.sft.epochs,
            },
        )
    return True


def sft_data(config: SparkConfig) -> SftData:
    """Check settings and examples; split and tokenise the examples. Loads no model.

    Raises ``ConfigError`` for settings that cannot work or without any example left to train on,
    and ``DataFileError``.
    """
    check_sft(config)
    stage = config.sft
    tokenizer = Tokenizer.load(config.models.policy_base)
    examples, dropped = read_policy_examples(
        config.data.sft_examples, drop_invalid=stage.on_invalid == "drop"
    )
    prompts = prompt_set(config.rl.prompt_set)
    train_side, val_side = split_held_out(examples, stage.val_fraction, config.run.seed)
    trained, num_long = drop_longer_than(
        policy_sequences(train_side, prompts, tokenizer), stage.max_length
    )
    held_out, num_long_held_out = drop_longer_than(
        policy_sequences(val_side, prompts, tokenizer), stage.max_length
    )
    if not trained:
        raise ConfigError(f"sft.max_length={stage.max_length}: every example is longer; raise it")
    counts = {
        "examples": len(trained),
        "held_out": len(held_out),
        "too_long": num_long + num_long_held_out,
        "dropped": dict(sorted(dropped.items())),
    }
    return SftData(trained, held_out, counts)
