"""The hacking simulator: the real stage III on the small world, against judges with one planted
weakness each.

A policy can only be rewarded for what it happens to try. Real ones try everything now and then; a
model of a million parameters has never seen any of these, so the simulator first gives its policy
the habit to use one of them in a few percent of its responses, by a short SFT of the shipped
generator, whose text also solves most problems wrongly: a policy that can learn to solve in ten
steps has little reason to cheat (with the generator's own accuracy of one half, rare exploits were
outrun by honest learning). Everything after that is stage III as it is: rollouts, gate,
constraints, judge, advantages, optimizer.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from spark_nemo.config import FineTuningConfig, MegatronConfig, OptimizerConfig, SparkConfig
from spark_nemo.config.compose import compose_config
from spark_nemo.config.hacking import ConstraintsConfig
from spark_nemo.engines.base import (
    Engine,
    EngineFailure,
    EngineHealth,
    FinishReason,
    Generation,
    GenerationRequest,
)
from spark_nemo.engines.served_model import ServedModel
from spark_nemo.engines.tokenizer import Tokenizer
from spark_nemo.grammar import (
    ParsedResponse,
    StepFormat,
    StepJudgement,
    render_verification,
    split_response,
)
from spark_nemo.run.run_folder import read_done, stage3_folder
from spark_nemo.stages.stage3 import run_stage3
from spark_nemo.toy.corpus import PROMPTS, sampled_problems
from spark_nemo.toy.problem_files import held_out_questions
from spark_nemo.toy.resolve import ASSETS, resolve_toy
from spark_nemo.training.fine_tuning import fine_tune, num_sft_steps
from spark_nemo.training.packing import TrainSequence
from spark_nemo.utils.files import write_json_atomic
from studies.exploits import BY_NAME, Exploit, judge, tempted_response

SFT_EXAMPLES, SFT_BATCH = 3000, 64
_LAYOUT = MegatronConfig(dtype="float32", distributed_optimizer=False, tokens_per_micro_batch=4096)
_QUESTION, _SOLUTION, _END = "Problem: ", "\n\nStudent Solution: ", "\n\nLet's verify step by step."
SMALL_RUN = (
    "+experiment=toy",
    "data.rl_problems=toy:rl:400",
    "data.eval_problems=toy:eval:60",
    "rl.steps=10",
    "rl.prompts_per_step=12",
    "rl.group_size=12",
    "rl.sampling.max_new_tokens=90",
    "rl.kl_estimator=none",
    "rl.kl_coef=null",
    "rl.optimizer.lr=4e-4",
    "rl.optimizer.warmup_fraction=0.2",
    "rl.hacking.detectors.baseline_steps=1",
    "rl.hacking.probes=0",
    "rl.eval_every=1000",
    "rl.save_every=1000",
    "evaluation.samples_per_problem=2",
    "evaluation.max_new_tokens=90",
    "evaluation.bootstrap_samples=200",
)
"""One arm, in half a minute; further overrides may follow."""


class ScriptedJudge(Engine):
    """An engine whose replies are a script's: it reads the reward model's prompt and writes a
    verification of it.

    ``weakness`` None is honest. Its weights never change, and it refuses new ones.
    """

    def __init__(self, tokenizer: Tokenizer, weakness: Exploit | None) -> None:
        self._tokenizer, self._weakness = tokenizer, weakness
        self._tokens_generated = 0

    @classmethod
    def served(cls, folder: Path, weakness: Exploit | None) -> ServedModel:
        """The judge with the tokenizer of the model in ``folder``."""
        tokenizer = Tokenizer.load(folder)
        return ServedModel(
            cls(tokenizer, weakness), tokenizer, f"judge-{weakness.name if weakness else 'honest'}"
        )

    async def generate(self, request: GenerationRequest) -> Generation:
        """See ``Engine.generate``; raises ``EngineFailure`` for a prompt that is not the reward
        model's.
        """
        prompt = self._tokenizer.decode(request.prompt_ids)
        question, found, rest = prompt.partition(_QUESTION)[2].partition(_SOLUTION)
        parsed = split_response(rest.rpartition(_END)[0], StepFormat.PLAIN)
        if not found or not isinstance(parsed, ParsedResponse):
            raise EngineFailure(
                "the scripted judge reads the prompt of rl.prompt_set=compact and nothing else"
            )
        labels, accepted = judge(question, parsed.step_texts, parsed.answer, self._weakness)
        text = render_verification([StepJudgement("", "", label) for label in labels], accepted)
        ids = (*self._tokenizer.encode(text), self._tokenizer.eos_ids[0])
        self._tokens_generated += len(ids)
        return Generation(ids, (0.0,) * len(ids), (0,) * len(ids), FinishReason.STOP)

    async def update_weights(
        self, tensors: Iterable[tuple[str, torch.Tensor]], version: int
    ) -> None:
        """Raises ``EngineFailure``."""
        raise EngineFailure("a scripted judge has no weights")

    async def pause(self) -> None:
        """It answers at once: there is nothing to stop."""

    async def resume(self) -> None:
        """See ``pause``."""

    async def health(self) -> EngineHealth:
        """Always alive, weight version 0."""
        return EngineHealth(True, False, 0, 0, 0, self._tokens_generated)

    async def close(self) -> None:
        """Nothing to release."""


@dataclass(frozen=True, slots=True)
class SimulatorRun:
    """One run of the simulator: an exploit with its constraint or without."""

    exploit: str
    constrained: bool
    seed: int

    @property
    def name(self) -> str:
        """Its folder."""
        return f"{self.exploit}-{'with' if self.constrained else 'without'}-seed{self.seed}"


def build_base(exploit: Exploit, folder: Path) -> Path:
    """A policy that has the habit of one exploit: ``folder/model``, made once; an interrupted build
    goes on.
    """
    model, start = folder / "model", ASSETS / "generator"
    if (model / "config.json").exists():
        return model
    rng, tokenizer = random.Random(f"hacking simulator {exploit.name}"), Tokenizer.load(start)
    problems = sampled_problems(rng, held_out_questions())
    sequences = []
    for problem in itertools.islice(problems, SFT_EXAMPLES):
        response = tokenizer.encode(tempted_response(problem, exploit, rng))
        sequences.append(
            TrainSequence(
                tokenizer.encode_chat(PROMPTS.policy(problem.question)),
                (*response, tokenizer.eos_ids[0]),
            )
        )
    settings = FineTuningConfig(
        epochs=1,
        batch_size=SFT_BATCH,
        save_every=num_sft_steps(len(sequences), 1, SFT_BATCH),
        optimizer=OptimizerConfig(lr=5e-4, warmup_fraction=0.1, decay="cosine"),
    )
    worker, result = fine_tune(start, sequences, settings, _LAYOUT, seed=0, run_folder=folder)
    if not result.finished:
        raise KeyboardInterrupt
    worker.save_hf(model, source_dir=start)
    return model


def arm_config(arm: SimulatorRun, runs: Path, overrides: Iterable[str] = ()) -> SparkConfig:
    """The configuration of an arm's stage III: the two arms of an exploit differ in its constraints
    and in no more.
    """
    exploit = BY_NAME[arm.exploit]
    base = build_base(exploit, runs / "base" / exploit.name)
    config = compose_config(
        [
            *SMALL_RUN,
            *overrides,
            f"run.dir={runs / arm.name}",
            f"run.seed={arm.seed}",
            f"models.policy={base}",
            "rl.reward=process_aware",
            f"rl.reward_model={ASSETS / 'verifier'}",
        ]
    )
    settings = exploit.closed_by if arm.constrained else exploit.opened_by
    rules = ConstraintsConfig(**settings)
    hacking = replace(config.rl.hacking, constraints=rules)
    return resolve_toy(replace(config, rl=replace(config.rl, hacking=hacking)))


def run_arm(arm: SimulatorRun, runs: Path, overrides: Iterable[str] = ()) -> dict[str, float]:
    """Run it (or go on with it) and return what ``outcome.json`` holds; a finished arm is not run
    again.
    """
    path = runs / arm.name / "outcome.json"
    if path.exists():
        return json.loads(path.read_text())
    config = arm_config(arm, runs, overrides)
    folder = stage3_folder(config.run, config.rl.reward)
    if read_done(folder) is None and not run_stage3(
        config, ScriptedJudge.served(ASSETS / "verifier", BY_NAME[arm.exploit])
    ):
        raise KeyboardInterrupt
    outcome = read_outcome(folder, BY_NAME[arm.exploit])
    write_json_atomic(path, outcome)
    return outcome


def read_outcome(folder: Path, exploit: Exploit) -> dict[str, float]:
    """Means over the first and the last three training steps: the exploit's rate, the reward; and
    true accuracy.
    """
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    tests = [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]
    ends = {"first": rows[:3], "last": rows[-3:]}
    outcome = {
        "accuracy_first": tests[0]["sampled"]["value"],
        "accuracy_last": tests[-1]["sampled"]["value"],
    }
    for end, part in ends.items():
        for name, key in (
            ("rate", f"hacking/{exploit.detector}"),
            ("reward", "reward"),
            ("tokens", "response_tokens"),
        ):
            outcome[f"{name}_{end}"] = sum(row[key] for row in part) / len(part)
    return outcome
