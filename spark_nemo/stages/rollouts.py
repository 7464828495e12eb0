"""The generating half of stage III: sample groups, judge every response as soon as it is finished, score the batch."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from spark_nemo.config import FailurePolicy, RLConfig
from spark_nemo.engines.served import ServedModel
from spark_nemo.evaluation.answers import normalise_answer
from spark_nemo.grammar import (
    ParsedResponse,
    PromptSet,
    StepFormat,
    Variant,
    decode_tokens,
    split_response,
    token_spans,
)
from spark_nemo.records import Failure, Problem, Rollout, TokenSpan, Verdict, derive_seed
from spark_nemo.rewards import (
    RewardBatch,
    apply_failure_policy,
    majority_rewards,
    process_aware_reward,
    random_reward,
    rlvr_reward,
    step_augmented_reward,
    step_average_reward,
)
from spark_nemo.rewards.hacking.constraints import read_response
from spark_nemo.rewards.judge import Judgement, RewardJudge
from spark_nemo.rewards.length import overlong_penalty
from spark_nemo.rewards.rlvr import Checker
from spark_nemo.stages.timeline import GENERATE, VERIFY, Timeline

Judged = tuple[Rollout, Judgement | None]
"""A rollout and, where a reward model is asked, what became of it."""
MODEL_REWARDS = {
    "process_aware": process_aware_reward, "step_average": step_average_reward, "step_augmented": step_augmented_reward,
}


@dataclass(frozen=True, slots=True)
class ScoredBatch:
    """One step's rollouts with their rewards; ``judgements`` is empty for the baselines without a reward model.

    ``consumed`` is how many prompts of the data went into it, when that is not the number of its groups.
    """

    rollouts: tuple[Rollout, ...]
    rewards: RewardBatch
    judgements: tuple[Judgement, ...]
    metrics: dict[str, float]
    consumed: int | None = None


@dataclass(frozen=True, slots=True)
class RolloutSession:
    """What the main rank needs to make a batch: the policy's engine and what the reward asks, if anything."""

    policy: ServedModel
    prompts: PromptSet
    config: RLConfig
    seed: int
    judge: RewardJudge | None
    checker: Checker | None
    timeline: Timeline = field(default_factory=Timeline)

    async def batch(self, problems: Sequence[Problem], step: int) -> ScoredBatch:
        """``group_size`` rollouts of every problem, scored.

        Raises ``EngineFailure`` when the policy's engine fails (a group must be whole) and ``FailureRateExceeded``.
        """
        await self.refresh()
        groups = await asyncio.gather(*(self.group(number, problem, step) for number, problem in enumerate(problems)))
        return self.scored([judged for group in groups for judged in group], step, self.config.failures)

    async def refresh(self) -> None:
        """Before every batch: results of a reward model that has changed are not used again."""
        if self.judge is not None:
            await self.judge.service.refresh()

    async def group(self, number: int, problem: Problem, step: int, again: int = 0) -> list[Judged]:
        """The rollouts of one problem, each judged as soon as it is finished, while its siblings still decode.

        ``again`` counts earlier groups of the same problem in this step: they must not draw the same samples.
        """
        return await asyncio.gather(
            *(self._one(number, problem, index, step, again) for index in range(self.config.group_size)))

    def scored(self, judged: Sequence[Judged], step: int, failures: FailurePolicy) -> ScoredBatch:
        """The batch of whole groups, in order. Raises ``FailureRateExceeded``."""
        rollouts = tuple(rollout for rollout, _ in judged)
        judgements = tuple(judgement for _, judgement in judged if judgement is not None)
        scores = self._shaped(rollouts, self._scores(rollouts, judgements, step))
        shown = sum(judgement.outcome is not None for judgement in judgements)
        rewards = apply_failure_policy(scores, failures, num_verifications=shown if self.judge else None)
        labels_steps = self.judge is None or self.judge.service.variant is not Variant.ORM
        return ScoredBatch(rollouts, rewards, judgements, batch_metrics(
            rollouts, rewards, judgements, labels_steps=labels_steps))

    async def _one(self, group: int, problem: Problem, index: int, step: int, again: int) -> Judged:
        seed = derive_seed("rollout", self.seed, step, problem.problem_id, index, *([again] if again else []))
        with self.timeline.during(GENERATE, step):
            done = await self.policy.complete(self.prompts.policy(problem.question), self.config.sampling, seed)
        generation = done.generation
        rollout = Rollout(
            problem=problem, group=group, prompt_ids=done.prompt_ids, response_ids=generation.token_ids,
            logprobs=generation.logprobs, weight_versions=generation.weight_versions, text=done.text,
            finish_reason=str(generation.finish_reason), step_spans=self._spans(generation.token_ids))
        if self.judge is None:
            return rollout, None
        with self.timeline.during(VERIFY, step):
            return rollout, await self.judge.judge(rollout)

    def _spans(self, response_ids: tuple[int, ...]) -> tuple[TokenSpan, ...]:
        token_bytes = self.policy.tokenizer.token_bytes(response_ids)
        if response_ids and response_ids[-1] in self.policy.tokenizer.eos_ids:
            token_bytes[-1] = b""
        parsed = split_response(decode_tokens(token_bytes), StepFormat.TAGGED)
        return token_spans(token_bytes, parsed) if isinstance(parsed, ParsedResponse) else ()

    def _scores(
        self, rollouts: Sequence[Rollout], judgements: Sequence[Judgement], step: int
    ) -> list[float | Failure]:
        match self.config.reward:
            case "majority":
                return list(majority_rewards(rollouts, normalise_answer))
            case "random":
                rules, first = self.config.hacking.constraints, rollouts[0].group * self.config.group_size
                return [random_reward(read_response(rollout, rules),
                                      derive_seed("random-reward", self.seed, step, position))
                        for position, rollout in enumerate(rollouts, start=first)]
            case "rlvr":
                assert self.checker is not None
                return [rlvr_reward(rollout, self.checker) for rollout in rollouts]
        return [MODEL_REWARDS[self.config.reward](j.violation, j.outcome) for j in judgements]

    def _shaped(self, rollouts: Sequence[Rollout], scores: Sequence[float | Failure]) -> list[float | Failure]:
        """The scores with the configured bounds on steps and length; a failure stays the failure it is."""
        low, high = self.config.selective_min_steps, self.config.selective_max_steps
        shaped: list[float | Failure] = []
        for rollout, score in zip(rollouts, scores, strict=True):
            if isinstance(score, float) and not (low or 0) <= len(rollout.step_spans) <= (high or math.inf):
                score = 0.0
            if isinstance(score, float) and (buffer := self.config.overlong_buffer) is not None:
                score += overlong_penalty(len(rollout.response_ids), self.config.sampling.max_new_tokens, buffer)
            shaped.append(score)
        return shaped


