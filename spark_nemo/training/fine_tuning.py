"""The loop of stage II and of the policy's format SFT: fine-tuning on packed sequences, with exact
resume.
"""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from spark_nemo.megatron.checkpoint import has_checkpoint
from spark_nemo.megatron.packed_batch import PackedBatch
from spark_nemo.megatron.process_groups import gather_objects
from spark_nemo.megatron.worker import MegatronWorker
from spark_nemo.records import derive_seed
from spark_nemo.records.fingerprint import check_same_fingerprint
from spark_nemo.utils.progress_bar import progress_bar

from .metrics_writer import MetricsWriter
from .packing import TrainSequence, pack_for_rank
from .stop import StopFlag

log = logging.getLogger(__name__)
CHECKPOINTS = "checkpoints"


@dataclass(frozen=True, slots=True)
class SftResult:
    """``finished`` is False when the run was asked to stop before its last step; call again to go
    on.
    """

    step: int
    total_steps: int

    @property
    def finished(self) -> bool:
        """Were all steps made?"""
        return self.step == self.total_steps


def num_sft_steps(num_sequences: int, epochs: int, batch_size: int) -> int:
    """Optimizer steps of a whole run; the last batch of an epoch may be smaller. What the schedule
    is built for.
    """
    return epochs * math.ceil(num_sequences / batch_size)


def batch_indices(step: int, num_sequences: int, batch_size: int, seed: int) -> list[int]:
    """Which sequences step ``step`` trains on: a slice of its epoch's own permutation.

    A pure function of its arguments, so a resumed run sees the same data in the same order without
    stored state.
    """
    epoch, position = divmod(step, math.ceil(num_sequences / batch_size))
    generator = torch.Generator().manual_seed(derive_seed(seed, "sft-order", epoch))
    order = torch.randperm(num_sequences, generator=generator)
    return order[position * batch_size : (position + 1) * batch_size].tolist()


def train_sft(
    worker: MegatronWorker,
    sequences: Sequence[TrainSequence],
    *,
    epochs: int,
    batch_size: int,
    tokens_per_micro_batch: int,
    seed: int,
    run_folder: Path,
    save_every: int,
    stop: StopFlag,
    held_out: Sequence[TrainSequence] = (),
    eval_every: int = 100,
    fingerprint: Mapping[str, object] | None = None,
) -> SftResult:
    """Train from the newest checkpoint in ``run_folder`` (or from the start) to the last step or a
    requested stop.

    ``batch_size`` counts sequences per optimizer step over all data-parallel ranks; the loss is the
    mean over all response tokens of the step. With ``held_out`` sequences every ``eval_every``-th
    step's row has their loss, measured before the step. Writes ``metrics.jsonl``, TensorBoard and
    ``checkpoints/``: every ``save_every`` steps, at the end and when stopping. After a resume, rows
    from the resumed step on are dropped and written again. ``fingerprint`` is what else the
    steps depend on (optimizer, base model), by setting: a run resumes only with the same.

    Collective: all ranks call it with the same sequences. Raises ``ValueError`` when there is
    nothing to train on and ``ConfigError`` when the checkpoint was made from other data, in another
    order or with another ``fingerprint``.
    """
    if not sequences:
        raise ValueError("train_sft: no sequences to train on")
    run_folder, total_steps = Path(run_folder), num_sft_steps(len(sequences), epochs, batch_size)
    fingerprint = {
        "data": data_fingerprint(sequences),
        "seed": seed,
        "batch_size": batch_size,
        "epochs": epochs,
        **(fingerprint or {}),
    }
    step = saved_step = _resume(worker, run_folder, fingerprint)
    writer = MetricsWriter(run_folder, is_main=worker.is_main)
    writer.truncate_from(step)
    bar = progress_bar(
        total=total_steps, initial=step, desc="sft", unit="step", disable=not worker.is_main
    )
    while step < total_steps and not any(gather_objects(stop.requested)):
        measured = {}
        if held_out and step % eval_every == 0:
            measured = {"held_out_loss": held_out_loss(worker, held_out, tokens_per_micro_batch)}
        started = time.perf_counter()
        batch = [
            sequences[index] for index in batch_indices(step, len(sequences), batch_size, seed)
        ]
        packed = pack_for_rank(
            batch, tokens_per_micro_batch, worker.dp_rank, worker.dp_size, worker.quadratic_cost
        )
        result = worker.train_step(packed.micro_batches, sft_loss)
        seconds = time.perf_counter() - started
        writer.write(
            step,
            {
                "loss": result.loss,
                "grad_norm": result.grad_norm,
                "lr": result.lr,
                "loss_tokens": result.num_tokens,
                "epoch": step * batch_size / len(sequences),
                "seconds": seconds,
                "tokens_per_second": sum(sequence.num_positions for sequence in batch) / seconds,
                **measured,
            },
        )
        step += 1
        bar.update()
        bar.set_postfix(loss=f"{result.loss:.4f}")
        if step % save_every == 0:
            worker.save_checkpoint(
                run_folder / CHECKPOINTS, {"fingerprint": fingerprint, "step": step}
            )
            saved_step = step
    bar.close()
    writer.close()
    if step != saved_step:
        worker.save_checkpoint(run_folder / CHECKPOINTS, {"fingerprint": fingerprint, "step": step})
    if step < total_steps:
        log.info(
            "stopped after step %d of %d (%s); run again to go on", step, total_steps, stop.reason
        )
    return SftResult(step, total_steps)


def sft_loss(
    logprobs_T: Tensor, entropy_T: Tensor | None, batch: PackedBatch
) -> tuple[Tensor, dict[str, Tensor]]:
    """Negative log-likelihood of the response tokens; the trainer's division makes it the mean per
    token, in nats.
    """
    loss_sum = -torch.where(batch.loss_mask_T > 0, logprobs_T, 0.0).sum()
    return loss_sum, {}


def held_out_loss(
    worker: MegatronWorker, sequences: Sequence[TrainSequence], tokens_per_micro_batch: int
) -> float:
    """Mean nats per response token of sequences that are not trained on. Collective; the same on
    every rank.
    """
    packed = pack_for_rank(sequences, tokens_per_micro_batch, worker.dp_rank, worker.dp_size)
    rows = packed.unpack(worker.logprobs(packed.micro_batches))
    own = -math.fsum(float(row_R.double().sum()) for row_R in rows)
    # Tensor and pipeline ranks of one data-parallel rank have the same sum.
    by_rank = dict(gather_objects((worker.dp_rank, own)))
    return math.fsum(by_rank.values()) / sum(len(sequence.response_ids) for sequence in sequences)


def data_fingerprint(sequences: Sequence[TrainSequence]) -> str:
    """16 hex digits that depend on every token and its role; a checkpoint carries those of its
    data.
    """
    digest = hashlib.sha256()
    for sequence in sequences:
        for ids in (sequence.prompt_ids, sequence.response_ids):
            digest.update(len(ids).to_bytes(8, "little"))
            digest.update(np.asarray(ids, dtype=np.int64).tobytes())
    return digest.hexdigest()[:16]


def _resume(worker: MegatronWorker, run_folder: Path, fingerprint: dict[str, object]) -> int:
    if not has_checkpoint(run_folder / CHECKPOINTS):
        return 0
    state = worker.load_checkpoint(run_folder / CHECKPOINTS)
    check_same_fingerprint(state["fingerprint"], fingerprint, run_folder / CHECKPOINTS)
    log.info("resuming after step %d", state["step"])
    return int(state["step"])
