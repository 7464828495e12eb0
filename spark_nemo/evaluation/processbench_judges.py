"""Ask a model about ProcessBench cases, once or several times, and score the majority of its votes.

Two kinds of judge: this project's reward models in the format they were trained on, and any chat
model as the benchmark's critic.
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
from spark_nemo.grammar.processbench_prompt import CRITIC_VERSION, critic_messages
from spark_nemo.grammar.prompts import ChatMessages
from spark_nemo.records import EngineError, derive_seed, outcome_kind
from spark_nemo.records.rows import DataFileError
from spark_nemo.utils.files import write_json_atomic

from .processbench import ProcessBenchCase, boxed_vote, majority_vote, predict_first_error
from .saved_predictions import SavedScore, score_votes


@dataclass(frozen=True, slots=True)
class Reply:
    """A model's reply; ``finish_reason`` is None when the engine failed with ``error``."""

    text: str
    num_tokens: int
    finish_reason: str | None
    error: str = ""


class Judge(ABC):
    """Prompt format for a case, and the reading of the step that a reply votes for."""

    name: str
    version: str

    @abstractmethod
    def messages(self, case: ProcessBenchCase) -> ChatMessages:
        """Return the prompt about a case."""

    @abstractmethod
    def vote(self, reply: Reply, case: ProcessBenchCase) -> tuple[str | None, str]:
        """Return the string voted for, None for no vote, and the kind of outcome for counting."""


class Critic(Judge):
    """Any chat model; its last box votes, also in a truncated reply (the official rule)."""

    name = "critic"
    version = CRITIC_VERSION

    def messages(self, case: ProcessBenchCase) -> ChatMessages:
        return critic_messages(case.problem, case.steps)

    def vote(self, reply: Reply, case: ProcessBenchCase) -> tuple[str | None, str]:
        if reply.finish_reason is None:
            return None, "engine_error"
        box = boxed_vote(reply.text)
        return box, "no_box" if box is None else "boxed"


class RewardModelJudge(Judge):
    """A PRM or PRM-CoT; its verdict's first wrong step votes, and a failure does not vote.

    An ORM can be prompted the same way, but ``vote`` raises ``ValueError`` for its verdict.
    """

    def __init__(self, variant: Variant | str, prompts: PromptSet) -> None:
        self.variant = Variant(variant)
        self.prompts = prompts
        self.name = str(self.variant)
        self.version = prompts.version

    def messages(self, case: ProcessBenchCase) -> ChatMessages:
        steps = []
        for index, step in enumerate(case.steps):
            try:
                steps.append(legal_step_text(step))
            except ValueError:
                raise DataFileError(
                    f"case {case.case_id!r}: step {index} of 'steps', {step!r}, has no content, "
                    "and the reward model's prompt cannot show it; leave the case out"
                ) from None
        solution = render_solution(steps, None)
        return self.prompts.reward(self.variant, case.problem, solution)

    def vote(self, reply: Reply, case: ProcessBenchCase) -> tuple[str | None, str]:
        if reply.finish_reason is None:
            return None, outcome_kind(EngineError(reply.error))
        outcome = parse_verifier_output(
            reply.text, reply.finish_reason, reply.num_tokens, len(case.steps), self.variant
        )
        first_error = predict_first_error(outcome)
        vote = None if first_error is None else str(first_error)
        return vote, outcome_kind(outcome)


