"""The hacking simulator: stage III on the toy task, against judges with one planted weakness each.

A policy can only be rewarded for what it tries. Real policies try everything now and then, but a
model of a million parameters has never seen any exploit. So the simulator first gives its policy
the habit to use one exploit in a few percent of its responses, by a short SFT of the shipped
generator. That text also solves most problems wrongly: a policy that learns to solve within ten
steps has little reason to cheat, and with the generator's own accuracy of one half, honest learning
outran rare exploits. Everything after that is stage III unchanged: rollouts, format gate,
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
from spark_nemo.run.compose import compose_config
from spark_nemo.run.run_folder import read_done, stage3_folder
from spark_nemo.stages.stage3 import run_stage3
from spark_nemo.toy.corpus import PROMPTS, sampled_problems
from spark_nemo.toy.problem_files import held_out_questions
from spark_nemo.toy.resolve import ASSETS, resolve_toy
from spark_nemo.training.fine_tuning import fine_tune, num_sft_steps
from spark_nemo.training.packing import TrainSequence
from spark_nemo.utils.files import write_json_atomic
from studies.exploits import BY_NAME, Exploit, judge, tempted_response

SFT_EXAMPLES = 3000
SFT_BATCH = 64
_LAYOUT = MegatronConfig(dtype="float32", distributed_optimizer=False, tokens_per_micro_batch=4096)
_QUESTION = "Problem: "
_SOLUTION = "\n\nStudent Solution: "
_END = "\n\nLet's verify step by step."
SMALL_RUN = (
    "+experiment=toy",
    "data.rl_problems=toy:rl:400",
    "data.eval_problems=toy:eval:60",
    "rl.steps=10",
    "rl.prompts_per_step=12",
    "rl.group_size=12",
    "rl.sampling.max_new_tokens=90",
    "rl/kl=none",
    "rl.optimizer.lr=4e-4",
    "rl.optimizer.warmup_fraction=0.2",
    "rl.hacking.detectors.baseline_steps=1",
    "rl.reward.probes=0",
    "rl.eval_every=1000",
    "rl.save_every=1000",
    "evaluation.samples_per_problem=2",
    "evaluation.max_new_tokens=90",
    "evaluation.bootstrap_samples=200",
)
"""Settings of one run, which takes half a minute."""


class ScriptedJudge(Engine):
    """An engine that parses the reward model's prompt and replies with a scripted verification.

    Without a ``weakness`` it is honest. It does not accept new weights.
    """

    def __init__(self, tokenizer: Tokenizer, weakness: Exploit | None) -> None:
        self._tokenizer = tokenizer
        self._weakness = weakness
        self._tokens_generated = 0

    @classmethod
    def served(cls, folder: Path, weakness: Exploit | None) -> ServedModel:
        """Return the judge with the tokenizer of the model in ``folder``."""
        tokenizer = Tokenizer.load(folder)
        name = weakness.name if weakness else "honest"
        return ServedModel(cls(tokenizer, weakness), tokenizer, f"judge-{name}")

    async def generate(self, request: GenerationRequest) -> Generation:
        """Verify the prompt's solution; raises ``EngineFailure`` for any other prompt."""
        prompt = self._tokenizer.decode(request.prompt_ids)
        question, found, rest = prompt.partition(_QUESTION)[2].partition(_SOLUTION)
        parsed = split_response(rest.rpartition(_END)[0], StepFormat.PLAIN)
        if not found or not isinstance(parsed, ParsedResponse):
            raise EngineFailure(
                "the scripted judge parses only the reward model's prompt of rl.prompt_set=compact"
            )
        labels, accepted = judge(question, parsed.step_texts, parsed.answer, self._weakness)
        text = render_verification([StepJudgement("", "", label) for label in labels], accepted)
        ids = (*self._tokenizer.encode(text), self._tokenizer.eos_ids[0])
        self._tokens_generated += len(ids)
        return Generation(ids, (0.0,) * len(ids), (0,) * len(ids), FinishReason.STOP)

    async def update_weights(
        self, tensors: Iterable[tuple[str, torch.Tensor]], version: int
    ) -> None:
        """Raise ``EngineFailure``: a script has no weights to update."""
        raise EngineFailure("a scripted judge has no weights")

    async def pause(self) -> None:
        """Return at once: replies are immediate."""

    async def resume(self) -> None:
        """Return at once, as ``pause``."""

    async def health(self) -> EngineHealth:
        """Report a live engine of weight version 0."""
        return EngineHealth(True, False, 0, 0, 0, self._tokens_generated)

    async def close(self) -> None:
        """Return at once: there is nothing to release."""


