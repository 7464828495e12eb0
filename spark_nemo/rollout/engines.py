"""Load the engines of stage III and build what queries them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from spark_nemo.config import ConfigError, SparkConfig
from spark_nemo.config.designs import reads_answer_keys
from spark_nemo.config.reward import HeldoutVerifier
from spark_nemo.engines.async_utils import freeze_heap, run_async
from spark_nemo.engines.served_model import ServedModel
from spark_nemo.evaluation.answers import grade_answers, read_answer_keys
from spark_nemo.evaluation.checker import AnswerGrade
from spark_nemo.grammar import Variant, extract_boxed, prompt_set
from spark_nemo.planning.preflight import reward_model_folder
from spark_nemo.records import EngineError, Failure
from spark_nemo.rewards import Checker
from spark_nemo.rewards.judge import RewardJudge
from spark_nemo.rewards.prm_service import PRMService, ServiceLimits

SERVERS = "servers"
"""Folder of the logs of launched servers."""


@dataclass(frozen=True, slots=True)
class RolloutEngines:
    """The policy and, as the configuration asks for them, what scores its responses."""

    policy: ServedModel
    judge: RewardJudge | None
    held_out: RewardJudge | None
    """A second verifier, which the policy is not trained against."""
    checker: Checker | None

    @classmethod
    def load(
        cls, config: SparkConfig, folder: Path, verifier: ServedModel | None = None
    ) -> RolloutEngines:
        """Load all engines; a ``verifier`` that is given takes the reward model's place.

        Raises ``ConfigError`` when the reward model is missing.
        """
        folder.mkdir(parents=True, exist_ok=True)
        rl = config.rl
        checker = answer_checker(config) if reads_answer_keys(rl.design) else None
        judge = None
        held_out = None
        if rl.asks_reward_model:
            served = verifier or ServedModel.load(
                config.engine, reward_model_folder(config), "verifier", folder / SERVERS
            )
            judge = reward_judge(config, served, Variant(config.reward_variant))
        policy = ServedModel.load(config.engine, config.models.policy, "policy", folder / SERVERS)
        freeze_heap()
        if judge is not None and isinstance(rl.reward.heldout, HeldoutVerifier):
            served = ServedModel.load(
                config.engine, rl.reward.heldout.model, "verifier", folder / SERVERS / "heldout"
            )
            held_out = reward_judge(config, served, Variant.PRM_COT)
        return cls(policy, judge, held_out, checker)

    def close(self) -> None:
        """Release all engines, even if releasing one of them fails."""
        with ExitStack() as stack:
            for served in self._served():
                stack.callback(_close, served)

    def _served(self) -> list[ServedModel]:
        judges = [judge for judge in (self.judge, self.held_out) if judge is not None]
        return [self.policy, *(judge.service.served for judge in judges)]


def _close(served: ServedModel) -> None:
    run_async(served.engine.close())


def reward_judge(config: SparkConfig, served: ServedModel, variant: Variant) -> RewardJudge:
    """Build the judge over a reward model.

    It is prompted with the words that stage II trained it on, not with the policy's prompt set.
    """
    reward = config.rl.reward
    service = PRMService(
        served,
        prompt_set(config.stage1.prompt_set),
        reward.sampling,
        ServiceLimits.from_config(reward, config.engine.slots("verifier")),
        variant,
    )
    return RewardJudge(
        service,
        retries=reward.retries,
        votes=reward.votes,
        min_votes=reward.votes_needed,
        constraints=reward.constraints,
    )


def answer_checker(config: SparkConfig) -> Checker:
    """Build the RLVR baseline's reward: the one place where an answer key reaches training.

    An answer that could not be compared within the checker's limits is neither right nor wrong;
    ``rl.reward.failures`` decides what it costs.
    """
    path = config.data.rl_answers
    assert path is not None, "check_stage3 requires it"
    keys = read_answer_keys(path)

    def check(responses: Sequence[tuple[str, str]]) -> list[bool | Failure]:
        for problem_id, _ in responses:
            if problem_id not in keys:
                raise ConfigError(f"data.rl_answers={path}: no answer for problem {problem_id}")
        grades = grade_answers(
            [(extract_boxed(text), keys[problem_id].answer) for problem_id, text in responses]
        )
        return [_as_score(grade) for grade in grades]

    return check


def _as_score(grade: AnswerGrade) -> bool | Failure:
    if grade in (AnswerGrade.TIMEOUT, AnswerGrade.CRASHED):
        return EngineError(f"answer checker: {grade}")
    return grade is AnswerGrade.EQUAL
