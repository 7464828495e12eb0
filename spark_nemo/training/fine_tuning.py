"""Supervised fine-tuning with exact resume. ``fine_tune`` is the entry of stage II and of the
policy's format SFT.
"""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from spark_nemo.config import FineTuningConfig, MegatronConfig
from spark_nemo.megatron.checkpoint import has_checkpoint
from spark_nemo.megatron.packed_batch import PackedBatch
from spark_nemo.megatron.process_groups import gather_objects
from spark_nemo.megatron.worker import MegatronWorker
from spark_nemo.records import derive_seed
from spark_nemo.records.fingerprint import check_same_fingerprint, model_fingerprint
from spark_nemo.utils.files import write_json_atomic
from spark_nemo.utils.progress_bar import progress_bar

from .metrics_writer import MetricsWriter
from .packing import TrainSequence, pack_for_rank
from .stop import StopFlag

log = logging.getLogger(__name__)
CHECKPOINTS = "checkpoints"
DATA_FILE = "data.json"


@dataclass(frozen=True, slots=True)
class SftResult:
    """Steps made so far, and steps of the whole run."""

    step: int
    total_steps: int

    @property
    def finished(self) -> bool:
        """False when the run was stopped before its last step; call again to continue."""
        return self.step == self.total_steps


def fine_tune(
    base: str | Path,
    sequences: Sequence[TrainSequence],
    settings: FineTuningConfig,
    megatron: MegatronConfig,
    *,
    seed: int,
    run_folder: Path,
    held_out: Sequence[TrainSequence] = (),
    eval_every: int = 100,
    data_summary: Mapping[str, object] | None = None,
) -> tuple[MegatronWorker, SftResult]:
    """Fine-tune the model folder ``base`` until the last step or a requested stop.

    Resumes from the newest checkpoint in ``run_folder``; see ``train_sft``, which also lists the
    errors. Writes ``data_summary`` to ``data.json`` before the first step. The returned worker
    holds the trained weights. Collective.
    """
    total_steps = num_sft_steps(len(sequences), settings.epochs, settings.batch_size)
    worker = MegatronWorker.from_hf(base, megatron, seed, settings.optimizer, total_steps)
    if worker.is_main and data_summary is not None:
        write_json_atomic(run_folder / DATA_FILE, data_summary)
    with StopFlag(run_folder) as stop:
        result = train_sft(
            worker,
            sequences,
            settings,
            tokens_per_micro_batch=megatron.tokens_per_micro_batch,
            seed=seed,
            run_folder=run_folder,
            stop=stop,
            held_out=held_out,
            eval_every=eval_every,
            base_fingerprint=model_fingerprint(base),
        )
    return worker, result


def train_sft(
    worker: MegatronWorker,
    sequences: Sequence[TrainSequence],
    settings: FineTuningConfig,
    *,
    tokens_per_micro_batch: int,
    seed: int,
    run_folder: Path,
    stop: StopFlag,
    held_out: Sequence[TrainSequence] = (),
    eval_every: int = 100,
    base_fingerprint: str = "",
) -> SftResult:
    """Train from the newest checkpoint in ``run_folder``, or from the start, to the last step.

    ``settings.batch_size`` counts sequences per optimizer step over all data-parallel ranks; the
    loss is the mean over all response tokens of the step. With ``held_out`` sequences, the row of
    every ``eval_every``-th step has their loss, measured before the step.

    Writes ``metrics.jsonl``, TensorBoard and ``checkpoints/``: every ``save_every`` steps, at the
    end, and when stopping. After a resume, rows from the resumed step on are dropped and written
    again.

    Collective: all ranks call it with the same sequences. Raises ``ValueError`` without sequences
    and ``ConfigError`` when the checkpoint was made with other data, settings, seed or base model.
    """
    if not sequences:
        raise ValueError("train_sft: no sequences to train on")
    run_folder = Path(run_folder)
    batch_size = settings.batch_size
    total_steps = num_sft_steps(len(sequences), settings.epochs, batch_size)
    fingerprint = {
        "data": data_fingerprint(sequences),
        "base_model": base_fingerprint,
        "seed": seed,
        "batch_size": batch_size,
        "epochs": settings.epochs,
        "optimizer": asdict(settings.optimizer),
    }
    step = _resume(worker, run_folder, fingerprint)
    saved_step = step
    writer = MetricsWriter(run_folder, is_main=worker.is_main)
    writer.truncate_from(step)
    bar = progress_bar(
        total=total_steps, initial=step, desc="sft", unit="step", disable=not worker.is_main
    )
    # A signal reaches the ranks at different times: they stop together, at the same step.
    while step < total_steps and not any(gather_objects(stop.requested)):
        validation = {}
        if held_out and step % eval_every == 0:
            validation["held_out_loss"] = held_out_loss(worker, held_out, tokens_per_micro_batch)
        started = time.perf_counter()
        batch = [sequences[i] for i in batch_indices(step, len(sequences), batch_size, seed)]
        packed = pack_for_rank(
            batch, tokens_per_micro_batch, worker.dp_rank, worker.dp_size, worker.quadratic_cost
        )
        result = worker.train_step(packed.micro_batches, sft_loss)
        seconds = time.perf_counter() - started
        metrics = {
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "lr": result.lr,
            "loss_tokens": result.num_tokens,
            "epoch": step * batch_size / len(sequences),
            "seconds": seconds,
            "tokens_per_second": sum(sequence.num_positions for sequence in batch) / seconds,
        }
        writer.write(step, metrics | validation)
        step += 1
        bar.update()
        bar.set_postfix(loss=f"{result.loss:.4f}")
        if step % settings.save_every == 0:
            _save(worker, run_folder, fingerprint, step)
            saved_step = step
    bar.close()
    writer.close()
    if step != saved_step:
        _save(worker, run_folder, fingerprint, step)
    if step < total_steps:
        log.info(
            "stopped after step %d of %d (%s); run the same command to continue",
            step,
            total_steps,
            stop.reason,
        )
    return SftResult(step, total_steps)


