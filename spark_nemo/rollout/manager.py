"""What only the main rank of stage III holds: the engines, the scorer, the evaluation and the files
they write.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from spark_nemo.config import ConfigError, SparkConfig
from spark_nemo.engines.async_utils import freeze_heap, run_async
from spark_nemo.engines.served_model import ServedModel
from spark_nemo.evaluation.accuracy import problem_rates
from spark_nemo.evaluation.answers import EvalProblem, grade_answers, read_answer_keys
from spark_nemo.evaluation.checker import AnswerGrade
from spark_nemo.evaluation.policy_accuracy import PolicyAccuracy, evaluate_policy
from spark_nemo.grammar import (
    Variant,
    extract_boxed,
    prompt_set,
)
from spark_nemo.planning.preflight import reward_model_folder
from spark_nemo.records import (
    EngineError,
    Failure,
    ParsedResponse,
    Problem,
    Rollout,
    Verdict,
    outcome_to_json,
)
from spark_nemo.rewards import FailureCount
from spark_nemo.rewards.judge import RewardJudge
from spark_nemo.rewards.prm_service import PRMService, ServiceLimits
from spark_nemo.rewards.rlvr import Checker
from spark_nemo.rollout.batch import RolloutBatch
from spark_nemo.rollout.dynamic_sampling import dynamic_batch
from spark_nemo.rollout.generator import MODEL_REWARDS, RolloutGenerator, shape_reward
from spark_nemo.rollout.reward_hacking_monitor import HACKING, TOP_REWARDS, RewardHackingMonitor
from spark_nemo.utils.files import write_text_atomic

EVALUATIONS, SAMPLES, VERIFIER, SERVERS = (
    "evaluations.jsonl",
    "samples.jsonl",
    "verifier.jsonl",
    "servers",
)
FAILURES = "failures.json"
_SAMPLES_PER_STEP = 4


@dataclass
class RolloutManager:
    """Engines and scorer of one RL run."""

    policy: ServedModel
    rollouts: RolloutGenerator
    config: SparkConfig
    folder: Path
    watch: RewardHackingMonitor

    async def batch(self, problems: Sequence[Problem], step: int) -> RolloutBatch:
        """A scored batch; a few of its samples are kept for a person to read.

        What the verifier was spared goes to verifier.jsonl, not to the metrics: a resumed run,
        whose cache is empty, has the metrics of an uninterrupted one and asks more.
        """
        dynamic = self.config.rl.rollout.over_sampling_ratio is not None
        batch = await (dynamic_batch if dynamic else RolloutGenerator.generate_batch)(
            self.rollouts, problems, step
        )
        if (judge := self.rollouts.judge) is not None:
            rewrite_rows(
                self.folder / VERIFIER,
                step,
                [{"step": step, **judge.service.take_counts().metrics()}],
            )
        if step % self.config.rl.eval_every == 0 or step + 1 == self.config.rl.steps:
            rewrite_rows(self.folder / SAMPLES, step, sample_rows(batch, step))
        return batch

    async def evaluate(self, problems: Sequence[EvalProblem], step: int) -> PolicyAccuracy:
        """True accuracy of the current policy on held-out problems, appended to evaluations.jsonl."""
        accuracy = await evaluate_policy(
            self.policy, problems, self.rollouts.prompts, self.config.evaluation
        )
        row = {
            "step": step,
            "sampled": accuracy.sampled._asdict(),
            "greedy": accuracy.greedy._asdict(),
            "num_tokens": accuracy.num_tokens,
            "rates": problem_rates(accuracy.samples),
        }
        rewrite_rows(self.folder / EVALUATIONS, step, [row])
        if probed := await self.watch.probe([p.problem for p in problems], step):
            rewrite_rows(self.folder / HACKING, step, probed)
        return accuracy

    async def watched(self, batch: RolloutBatch, step: int) -> dict[str, float]:
        """The metrics ``hacking/...`` of a step before its row is written; its highest rewards go
        to a file.
        """
        metrics = await self.watch.metrics(batch, step)
        if top := self.watch.top(batch, step):
            interval = step - step % self.config.rl.eval_every
            rewrite_rows(
                self.folder / TOP_REWARDS,
                step,
                [
                    {**sample_row(batch, index, step), "interval": interval, "detectors": detectors}
                    for index, detectors in top
                ],
            )
        return metrics

    def files(self) -> dict[str, bytes]:
        """For the checkpoint: the failures counted so far."""
        return {FAILURES: json.dumps(self.rollouts.failures.to_json()).encode()}

    def restore(self, checkpoint: Path) -> None:
        """Go on with what ``files`` left in a checkpoint; an older one has no count, and a new one
        begins.
        """
        if (path := checkpoint / FAILURES).exists():
            counted = FailureCount.from_json(json.loads(path.read_text()))
            self.rollouts = replace(self.rollouts, failures=counted)

    def close(self) -> None:
        """Release the engines, each also when another will not be released."""
        with ExitStack() as engines:
            engines.callback(lambda: run_async(self.watch.close()))
            if (judge := self.rollouts.judge) is not None:
                engines.callback(lambda: run_async(judge.service.served.engine.close()))
            engines.callback(lambda: run_async(self.policy.engine.close()))


def open_session(
    config: SparkConfig, folder: Path, verifier: ServedModel | None = None
) -> RolloutManager:
    """Load the engines; a ``verifier`` that is given takes the reward model's place.

    Raises ``ConfigError`` when there is no reward model.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rl, prompts = config.rl, prompt_set(config.rl.prompt_set)
    judge, checker = None, None
    if rl.reward == "rlvr":
        checker = answer_checker(config)
    if rl.asks_reward_model:
        served = verifier or ServedModel.load(
            config.engine, reward_model_folder(config), "verifier", folder / SERVERS
        )
        judge = reward_judge(config, served, Variant(config.reward_variant))
    policy = ServedModel.load(config.engine, config.models.policy, "policy", folder / SERVERS)
    freeze_heap()
    rollouts = RolloutGenerator(policy, prompts, rl, config.run.seed, judge, checker)
    return RolloutManager(policy, rollouts, config, folder, _watch(config, folder, judge))


