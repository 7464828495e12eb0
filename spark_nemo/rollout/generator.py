"""Sample groups of rollouts, judge each response as soon as it is finished, score the batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from spark_nemo.config import RLConfig
from spark_nemo.config.rl import OverlongShaping
from spark_nemo.engines.async_utils import all_or_none
from spark_nemo.engines.served_model import ServedModel
from spark_nemo.grammar import (
    PromptSet,
    StepFormat,
    decode_tokens,
    split_response,
    token_spans,
)
from spark_nemo.records import Failure, ParsedResponse, Problem, Rollout, derive_seed
from spark_nemo.rewards import (
    Checker,
    FailureCount,
    RewardContext,
    apply_failure_policy,
    compute_scores,
)
from spark_nemo.rewards.designs import overlong_penalty
from spark_nemo.rewards.judge import RewardJudge

from .batch import RolloutBatch, batch_metrics
from .timeline import GENERATE, VERIFY, Timeline


@dataclass(frozen=True, slots=True)
class RolloutGenerator:
    """The policy's engine and, as the reward needs them, a judge or an answer checker."""

    policy: ServedModel
    prompts: PromptSet
    config: RLConfig
    seed: int
    judge: RewardJudge | None
    checker: Checker | None
    timeline: Timeline = field(default_factory=Timeline)
    failures: FailureCount = field(default_factory=FailureCount)

    async def generate_batch(self, problems: Sequence[Problem], step: int) -> RolloutBatch:
        """Return ``group_size`` rollouts of every problem, scored.

        Raises ``EngineFailure`` when the policy's engine fails (a group must be whole) and
        ``FailureRateExceeded``.
        """
        await self.refresh()
        groups = await all_or_none(
            self.generate_group(number, problem, step) for number, problem in enumerate(problems)
        )
        return self.score([rollout for group in groups for rollout in group], step)

    async def refresh(self) -> None:
        """Discard cached verifications of a reward model that has changed; call before a batch."""
        if self.judge is not None:
            await self.judge.service.refresh()

    async def generate_group(
        self, number: int, problem: Problem, step: int, repeat: int = 0
    ) -> list[Rollout]:
        """Return the judged rollouts of one problem.

        ``repeat`` counts earlier groups of the same problem in this step: they must not draw the
        same samples.
        """
        # Each rollout is judged inside its own task, while its siblings still decode.
        return await all_or_none(
            self._generate_one(number, problem, index, step, repeat)
            for index in range(self.config.group_size)
        )

    def score(
        self, rollouts: list[Rollout], step: int, *, count_failures: bool = True
    ) -> RolloutBatch:
        """Set ``reward`` and ``valid`` of whole groups in order, and return them as a batch.

        Raises ``FailureRateExceeded``, unless ``count_failures`` is off.
        """
        context = RewardContext(self.seed, step, self.config.group_size, self.checker)
        scores = [
            shape_reward(self.config, rollout, score)
            for rollout, score in zip(
                rollouts, compute_scores(rollouts, self.config.reward, context), strict=True
            )
        ]
        num_verifications = len(scores)
        if self.judge is not None:
            num_verifications = sum(
                rollout.verdict is not None and rollout.verdict.outcome is not None
                for rollout in rollouts
            )
        if count_failures:
            self.failures.add(scores, num_verifications, self.config.failures.max_rate)
        rewards = apply_failure_policy(
            scores, self.config.failures, num_verifications=num_verifications
        )
        for rollout, reward, valid in zip(rollouts, rewards.rewards, rewards.valid):
            rollout.reward = reward
            rollout.valid = valid
        return RolloutBatch(rollouts, batch_metrics(rollouts, rewards.failure_rates))

    async def _generate_one(
        self, group: int, problem: Problem, index: int, step: int, repeat: int
    ) -> Rollout:
        seed_parts = ["rollout", self.seed, step, problem.problem_id, index]
        if repeat:
            seed_parts.append(repeat)
        with self.timeline.during(GENERATE, step):
            completion = await self.policy.complete(
                self.prompts.policy(problem.question),
                self.config.sampling,
                derive_seed(*seed_parts),
            )
        generation = completion.generation
        token_bytes = self.policy.tokenizer.token_bytes(generation.token_ids)
        if generation.token_ids and generation.token_ids[-1] in self.policy.tokenizer.eos_ids:
            token_bytes[-1] = b""
        # The text is decoded from the very bytes that the spans count, so that both always fit.
        text = decode_tokens(token_bytes)
        parsed = split_response(text, StepFormat.TAGGED)
        rollout = Rollout(
            problem=problem,
            group=group,
            prompt_ids=completion.prompt_ids,
            response_ids=generation.token_ids,
            logprobs=generation.logprobs,
            weight_versions=generation.weight_versions,
            text=text,
            finish_reason=str(generation.finish_reason),
            step_spans=(
                token_spans(token_bytes, parsed) if isinstance(parsed, ParsedResponse) else ()
            ),
            parsed=parsed,
        )
        if self.judge is not None:
            with self.timeline.during(VERIFY, step):
                rollout.verdict = await self.judge.judge(rollout)
        return rollout


def shape_reward(config: RLConfig, rollout: Rollout, score: float | Failure) -> float | Failure:
    """Apply the configured bounds on steps and length to a score; a failure stays a failure."""
    if not isinstance(score, float):
        return score
    score = config.advantage.outcome_reward(score, len(rollout.step_spans))
    if isinstance(config.shaping, OverlongShaping):
        score += overlong_penalty(
            len(rollout.response_ids), config.sampling.max_new_tokens, config.shaping.buffer
        )
    return score