def batch_metrics(
    rollouts: Sequence[Rollout], rewards: RewardBatch, judgements: Sequence[Judgement], *, labels_steps: bool = True,
) -> dict[str, float]:
    """Means over the batch, as fractions or tokens; ``failure/...`` are shares of the verifications asked for.

    Without ``labels_steps`` (an ORM) there is no ``correct_step_fraction``: it would be a 0 that nobody said.
    """
    valid = [reward for reward, ok in zip(rewards.rewards, rewards.valid) if ok]
    violations = Counter(j.violation.rule for j in judgements if j.violation is not None)
    verdicts = [j.outcome for j in judgements if isinstance(j.outcome, Verdict)]
    correct_steps = {"correct_step_fraction": (
        sum(sum(v.step_labels) for v in verdicts) / max(1, sum(len(v.step_labels) for v in verdicts)))}
    return {
        "reward": sum(valid) / max(1, len(valid)),
        "valid_fraction": len(valid) / len(rollouts),
        "response_tokens": sum(len(r.response_ids) for r in rollouts) / len(rollouts),
        "truncated_fraction": sum(r.finish_reason == "length" for r in rollouts) / len(rollouts),
        "steps_per_response": sum(len(r.step_spans) for r in rollouts) / len(rollouts),
        "format_violations": sum(violations.values()) / len(rollouts),
        "failure_rate": rewards.failure_rate,
        **(correct_steps if labels_steps else {}),
        "sampled_tokens": float(sum(len(r.response_ids) for r in rollouts)),
        "verifier_tokens": float(sum(j.num_tokens for j in judgements)),
        **{f"failure/{kind}": rate for kind, rate in rewards.failure_rates.items()},
        **{f"violation/{rule}": count / len(rollouts) for rule, count in sorted(violations.items())},
    }