def reward_judge(config: SparkConfig, served: ServedModel, variant: Variant) -> RewardJudge:
    """A reward model as the configuration asks it: with the words that stage II trained it on, not
    with those of the policy's prompt set.
    """
    rl, prompts = config.rl, prompt_set(config.stage1.prompt_set)
    limits = ServiceLimits.from_config(rl, config.engine.slots("verifier"))
    service = PRMService(served, prompts, rl.verifier_sampling, limits, variant)
    return RewardJudge(
        service, rl.failures.num_retries, rl.verifier_votes, rl.min_votes, rl.hacking.constraints
    )


def _watch(config: SparkConfig, folder: Path, judge: RewardJudge | None) -> RewardHackingMonitor:
    """Probes have a service of their own, so that verifier.jsonl counts the rewards' verifications
    alone.
    """
    if judge is None:
        return RewardHackingMonitor(config, folder)
    held_out = None
    if (model := config.rl.hacking.heldout_verifier) is not None:
        served = ServedModel.load(config.engine, model, "verifier", folder / SERVERS / "heldout")
        held_out = reward_judge(config, served, Variant.PRM_COT)
    reward = MODEL_REWARDS[config.rl.reward]

    def score(rollout: Rollout) -> float | Failure:
        verdict = rollout.verdict
        return shape_reward(config.rl, rollout, reward(verdict.violation, verdict.outcome))

    probing = reward_judge(config, judge.service.served, judge.service.variant).service
    return RewardHackingMonitor(
        config,
        folder,
        probing,
        held_out,
        score,
    )


def answer_checker(config: SparkConfig) -> Checker:
    """The RLVR baseline's reward: the one place where an answer key reaches training. An answer
    that could not be compared within the checker's limits is neither right nor wrong, and
    ``rl.failures`` says what it costs.
    """
    path = config.data.rl_answers
    assert path is not None, "check_stage3 asks for it"
    keys = read_answer_keys(path)

    def check(responses: Sequence[tuple[str, str]]) -> list[bool | Failure]:
        for problem_id, _ in responses:
            if problem_id not in keys:
                raise ConfigError(f"data.rl_answers={path}: no answer for problem {problem_id}")
        said = grade_answers(
            [(extract_boxed(text), keys[problem_id].answer) for problem_id, text in responses]
        )
        return [
            EngineError(f"answer checker: {one}")
            if one in (AnswerGrade.TIMEOUT, AnswerGrade.CRASHED)
            else one is AnswerGrade.EQUAL
            for one in said
        ]

    return check


def sample_rows(batch: RolloutBatch, step: int) -> list[dict[str, object]]:
    """A few random samples of a batch with what was decided about each step; nothing here trains."""
    chosen = random.Random(step).sample(
        range(len(batch.rollouts)), min(_SAMPLES_PER_STEP, len(batch.rollouts))
    )
    return [sample_row(batch, index, step) for index in sorted(chosen)]


def sample_row(batch: RolloutBatch, index: int, step: int) -> dict[str, object]:
    """One sample with everything that was decided about it."""
    rollout = batch.rollouts[index]
    parsed = rollout.parsed
    verdict = rollout.verdict
    outcome = verdict.outcome if verdict is not None else None
    return {
        "step": step,
        "problem_id": rollout.problem.problem_id,
        "question": rollout.problem.question,
        "text": rollout.text,
        "steps": list(parsed.step_texts) if isinstance(parsed, ParsedResponse) else None,
        "step_labels": list(outcome.step_labels) if isinstance(outcome, Verdict) else None,
        "violation": verdict.violation.rule if verdict and verdict.violation else None,
        "outcome": outcome_to_json(outcome) if outcome else None,
        "reward": rollout.reward if rollout.valid else None,
    }


def rewrite_rows(path: Path, step: int, rows: list[dict[str, object]]) -> None:
    """Put ``rows`` at ``step``, dropping rows from that step on: a resumed run writes them again."""
    lines = path.read_text().splitlines() if path.exists() else []
    kept = [line for line in lines if json.loads(line)["step"] < step]
    write_text_atomic(
        path, "".join(line + "\n" for line in [*kept, *(json.dumps(row) for row in rows)])
    )
