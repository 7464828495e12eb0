"""Program of test_step_advantages_in_parallel: ``step_ranks.py FOLDER 1``, or 4 under torchrun.

One process takes one optimizer step under every step advantage, packed in three ways; four ranks
take the same steps under every layout. Losses and gradients go to ``FOLDER/one.pt`` and
``FOLDER/four.pt``.
"""

import random
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import torch

from spark_nemo.config import MegatronConfig, OptimizerConfig, RLConfig
from spark_nemo.config.designs import design_settings, step_advantages
from spark_nemo.megatron import process_groups
from spark_nemo.megatron.worker import MegatronWorker
from spark_nemo.records import (
    FormatViolation,
    ParseFailure,
    Problem,
    Rollout,
    RolloutVerdict,
    TokenSpan,
    Verdict,
)
from spark_nemo.training.advantage_estimator import compute_advantages
from spark_nemo.training.grpo import train_on_rollouts

MODEL = {
    "model_type": "qwen2",
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 32,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
}
LAYOUTS = {
    "tp4": (4, 1, 1, False),
    "tp2_pp2": (2, 2, 1, False),
    "tp2_dp2_sequence_parallel": (2, 1, 2, True),
    "pp2_dp2": (1, 2, 2, False),
    "dp4": (1, 1, 4, False),
}
BUDGETS = (1000, 40, 1)


def scored_rollouts() -> list[Rollout]:
    """Eleven responses in groups of 5, 4 and 2 with one to five steps of one to four tokens:
    verdicts, a broken format, a failed verification that is masked.
    """
    rng = random.Random(5)
    rollouts = []
    for number in range(11):
        lengths = [rng.randint(1, 4) for _ in range(rng.randint(1, 5))]
        ends = [1 + sum(lengths[:k]) for k in range(len(lengths) + 1)]
        size = ends[-1] + rng.randint(1, 3)
        rollout = Rollout(
            problem=Problem("p", "?"),
            group=(0, 0, 1, 0, 2, 1, 0, 1, 2, 0, 1)[number],
            prompt_ids=tuple(range(1, rng.randint(3, 6))),
            response_ids=tuple(rng.randrange(32) for _ in range(size)),
            logprobs=tuple(-3.5 + rng.random() for _ in range(size)),
            weight_versions=(0,) * size,
            text="",
            finish_reason="stop",
            step_spans=tuple(TokenSpan(a, b) for a, b in pairwise(ends)),
        )
        yes = rng.random() < 0.5
        rollout.verdict = RolloutVerdict(
            None, Verdict(tuple(rng.random() < 0.6 for _ in lengths), yes)
        )
        rollout.reward = float(yes)
        if number == 3:
            rollout.verdict = RolloutVerdict(FormatViolation("steps"), None)
            rollout.reward = 0.0
        if number == 7:
            rollout.verdict = RolloutVerdict(None, ParseFailure("x"))
            rollout.reward = float("nan")
            rollout.valid = False
        rollouts.append(rollout)
    return rollouts


def one_step(
    layout: MegatronConfig, design: str, budget: int
) -> tuple[float, float, dict[str, torch.Tensor]]:
    """Loss, gradient norm and gradients (under Hugging Face names) of a fresh model's first step.
    Collective.
    """
    settings = design_settings(design)
    if design == "global_step_penalty":
        settings["advantage"] = replace(settings["advantage"], min_steps=2)
    config = RLConfig(**settings)
    worker = MegatronWorker.from_config(
        MODEL, layout, 0, OptimizerConfig(lr=1e-3, clip_grad=0.0), 1
    )
    rollouts = scored_rollouts()
    metrics = train_on_rollouts(
        worker,
        rollouts,
        compute_advantages(rollouts, config),
        config,
        tokens_per_micro_batch=budget,
    )
    with torch.no_grad():
        for parameter in worker.model.parameters():
            parameter.copy_(parameter.main_grad)  # so that the weights' export gathers them
    return (
        metrics["loss"],
        metrics["grad_norm"],
        {name: tensor.clone() for name, tensor in worker.export_hf()},
    )


def main(folder: Path, ranks: int) -> None:
    results = {}
    for design in step_advantages():
        if ranks == 1:
            alone = MegatronConfig(dtype="float32", distributed_optimizer=False)
            results |= {(design, budget): one_step(alone, design, budget) for budget in BUDGETS}
    for name, (tensor, pipeline, data, sequence) in LAYOUTS.items() if ranks > 1 else ():
        layout = MegatronConfig(
            dtype="float32",
            distributed_optimizer=False,
            tensor_parallel=tensor,
            pipeline_parallel=pipeline,
            data_parallel=data,
            sequence_parallel=sequence,
        )
        results |= {
            (design, name): one_step(layout, design, BUDGETS[1]) for design in step_advantages()
        }
    if process_groups.rank() == 0:
        torch.save(results, folder / ("one.pt" if ranks == 1 else "four.pt"))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