def evaluate_processbench(
    served: ServedModel,
    judge: Judge,
    splits: Mapping[str, Sequence[ProcessBenchCase]],
    sampling: SamplingConfig,
    votes: int,
    in_flight: int,
    output: Path,
) -> SavedScore:
    """Collect ``votes`` replies about every case, save them to ``output`` and score the majority.

    The file has every text and can be scored again (``score_saved_predictions``). A request that
    fails, for example for a prompt that is too long, is a missing vote, counted by kind. Closes the
    engine. Raises ``ConfigError`` for several votes without randomness, and ``EngineFailure`` when
    the engine stops on the way.
    """
    check_votes(votes, sampling)
    cases = [case for split in splits.values() for case in split]
    replies = asyncio.run(_ask_and_close(served, cases, judge.messages, sampling, votes, in_flight))
    rows = []
    votes_by_case = {}
    for case, case_replies in zip(cases, replies):
        row, case_votes = _case_row(judge, case, case_replies)
        rows.append(row)
        votes_by_case[case.case_id] = case_votes
    score = score_votes(splits, votes_by_case)
    write_json_atomic(
        output,
        {
            "judge": judge.name,
            "prompt": judge.version,
            "model": served.fingerprint,
            "votes": votes,
            "sampling": vars(sampling),
            "average_f1": score.average,
            "splits": {name: split.as_json() for name, split in score.splits.items()},
            "kinds": dict(Counter(kind for row in rows for kind in row["kinds"])),
            "num_tokens": sum(row["num_tokens"] for row in rows),
            "cases": rows,
        },
    )
    return score


def _case_row(
    judge: Judge, case: ProcessBenchCase, replies: Sequence[Reply]
) -> tuple[dict, list[str | None]]:
    """Return a case's row of the output file, and its votes."""
    votes = []
    kinds = []
    for reply in replies:
        vote, kind = judge.vote(reply, case)
        votes.append(vote)
        kinds.append(kind)
    texts = [reply.text for reply in replies]
    row = {"id": case.case_id, "label": case.label, "prediction": majority_vote(votes)}
    if judge.name == Critic.name:
        # The official code's name, so that its own scorer reads the file, too.
        row["generated_critique"] = texts
    else:
        row["votes"] = votes
        row["texts"] = texts
    row["kinds"] = kinds
    row["num_tokens"] = sum(reply.num_tokens for reply in replies)
    errors = [reply.error for reply in replies if reply.error]
    if errors:
        row["errors"] = errors
    return row, votes


def check_names_steps(variant: str) -> None:
    """Raise ``ConfigError`` for a kind of reward model without a ProcessBench score."""
    if variant == Variant.ORM:
        raise ConfigError(
            "stage2.variant=orm: an ORM names no step and has no ProcessBench score; "
            "`spark-nemo stage2` scores its verdicts on whole solutions"
        )


def check_votes(votes: int, sampling: SamplingConfig) -> None:
    """Raise ``ConfigError`` for a number of votes that this sampling cannot vary."""
    if votes < 1:
        raise ConfigError(f"--votes={votes}: must be at least 1")
    if votes > 1 and sampling.temperature == 0:
        raise ConfigError(
            f"--votes={votes}: with stage2.eval_sampling.temperature=0 every vote would be the "
            "same; the benchmark's authors use stage2.eval_sampling.temperature=1.0 "
            "stage2.eval_sampling.top_p=0.9"
        )


async def ask_all(
    served: ServedModel,
    cases: Sequence[ProcessBenchCase],
    messages: Callable[[ProcessBenchCase], ChatMessages],
    sampling: SamplingConfig,
    votes: int,
    in_flight: int,
) -> list[list[Reply]]:
    """Return ``votes`` replies about each case, with at most ``in_flight`` concurrent requests.

    Seeds depend on case and vote alone. Raises ``EngineFailure`` when the engine stops on the way,
    because a partial result is not a score, and, before the first request, ``DataFileError`` for a
    case that ``messages`` cannot show.
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

    replies = await asyncio.gather(*(ask(case, vote) for case in cases for vote in range(votes)))
    if not (await served.engine.health()).alive:
        raise EngineFailure(
            "the engine stopped during the evaluation on ProcessBench; run it again for a score"
        )
    return [replies[start : start + votes] for start in range(0, len(replies), votes)]


async def _ask_and_close(served: ServedModel, *arguments: object) -> list[list[Reply]]:
    try:
        return await ask_all(served, *arguments)
    finally:
        await served.engine.close()
