"""Compare fine-tuning throughput of packed and padded micro-batches.

    OMP_NUM_THREADS=1 python benchmarks/packing.py

Same worker, weights, sequences and loss. Packed: first-fit-decreasing under a token budget. Padded:
micro-batches of as many sequences as an average pack has, in random order, each sequence padded to
the longest of its micro-batch. Only real tokens count. Lengths are log-normal like those of
reasoning traces; the ratio depends on their spread and on the number of sequences per micro-batch,
which are printed. Seconds are CPU seconds of the one thread, so a busy machine does not blur the
ratio. Sorting by length, which costs less than packing, is not measured.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence

import torch

from spark_nemo.config import MegatronConfig, OptimizerConfig
from spark_nemo.megatron.packed_batch import PackedBatch
from spark_nemo.megatron.worker import MegatronWorker
from spark_nemo.training.fine_tuning import sft_loss
from spark_nemo.training.packing import TrainSequence, pack

MODEL = {
    "model_type": "qwen2",
    "num_hidden_layers": 4,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
}


def random_sequences(
    count: int, median: float, spread: float, longest: int, seed: int
) -> list[TrainSequence]:
    """Return sequences with prompts of 32 tokens and responses of log-normal length."""
    generator = torch.Generator().manual_seed(seed)
    lengths = (
        (median * torch.exp(spread * torch.randn(count, generator=generator)))
        .round()
        .clamp(8, longest)
    )
    return [
        TrainSequence(
            tuple(torch.randint(512, (32,), generator=generator).tolist()),
            tuple(torch.randint(512, (int(length),), generator=generator).tolist()),
        )
        for length in lengths
    ]


def padded(sequences: Sequence[TrainSequence], per_batch: int) -> list[PackedBatch]:
    """Return micro-batches [per_batch, longest]; padding is computed and masked in the loss."""
    batches = []
    for start in range(0, len(sequences), per_batch):
        rows = [
            pack([sequence], 1).micro_batches[0]
            for sequence in sequences[start : start + per_batch]
        ]
        longest = max(row.num_tokens for row in rows)

        def stack(
            name: str, rows: Sequence[PackedBatch] = rows, longest: int = longest
        ) -> torch.Tensor:
            return torch.cat(
                [
                    torch.nn.functional.pad(getattr(row, name), (0, longest - row.num_tokens))
                    for row in rows
                ]
            )

        batches.append(
            PackedBatch(
                tokens_T=stack("tokens_T"),
                labels_T=stack("labels_T"),
                loss_mask_T=stack("loss_mask_T"),
                positions_T=torch.arange(longest).repeat(len(rows)),
                cu_seqlens_N=torch.arange(len(rows) + 1, dtype=torch.int32) * longest,
            )
        )
    return batches


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sequences", type=int, default=64, help="per optimizer step")
    parser.add_argument("--budget", type=int, default=1024, help="tokens per packed micro-batch")
    parser.add_argument("--spread", type=float, default=0.6, help="sigma of log length")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    sequences = random_sequences(arguments.sequences, 96, arguments.spread, 512, seed=0)
    real = sum(sequence.num_positions for sequence in sequences)
    packs = pack(sequences, arguments.budget).micro_batches
    per_batch = max(1, round(len(sequences) / len(packs)))
    layouts = {"packed": packs, "padded": padded(sequences, per_batch)}
    worker = MegatronWorker.from_config(
        MODEL, MegatronConfig(dtype="float32"), 0, OptimizerConfig(lr=1e-9)
    )

    losses = {}
    seconds = {name: [] for name in layouts}
    for repeat in range(arguments.repeats + 1):
        for name, batches in layouts.items():
            started = time.process_time()
            losses[name] = worker.train_step(batches, sft_loss).loss
            if repeat:  # the first pass warms up
                seconds[name].append(time.process_time() - started)
    assert abs(losses["packed"] - losses["padded"]) < 1e-4, losses

    rates = {name: real / statistics.median(times) for name, times in seconds.items()}
    print(
        f"{len(sequences)} sequences, {real} real positions, longest "
        f"{max(s.num_positions for s in sequences)}, {per_batch} sequences per padded "
        f"micro-batch, one thread, CPU seconds, median of {arguments.repeats}"
    )
    for name, batches in layouts.items():
        fill = real / sum(batch.num_tokens for batch in batches)
        spread = (max(seconds[name]) - min(seconds[name])) / statistics.median(seconds[name])
        print(
            f"{name}: {rates[name]:8.0f} real tokens/s   {len(batches)} micro-batches, "
            f"{fill:.0%} real tokens, loss {losses[name]:.5f}, spread {spread:.0%}"
        )
    print(f"packed / padded = {rates['packed'] / rates['padded']:.2f}x   (target 1.5x)")


if __name__ == "__main__":
    main()