def num_sft_steps(num_sequences: int, epochs: int, batch_size: int) -> int:
    """Return the optimizer steps of a whole run; the last batch of an epoch may be smaller."""
    return epochs * math.ceil(num_sequences / batch_size)


def batch_indices(step: int, num_sequences: int, batch_size: int, seed: int) -> list[int]:
    """Return the indices of the sequences of ``step``: a slice of its epoch's permutation.

    A pure function of its arguments: a resumed run needs no stored state to see the same data in
    the same order.
    """
    epoch, position = divmod(step, math.ceil(num_sequences / batch_size))
    generator = torch.Generator().manual_seed(derive_seed(seed, "sft-order", epoch))
    order = torch.randperm(num_sequences, generator=generator)
    return order[position * batch_size : (position + 1) * batch_size].tolist()


def sft_loss(
    logprobs_T: Tensor, entropy_T: Tensor | None, batch: PackedBatch
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the summed negative log-likelihood of the response tokens, in nats, and no metrics."""
    loss_sum = -torch.where(batch.loss_mask_T > 0, logprobs_T, 0.0).sum()
    return loss_sum, {}


def held_out_loss(
    worker: MegatronWorker, sequences: Sequence[TrainSequence], tokens_per_micro_batch: int
) -> float:
    """Return the mean nats per response token, the same on all ranks. Collective."""
    packed = pack_for_rank(sequences, tokens_per_micro_batch, worker.dp_rank, worker.dp_size)
    rows = packed.unpack(worker.logprobs(packed.micro_batches))
    own = -math.fsum(float(row_R.double().sum()) for row_R in rows)
    # Tensor and pipeline ranks of one data-parallel rank have the same sum.
    by_rank = dict(gather_objects((worker.dp_rank, own)))
    return math.fsum(by_rank.values()) / sum(len(sequence.response_ids) for sequence in sequences)


def data_fingerprint(sequences: Sequence[TrainSequence]) -> str:
    """Return 16 hex digits that depend on every token, its role and the order of sequences."""
    digest = hashlib.sha256()
    for sequence in sequences:
        for ids in (sequence.prompt_ids, sequence.response_ids):
            digest.update(len(ids).to_bytes(8, "little"))
            digest.update(np.asarray(ids, dtype=np.int64).tobytes())
    return digest.hexdigest()[:16]


def _save(
    worker: MegatronWorker, run_folder: Path, fingerprint: dict[str, object], step: int
) -> None:
    worker.save_checkpoint(run_folder / CHECKPOINTS, {"fingerprint": fingerprint, "step": step})


def _resume(worker: MegatronWorker, run_folder: Path, fingerprint: dict[str, object]) -> int:
    """Load the newest checkpoint, if there is one, and return the step to continue from."""
    if not has_checkpoint(run_folder / CHECKPOINTS):
        return 0
    state = worker.load_checkpoint(run_folder / CHECKPOINTS)
    check_same_fingerprint(state["fingerprint"], fingerprint, run_folder / CHECKPOINTS)
    log.info("resuming after step %d", state["step"])
    return int(state["step"])
