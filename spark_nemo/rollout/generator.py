"""The generating half of stage III: sample groups, judge every response as soon as it is finished,
score the batch.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from spark_nemo.config import RLConfig
from spark_nemo.engines.async_utils import all_or_none
from spark_nemo.engines.served_model import ServedModel
from spark_nemo.evaluation.answers import normalise_answer
from spark_nemo.grammar import (
    ParsedResponse,
    PromptSet,
    StepFormat,
    decode_tokens,
    split_response,
    token_spans,
)
from spark_nemo.records import (
    Failure,
    Problem,
    Rollout,
    RolloutVerdict,
    TokenSpan,
    Verdict,
    derive_seed,
)
from spark_nemo.rewards import (
    FailureCount,
    RewardBatch,
    apply_failure_policy,
    majority_rewards,
    process_aware_reward,
    random_reward,
    rlvr_rewards,
    step_augmented_reward,
    step_average_reward,
)
from spark_nemo.rewards.hacking.constraints import read_response
from spark_nemo.rewards.judge import RewardJudge
from spark_nemo.rewards.rlvr import Checker
from spark_nemo.rewards.shaping import overlong_penalty
from spark_nemo.rollout.timeline import GENERATE, VERIFY, Timeline

Judged = tuple[Rollout, RolloutVerdict | None]
"""A rollout and, where a reward model is asked, what became of it."""
MODEL_REWARDS = {
    "process_aware": process_aware_reward,
    "step_average": step_average_reward,
    "step_augmented": step_augmented_reward,
}


@dataclass(frozen=True, slots=True)
class ScoredBatch:
    """One step's rollouts with their rewards; ``judgements`` is empty for the baselines without a
    reward model.

    ``consumed`` is how many prompts of the data went into it, when that is not the number of its
    groups.
    """

    rollouts: tuple[Rollout, ...]
    rewards: RewardBatch
    judgements: tuple[RolloutVerdict, ...]
    metrics: dict[str, float]
    consumed: int | None = None


@dataclass(frozen=True, slots=True)
class RolloutGenerator:
    """What the main rank needs to make a batch: the policy's engine and what the reward asks, if
    anything.
    """

    policy: ServedModel
    prompts: PromptSet
    config: RLConfig
    seed: int
    judge: RewardJudge | None
    checker: Checker | None
    timeline: Timeline = field(default_factory=Timeline)
    failures: FailureCount = field(default_factory=FailureCount)

    async def batch(self, problems: Sequence[Problem], step: int) -> ScoredBatch:
        """``group_size`` rollouts of every problem, scored.

        Raises ``EngineFailure`` when the policy's engine fails (a group must be whole) and
        ``FailureRateExceeded``.
        """
        await self.refresh()
        groups = await all_or_none(
            self.group(number, problem, step) for number, problem in enumerate(problems)
        )
        return self.scored([judged for group in groups for judged in group], step)

    async def refresh(self) -> None:
        """Before every batch: results of a reward model that has changed are not used again."""
        if self.judge is not None:
            await self.judge.service.refresh()

    async def group(self, number: int, problem: Problem, step: int, again: int = 0) -> list[Judged]:
        """The rollouts of one problem, each judged as soon as it is finished, while its siblings
        still decode.

        ``again`` counts earlier groups of the same problem in this step: they must not draw the
        same samples.
        """
        return await all_or_none(
            self._one(number, problem, index, step, again)
            for index in range(self.config.group_size)
        )

    def scored(self, judged: Sequence[Judged], step: int, *, counts: bool = True) -> ScoredBatch:
        """The batch of whole groups, in order. Raises ``FailureRateExceeded``; not when its
        failures count nowhere.
        """
        rollouts = tuple(rollout for rollout, _ in judged)
        judgements = tuple(judgement for _, judgement in judged if judgement is not None)
        scores = [
            shaped(self.config, *pair)
            for pair in zip(rollouts, self._scores(rollouts, judgements, step), strict=True)
        ]
        shown = (
            sum(judgement.outcome is not None for judgement in judgements)
            if self.judge
            else len(scores)
        )
        if counts:
            self.failures.add(scores, shown, self.config.failures.bound)
        rewards = apply_failure_policy(scores, self.config.failures, num_verifications=shown)
        return ScoredBatch(
            rollouts, rewards, judgements, batch_metrics(rollouts, rewards, judgements)
        )

    async def _one(self, group: int, problem: Problem, index: int, step: int, again: int) -> Judged:
        seed = derive_seed(
            "rollout", self.seed, step, problem.problem_id, index, *([again] if again else [])
        )
        with self.timeline.during(GENERATE, step):
            done = await self.policy.complete(
                self.prompts.policy(problem.question), self.config.sampling, seed
            )
        generation = done.generation
        rollout = Rollout(
            problem=problem,
            group=group,
            prompt_ids=done.prompt_ids,
            response_ids=generation.token_ids,
            logprobs=generation.logprobs,
            weight_versions=generation.weight_versions,
            text=done.text,
            finish_reason=str(generation.finish_reason),
            step_spans=self._spans(generation.token_ids),
        )
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
        self, rollouts: Sequence[Rollout], judgements: Sequence[RolloutVerdict], step: int
    ) -> list[float | Failure]:
        match self.config.reward:
            case "majority":
                return list(majority_rewards(rollouts, normalise_answer))
            case "random":
                rules, first = (
                    self.config.hacking.constraints,
                    rollouts[0].group * self.config.group_size,
                )
                return [
                    random_reward(
                        read_response(rollout, rules),
                        derive_seed("random-reward", self.seed, step, position),
                    )
                    for position, rollout in enumerate(rollouts, start=first)
                ]
            case "rlvr":
                assert self.checker is not None
                return rlvr_rewards(rollouts, self.checker)
        return [MODEL_REWARDS[self.config.reward](j.violation, j.outcome) for j in judgements]


def shaped(config: RLConfig, rollout: Rollout, score: float | Failure) -> float | Failure:
    """The score with the configured bounds on steps and length; a failure stays the failure it is."""
    if not isinstance(score, float):
        return score
    low, high = config.selective_min_steps, config.selective_max_steps
    if not (low or 0) <= len(rollout.step_spans) <= (high or math.inf):
        score = 0.0
    if (buffer := config.overlong_buffer) is not None:
        score += overlong_penalty(len(rollout.response_ids), config.sampling.max_new_tokens, buffer)
    return score


def batch_metrics(
    rollouts: Sequence[Rollout],
    rewards: RewardBatch,
    judgements: Sequence[RolloutVerdict],
) -> dict[str, float]:
    """Means over the batch, as fractions or tokens; ``failure/...`` are shares of the verifications
    asked for.

    Where nobody labelled a step (an ORM, a baseline, no verdict at all) there is no
    ``correct_step_fraction``: it would be a 0 that nobody said.
    """
    valid = [reward for reward, ok in zip(rewards.rewards, rewards.valid) if ok]
    violations = Counter(j.violation.rule for j in judgements if j.violation is not None)
    verdicts = [j.outcome for j in judgements if isinstance(j.outcome, Verdict)]
    labels = [label for verdict in verdicts for label in verdict.step_labels]
    return {
        "reward": sum(valid) / max(1, len(valid)),
        "valid_fraction": len(valid) / len(rollouts),
        "response_tokens": sum(len(r.response_ids) for r in rollouts) / len(rollouts),
        "truncated_fraction": sum(r.finish_reason == "length" for r in rollouts) / len(rollouts),
        "steps_per_response": sum(len(r.step_spans) for r in rollouts) / len(rollouts),
        "format_violations": sum(violations.values()) / len(rollouts),
        "failure_rate": rewards.failure_rate,
        **({"correct_step_fraction": sum(labels) / len(labels)} if labels else {}),
        "sampled_tokens": float(sum(len(r.response_ids) for r in rollouts)),
        "verifier_tokens": float(sum(j.num_tokens for j in judgements)),
        **{f"failure/{kind}": rate for kind, rate in rewards.failure_rates.items()},
        **{
            f"violation/{rule}": count / len(rollouts) for rule, count in sorted(violations.items())
        },
    }
