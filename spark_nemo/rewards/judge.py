"""The PRM-CoT as a judge of rollouts: gate the format, ask, retry what gave no verdict, and keep the reason."""

from __future__ import annotations

from dataclasses import dataclass

from spark_nemo.config import SamplingConfig
from spark_nemo.engines.base import EngineFailure, EngineLost
from spark_nemo.engines.served import ServedModel
from spark_nemo.grammar import (
    ParsedResponse,
    PromptSet,
    StepFormat,
    Variant,
    check_format,
    parse_generation,
    split_response,
)
from spark_nemo.records import EngineError, FormatViolation, Outcome, Rollout, Verdict, derive_seed


@dataclass(frozen=True, slots=True)
class Judgement:
    """What became of one rollout. ``outcome`` is None exactly when the format gate kept it from the verifier."""

    violation: FormatViolation | None
    outcome: Outcome | None
    num_tokens: int = 0


def gate(rollout: Rollout) -> ParsedResponse | FormatViolation:
    """The format gate f: the response in its steps, or the rule it broke.

    A truncated rollout breaks the format whatever its text says: nobody knows how it would have ended.
    """
    violation = FormatViolation("unfinished") if rollout.finish_reason != "stop" else check_format(rollout.text)
    parsed = split_response(rollout.text, StepFormat.TAGGED)
    if violation is not None or not isinstance(parsed, ParsedResponse):
        return violation or FormatViolation("steps")
    return parsed


@dataclass(frozen=True, slots=True)
class RewardJudge:
    """A served PRM-CoT with its prompts. ``retries`` fresh attempts follow an outcome that is no verdict."""

    served: ServedModel
    prompts: PromptSet
    sampling: SamplingConfig
    retries: int

    async def judge(self, rollout: Rollout) -> Judgement:
        """Check the format, then verify the canonical steps, so policy and reward model share one text."""
        parsed = gate(rollout)
        if isinstance(parsed, FormatViolation):
            return Judgement(parsed, None)
        outcome: Outcome = EngineError("never asked")
        num_tokens = 0
        for attempt in range(self.retries + 1):
            outcome, used = await self._ask(rollout, parsed, attempt)
            num_tokens += used
            # A greedy attempt would fail the same way again, unless it was the engine that failed.
            repeats = self.sampling.temperature == 0 and not isinstance(outcome, EngineError)
            if isinstance(outcome, Verdict) or repeats:
                break
        return Judgement(None, outcome, num_tokens)

    async def _ask(self, rollout: Rollout, parsed: ParsedResponse, attempt: int) -> tuple[Outcome, int]:
        messages = self.prompts.reward(Variant.PRM_COT, rollout.problem.question, parsed.canonical())
        seed = derive_seed("judge", rollout.problem.problem_id, rollout.text, attempt)
        try:
            completion = await self.served.complete(messages, self.sampling, seed)
        except EngineLost:  # no failed verification: there is nobody left to ask
            raise
        except EngineFailure as failure:
            return EngineError(str(failure)), 0
        num_tokens = len(completion.generation.token_ids)
        outcome = parse_generation(
            completion.text, str(completion.generation.finish_reason), num_tokens, len(parsed.steps))
        return outcome, num_tokens
