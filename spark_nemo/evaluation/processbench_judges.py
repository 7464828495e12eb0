"""A model on ProcessBench: it is asked about every case, once or several times, and what it said
becomes votes.

Two kinds of judge: our reward models in the format they were trained on, and any chat model as the
benchmark's critic.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from spark_nemo.config import ConfigError, SamplingConfig
from spark_nemo.engines.base import EngineFailure, EngineLost
from spark_nemo.engines.served_model import ServedModel
from spark_nemo.grammar import (
    PromptSet,
    Variant,
    legal_step_text,
    parse_verifier_output,
    render_solution,
)
from spark_nemo.grammar.critic_prompt import CRITIC_VERSION, critic_messages
from spark_nemo.grammar.prompts import ChatMessages
from spark_nemo.records import EngineError, derive_seed, outcome_kind
from spark_nemo.utils.files import write_json_atomic

from .processbench import ProcessBenchCase, boxed_vote, majority_vote, predict_first_error
from .reading import DataFileError
from .saved_predictions import SavedScore, score_votes


@dataclass(frozen=True, slots=True)
class Reply:
    """What the model said to one question. ``finish_reason`` is None when the engine refused it, as
    ``error`` says.
    """

    text: str
    num_tokens: int
    finish_reason: str | None
    error: str = ""


class Judge(ABC):
    """How a model is asked about a case, and which step its reply votes for."""

    name: str
    version: str

    @abstractmethod
    def messages(self, case: ProcessBenchCase) -> ChatMessages:
        """The question."""

    @abstractmethod
    def vote(self, reply: Reply, case: ProcessBenchCase) -> tuple[str | None, str]:
        """The string voted for (None does not vote) and the kind of outcome, for counting."""


class Critic(Judge):
    """Any chat model. Its last box votes, whatever is in it, also when the reply was cut off: the
    official rule.
    """

    name, version = "critic", CRITIC_VERSION

    def messages(self, case: ProcessBenchCase) -> ChatMessages:
        return critic_messages(case.problem, case.steps)

    def vote(self, reply: Reply, case: ProcessBenchCase) -> tuple[str | None, str]:
        if reply.finish_reason is None:
            return None, "engine_error"
        box = boxed_vote(reply.text)
        return box, "no_box" if box is None else "boxed"


class RewardModelJudge(Judge):
    """A PRM or PRM-CoT: its verdict's first wrong step votes; what is no verdict does not.

    An ORM can be asked the same way, but ``vote`` raises ``ValueError`` for its verdict (see
    ``check_names_steps``).
    """

    def __init__(self, variant: Variant | str, prompts: PromptSet) -> None:
        self.variant, self.prompts = Variant(variant), prompts
        self.name, self.version = str(self.variant), prompts.version

    def messages(self, case: ProcessBenchCase) -> ChatMessages:
        steps = []
        for index, step in enumerate(case.steps):
            try:
                steps.append(legal_step_text(step))
            except ValueError:
                raise DataFileError(
                    f"case {case.case_id!r}: step {index} of 'steps', {step!r}, has no content, so a "
                    "reward model cannot be shown it: leave the case out"
                ) from None
        solution = render_solution(steps, None)
        return self.prompts.reward(self.variant, case.problem, solution)

    def vote(self, reply: Reply, case: ProcessBenchCase) -> tuple[str | None, str]:
        if reply.finish_reason is None:
            return None, outcome_kind(EngineError(reply.error))
        outcome = parse_verifier_output(
            reply.text, reply.finish_reason, reply.num_tokens, len(case.steps), self.variant
        )
        first = predict_first_error(outcome)
        return None if first is None else str(first), outcome_kind(outcome)


def judge_processbench(
    served: ServedModel,
    judge: Judge,
    splits: Mapping[str, Sequence[ProcessBenchCase]],
    sampling: SamplingConfig,
    votes: int,
    in_flight: int,
    output: Path,
) -> SavedScore:
    """Ask ``votes`` times about every case, save what was said to ``output``, and score the
    majority by split.

    The file holds every text and can be scored again (``score_saved_predictions``). A question that
    the engine refuses, too long a prompt for example, is a vote missing, counted by kind. Closes
    the engine. Raises ``ConfigError`` for several votes without randomness, ``EngineFailure`` when
    the engine stopped on the way.
    """
    check_votes(votes, sampling)
    cases = [case for split in splits.values() for case in split]
    replies = asyncio.run(_ask_and_close(served, cases, judge.messages, sampling, votes, in_flight))
    rows, cast = [], {}
    for case, said in zip(cases, replies):
        votes_and_kinds = [judge.vote(reply, case) for reply in said]
        cast[case.case_id] = [vote for vote, _ in votes_and_kinds]
        texts = [reply.text for reply in said]
        rows.append(
            {
                "id": case.case_id,
                "label": case.label,
                "prediction": majority_vote(cast[case.case_id]),
                **(
                    {"generated_critique": texts}
                    if judge.name == Critic.name
                    else {"votes": cast[case.case_id], "texts": texts}
                ),
                "kinds": [kind for _, kind in votes_and_kinds],
                "num_tokens": sum(reply.num_tokens for reply in said),
                **(
                    {"errors": errors}
                    if (errors := [reply.error for reply in said if reply.error])
                    else {}
                ),
            }
        )
    score = score_votes(splits, cast)
    write_json_atomic(
        output,
        {
            "judge": judge.name,
            "prompt": judge.version,
            "model": served.fingerprint,
            "votes": votes,
            "sampling": vars(sampling),
            "average_f1": score.average,
            "splits": {
                name: {
                    "acc_error": split.acc_error,
                    "acc_correct": split.acc_correct,
                    "f1": split.f1,
                    "num_error": split.num_error,
                    "num_correct": split.num_correct,
                    "num_unparsed": split.num_unparsed,
                }
                for name, split in score.splits.items()
            },
            "kinds": dict(Counter(kind for row in rows for kind in row["kinds"])),
            "num_tokens": sum(row["num_tokens"] for row in rows),
            "cases": rows,
        },
    )
    return score


def check_names_steps(variant: str) -> None:
    """Raise ``ConfigError`` for a kind of reward model that has no ProcessBench score."""
    if variant == Variant.ORM:
        raise ConfigError(
            "stage2.variant=orm: an ORM names no step and has no ProcessBench score; `spark-nemo stage2` "
            "scores its verdicts on whole solutions"
        )


def check_votes(votes: int, sampling: SamplingConfig) -> None:
    """Raise ``ConfigError`` for a number of votes that makes no sense under this sampling."""
    if votes < 1:
        raise ConfigError(f"--votes={votes}: must be at least 1")
    if votes > 1 and sampling.temperature == 0:
        raise ConfigError(
            f"--votes={votes} with stage2.eval_sampling.temperature=0: every vote would be the same; the "
            "benchmark's authors use stage2.eval_sampling.temperature=1.0 stage2.eval_sampling.top_p=0.9"
        )


async def ask_all(
    served: ServedModel,
    cases: Sequence[ProcessBenchCase],
    messages: Callable[[ProcessBenchCase], ChatMessages],
    sampling: SamplingConfig,
    votes: int,
    in_flight: int,
) -> list[list[Reply]]:
    """``votes`` replies to the question about each case; at most ``in_flight`` are under way at
    once.

    Seeds depend on case and vote alone. Raises ``EngineFailure`` when the engine stopped on the
    way: there is no score; before anything is asked, ``DataFileError`` for a case that ``messages``
    cannot show.
    """
    for case in cases:
        messages(case)
    slots = asyncio.Semaphore(in_flight)

    async def ask(case: ProcessBenchCase, vote: int) -> Reply:
        async with slots:
            try:
                done = await served.complete(
                    messages(case), sampling, derive_seed("critic", case.case_id, vote)
                )
            except EngineLost:
                raise
            except EngineFailure as failure:
                return Reply("", 0, None, str(failure))
        return Reply(done.text, len(done.generation.token_ids), str(done.generation.finish_reason))

    flat = await asyncio.gather(*(ask(case, vote) for case in cases for vote in range(votes)))
    if not (await served.engine.health()).alive:
        raise EngineFailure(
            "the engine stopped during the evaluation on ProcessBench: there is no score, run again"
        )
    return [flat[start : start + votes] for start in range(0, len(flat), votes)]


async def _ask_and_close(served: ServedModel, *arguments: object) -> list[list[Reply]]:
    try:
        return await ask_all(served, *arguments)
    finally:
        await served.engine.close()