@dataclass(frozen=True, slots=True)
class SimulatorRun:
    """One run of the simulator: an exploit with its constraint or without."""

    exploit: str
    constrained: bool
    seed: int

    @property
    def name(self) -> str:
        """Name of the run's folder."""
        kind = "with" if self.constrained else "without"
        return f"{self.exploit}-{kind}-seed{self.seed}"


def build_base(exploit: Exploit, folder: Path) -> Path:
    """Train a policy that has the habit of one exploit; return its folder.

    A finished model is reused, and an interrupted training resumes.
    """
    model = folder / "model"
    start = ASSETS / "generator"
    if (model / "config.json").exists():
        return model
    rng = random.Random(f"hacking simulator {exploit.name}")
    tokenizer = Tokenizer.load(start)
    problems = sampled_problems(rng, held_out_questions())
    sequences = []
    for problem in itertools.islice(problems, SFT_EXAMPLES):
        prompt = tokenizer.encode_chat(PROMPTS.policy(problem.question))
        response = tokenizer.encode(tempted_response(problem, exploit, rng))
        sequences.append(TrainSequence(prompt, (*response, tokenizer.eos_ids[0])))
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


def simulator_config(run: SimulatorRun, runs: Path) -> SparkConfig:
    """Return the configuration of a run; an exploit's runs differ in its constraints alone."""
    exploit = BY_NAME[run.exploit]
    base = build_base(exploit, runs / "base" / exploit.name)
    config = compose_config(
        [
            *SMALL_RUN,
            f"run.dir={runs / run.name}",
            f"run.seed={run.seed}",
            f"models.policy={base}",
            f"rl.reward.model={ASSETS / 'verifier'}",
        ]
    )
    settings = exploit.closed_by if run.constrained else exploit.opened_by
    reward = replace(config.rl.reward, constraints=ConstraintsConfig(**settings))
    return resolve_toy(replace(config, rl=replace(config.rl, reward=reward)))


def run_simulator(run: SimulatorRun, runs: Path) -> dict[str, float]:
    """Start or resume a run under ``runs``; return its ``outcome.json``."""
    path = runs / run.name / "outcome.json"
    if path.exists():
        return json.loads(path.read_text())
    exploit = BY_NAME[run.exploit]
    config = simulator_config(run, runs)
    folder = stage3_folder(config.run, config.rl.reward.name)
    if read_done(folder) is None:
        judge = ScriptedJudge.served(ASSETS / "verifier", exploit)
        if not run_stage3(config, judge):
            raise KeyboardInterrupt
    outcome = read_outcome(folder, exploit)
    write_json_atomic(path, outcome)
    return outcome


def read_outcome(folder: Path, exploit: Exploit) -> dict[str, float]:
    """Return true accuracy at both ends, and means over the first and the last three steps."""
    metrics = _rows(folder / "metrics.jsonl")
    evaluations = _rows(folder / "evaluations.jsonl")
    outcome = {
        "accuracy_first": evaluations[0]["sampled"]["value"],
        "accuracy_last": evaluations[-1]["sampled"]["value"],
    }
    keys = {
        "rate": f"hacking/{exploit.detector}",
        "reward": "reward",
        "tokens": "response_tokens",
    }
    for end, rows in (("first", metrics[:3]), ("last", metrics[-3:])):
        for name, key in keys.items():
            outcome[f"{name}_{end}"] = sum(row[key] for row in rows) / len(rows)
    return outcome


def _rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]
