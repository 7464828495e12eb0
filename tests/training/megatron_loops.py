"""Program of test_megatron_loops: ``python megatron_loops.py MODE FOLDER``, or under torchrun.

``kill`` trains and is killed by SIGKILL in the fifth step; ``main`` trains whole, resumes the
killed run, and makes a GRPO step; ``ranks`` does the first and the last on two data-parallel ranks.
Results go to ``FOLDER/MODE.json``.
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch

from spark_nemo.config import (
    FineTuningConfig,
    MegatronConfig,
    OptimizerConfig,
    RLConfig,
    SamplingConfig,
)
from spark_nemo.config.rl import ClippedLoss, KLPenalty
from spark_nemo.megatron.worker import MegatronWorker
from spark_nemo.records import Problem, Rollout
from spark_nemo.training.fine_tuning import num_sft_steps, sft_loss, train_sft
from spark_nemo.training.grpo import train_on_rollouts
from spark_nemo.training.packing import TrainSequence, pack
from spark_nemo.training.stop import StopFlag

MODEL = {
    "model_type": "qwen2",
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 32,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
}
SEQUENCES = [
    TrainSequence(tuple(range(1, 2 + n % 5)), tuple((3 * n + 2 * k) % 32 for k in range(2 + n % 7)))
    for n in range(12)
]
SFT = FineTuningConfig(epochs=2, batch_size=4, save_every=2)
TOTAL_STEPS = num_sft_steps(len(SEQUENCES), SFT.epochs, SFT.batch_size)


class KillDuringFifthStep(StopFlag):
    """Not a stop but a death: SIGKILL when the loop looks before its fifth step, after one save at
    step 4.
    """

    looks = 0

    @property
    def requested(self) -> bool:
        self.looks += 1
        if self.looks == 6:
            os.kill(os.getpid(), signal.SIGKILL)
        return False


def worker(data_parallel: int, seed: int = 0) -> MegatronWorker:
    settings = OptimizerConfig(lr=1e-2, warmup_fraction=0.2, decay="cosine")
    return MegatronWorker.from_config(
        MODEL,
        MegatronConfig(dtype="float32", data_parallel=data_parallel),
        seed,
        settings,
        TOTAL_STEPS,
    )


def weights(trained: MegatronWorker) -> dict[str, list[float]]:
    return {name: tensor.flatten().tolist() for name, tensor in trained.export_hf()}


def grpo_step(trained: MegatronWorker) -> dict[str, float]:
    """One batch of nine rollouts in three groups, two updates, with every option of the loss on.

    The engine's log-probabilities are the trainer's own, so that the reported mismatch must vanish.
    """
    config = RLConfig(
        loss=ClippedLoss(num_minibatches=2, aggregation="sequence_mean"),
        kl=KLPenalty(coef=0.1),
        sampling=SamplingConfig(temperature=0.8),
    )
    bare = [
        TrainSequence((1, 2, 3), tuple((5 * n + k * k) % 32 for k in range(1 + n % 4)))
        for n in range(9)
    ]
    packed = pack(bare, 16)
    logprobs = packed.unpack(trained.logprobs(packed.micro_batches, 0.8))
    rollouts = [
        Rollout(
            Problem(f"p{n // 3}", "?"),
            n // 3,
            s.prompt_ids,
            s.response_ids,
            tuple(row_R.tolist()),
            (0,) * len(s.response_ids),
            "",
            "stop",
        )
        for n, (s, row_R) in enumerate(zip(bare, logprobs))
    ]
    advantages_N = torch.tensor([1.0, -0.5, -0.5, 0.7, 0.7, -1.4, 0.0, 1.0, -1.0])
    rollouts[4].valid = False
    return train_on_rollouts(
        trained,
        rollouts,
        advantages_N,
        config,
        tokens_per_micro_batch=16,
        reference=trained.snapshot(),
    )


def first_gradient_norms() -> dict[str, float]:
    """Gradient norm of the same first step under three budgets, from one pack down to one sequence
    per micro-batch.
    """
    norms = {}
    for budget in (1000, 16, 1):
        packed = pack(SEQUENCES, budget)
        norms[str(budget)] = worker(1).train_step(packed.micro_batches, sft_loss).grad_norm
    return norms


def train(worker: MegatronWorker, run_folder: Path, stop: StopFlag | None = None) -> None:
    train_sft(
        worker,
        SEQUENCES,
        SFT,
        tokens_per_micro_batch=16,
        seed=3,
        run_folder=run_folder,
        stop=stop or StopFlag(run_folder),
    )


def main(mode: str, folder: Path) -> None:
    results: dict[str, object] = {}
    if mode == "kill":
        train(worker(1), folder / "killed", KillDuringFifthStep(folder))
    if mode == "main":
        whole, resumed = worker(1), worker(1, seed=9)
        train(whole, folder / "whole")
        train(resumed, folder / "killed")
        results = {
            "whole": weights(whole),
            "resumed": weights(resumed),
            "grpo": grpo_step(worker(1)),
            "gradient_norms": first_gradient_norms(),
        }
    if mode == "ranks":
        whole = worker(2)
        train(whole, folder / "ranks")
        trained = weights(whole)  # collective, so on every rank
        results = {"whole": trained, "grpo": grpo_step(worker(2))}
        if not whole.is_main:
            return
    (folder / f"{mode}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
