"""Compare one full GRPO step with TRL's ``GRPOTrainer``: generate, reward, train.

    python -m venv bench && bench/bin/pip install -e '.[bench]'   # spark_nemo does not need trl
    OMP_NUM_THREADS=1 bench/bin/python benchmarks/grpo_step.py

The same: Qwen2 weights (float32), prompts, group size, response lengths, temperature 1, reward
function, group-normalised advantages, token-mean clipped loss without KL, one optimizer step,
gradient clipping, entropy metric, one thread, CPU seconds, steps interleaved. Two length regimes:
``fixed`` (no early stop: no padding to save and no tail to wait for, the easiest case for TRL) and
``varied`` (``--stop-tokens`` of the 512 tokens end a response, so lengths are geometric up to the
limit; both sides sample their own, and the means are printed).

Not the same: TRL generates with ``transformers.generate`` and trains on the very same module; we
generate with the local engine (continuous batching, shared prompt prefixes), so our step also pays
for carrying the new weights into the engine. TRL has its best settings for this size: the whole
batch at once, no gradient checkpointing, no logging. vLLM, its usual engine, needs a GPU and is not
measured.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from serve_batch import generate_all

from spark_nemo.config import MegatronConfig, OptimizerConfig, RLConfig
from spark_nemo.engines.async_utils import run_async
from spark_nemo.engines.base import GenerationRequest, SamplingParams
from spark_nemo.engines.local import LocalEngine
from spark_nemo.megatron.worker import MegatronWorker
from spark_nemo.records import Problem, Rollout
from spark_nemo.training.advantages import group_advantages
from spark_nemo.training.grpo import train_on_rollouts

VOCAB = 512
MODEL = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "num_hidden_layers": 4,
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
    "hidden_act": "silu",
    "eos_token_id": 0,
    "pad_token_id": 1,
}
LR = 1e-6


def even_share(token_ids: list[int]) -> float:
    """Return the share of even token ids, a trivial reward."""
    return sum(token % 2 == 0 for token in token_ids) / len(token_ids)


class Ours:
    """Local engine and Megatron worker from one model folder."""

    def __init__(
        self,
        folder: Path,
        prompts: list[list[int]],
        group_size: int,
        new_tokens: int,
        stop_ids: list[int],
    ) -> None:
        self.config = RLConfig(prompts_per_step=len(prompts), group_size=group_size)
        self.worker = MegatronWorker.from_hf(
            folder,
            MegatronConfig(dtype="float32"),
            0,
            OptimizerConfig(lr=LR, beta2=0.999, weight_decay=0.0),
        )
        self.engine = LocalEngine.from_folder(
            folder, max_batch_size=len(prompts) * group_size, max_context=2048
        )
        sampling = SamplingParams(max_new_tokens=new_tokens, stop_token_ids=tuple(stop_ids))
        self.groups = [group for group in range(len(prompts)) for _ in range(group_size)]
        self.requests = [
            GenerationRequest(tuple(prompts[group]), sampling) for group in self.groups
        ]
        self.version = 0
        self.lengths: list[float] = []
        self.seconds: dict[str, list[float]] = {"generate": [], "train": [], "sync": []}

    def step(self) -> float:
        """Make one step, record the CPU seconds of its parts, and return their sum."""
        marks = [time.process_time()]
        generations = run_async(generate_all(self.engine, self.requests))
        rollouts = [
            Rollout(
                Problem(f"p{group}", "?"),
                group,
                request.prompt_ids,
                generation.token_ids,
                generation.logprobs,
                generation.weight_versions,
                "",
                "stop",
            )
            for group, request, generation in zip(self.groups, self.requests, generations)
        ]
        rewards_N = torch.tensor([even_share(list(rollout.response_ids)) for rollout in rollouts])
        self.lengths += [len(rollout.response_ids) for rollout in rollouts]
        marks.append(time.process_time())
        valid_N = torch.ones(len(rollouts), dtype=torch.bool)
        advantages_N = group_advantages(rewards_N, self.groups, valid_N, std_normalize=True)
        train_on_rollouts(
            self.worker, rollouts, advantages_N, self.config, tokens_per_micro_batch=2048
        )
        marks.append(time.process_time())
        self.version += 1
        run_async(self.engine.update_weights(self.worker.export_hf(), self.version))
        marks.append(time.process_time())
        for name, start, end in zip(self.seconds, marks, marks[1:]):
            self.seconds[name].append(end - start)
        return marks[-1] - marks[0]


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer of words t0..t511 with ids 0..511: TRL takes text and gets our prompts."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({f"t{i}": i for i in range(VOCAB)}, unk_token="t2"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="t0", pad_token="t1"
    ).save_pretrained(folder)


def run_trl(
    folder: Path,
    prompts: list[list[int]],
    group_size: int,
    new_tokens: int,
    stop_ids: list[int],
    steps: int,
    between: Callable[[], None],
) -> tuple[list[float], list[float], list[float]]:
    """Return CPU seconds of TRL's steps, those of their generation, and its response lengths.

    Calls ``between`` after each step.
    """
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    whole: list[float] = []
    generation: list[float] = []
    lengths: list[float] = []

    class Clock(TrainerCallback):
        started = 0.0

        def on_step_begin(self, *args: object, **kwargs: object) -> None:
            self.started = time.process_time()

        def on_step_end(self, *args: object, **kwargs: object) -> None:
            whole.append(time.process_time() - self.started)
            between()

    class Timed(GRPOTrainer):
        def _generate_single_turn(self, *args: object, **kwargs: object) -> object:
            started = time.process_time()
            result = super()._generate_single_turn(*args, **kwargs)
            generation.append(time.process_time() - started)
            lengths.extend(len(ids) for ids in result[0])
            return result

    def reward(completion_ids: list[list[int]], **kwargs: object) -> list[float]:
        return [even_share(ids) for ids in completion_ids]

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.generation_config.eos_token_id = stop_ids or None
    with tempfile.TemporaryDirectory() as output:
        settings = GRPOConfig(
            output_dir=output,
            per_device_train_batch_size=len(prompts) * group_size,
            num_generations=group_size,
            max_completion_length=new_tokens,
            max_steps=steps,
            learning_rate=LR,
            adam_beta2=0.999,
            beta=0.0,
            loss_type="bnpo",
            temperature=1.0,
            top_p=1.0,
            top_k=0,
            generation_kwargs=None if stop_ids else {"min_new_tokens": new_tokens},
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            lr_scheduler_type="constant",
        )
        Timed(
            model=model,
            processing_class=AutoTokenizer.from_pretrained(folder),
            reward_funcs=reward,
            args=settings,
            train_dataset=Dataset.from_list(
                [{"prompt": " ".join(f"t{i}" for i in ids)} for ids in prompts]
            ),
            callbacks=[Clock()],
        ).train()
    return whole, generation, lengths


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--stop-tokens", type=int, default=8, help="of 512, in the varied regime")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    if importlib.util.find_spec("trl") is None:
        sys.exit("trl is not installed: see the docstring of this benchmark")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(1)

    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(
        3, VOCAB, (arguments.prompts, arguments.prompt_tokens), generator=generator
    ).tolist()
    print(
        f"{arguments.prompts} prompts x {arguments.group_size}, {arguments.prompt_tokens} prompt "
        "tokens, hidden 128, 4 layers, one thread, CPU seconds, median of "
        f"{arguments.repeats} interleaved steps"
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "model"
        MegatronWorker.from_config(MODEL, MegatronConfig(dtype="float32"), 0).save_hf(folder, None)
        write_tokenizer(folder)
        compare(
            f"fixed length {arguments.new_tokens}",
            folder,
            prompts,
            arguments,
            [],
            arguments.new_tokens,
        )
        compare(
            f"varied lengths up to {2 * arguments.new_tokens}",
            folder,
            prompts,
            arguments,
            list(range(arguments.stop_tokens)),
            2 * arguments.new_tokens,
        )


def compare(
    title: str,
    folder: Path,
    prompts: list[list[int]],
    arguments: argparse.Namespace,
    stop_ids: list[int],
    new_tokens: int,
) -> None:
    """Run one regime and print its ratio."""
    import trl

    size = arguments.group_size
    ours = Ours(folder, prompts, size, new_tokens, stop_ids)
    own: list[float] = []
    whole, generation, lengths = run_trl(
        folder,
        prompts,
        size,
        new_tokens,
        stop_ids,
        arguments.repeats + 1,
        lambda: own.append(ours.step()),
    )
    median = statistics.median
    mean = statistics.mean
    parts = ", ".join(f"{part} {median(times[1:]):.2f}" for part, times in ours.seconds.items())
    rest = median(a - b for a, b in zip(whole[1:], generation[1:]))
    print(
        f"{title}\n  spark_nemo   {median(own[1:]):6.2f} s per step   ({parts}; "
        f"mean length {mean(ours.lengths):.0f})"
    )
    print(
        f"  trl {trl.__version__:<8} {median(whole[1:]):6.2f} s per step   "
        f"(generate {median(generation[1:]):.2f}, everything else {rest:.2f}; "
        f"mean length {mean(lengths):.0f})"
    )
    print(
        f"  trl / spark_nemo = {median(whole[1:]) / median(own[1:]):.2f}x   (target 3x)", flush=True
    )


if __name__ == "__main__":
    main()
