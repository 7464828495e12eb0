"""PRM service: single flight, cache, deadlines, and failures."""

from __future__ import annotations

import asyncio
import dataclasses
from types import SimpleNamespace

import pytest

from spark_nemo.config import SamplingConfig
from spark_nemo.config.reward import ModelReward
from spark_nemo.engines.base import EngineFailure, FinishReason, Generation
from spark_nemo.engines.served_model import Completion
from spark_nemo.grammar import (
    StepFormat,
    StepJudgement,
    Variant,
    canonical_solution,
    prompt_set,
    render_verification,
    split_response,
)
from spark_nemo.records import (
    EngineError,
    ParseFailure,
    Problem,
    Rollout,
    Truncated,
    Verdict,
    derive_seed,
)
from spark_nemo.rewards.judge import RewardJudge, vote_seed
from spark_nemo.rewards.prm_service import PRMService, ServiceLimits

PROMPTS = prompt_set("compact")
GREEDY, SAMPLED = SamplingConfig(temperature=0.0), SamplingConfig(temperature=1.0)


def said(*labels: bool) -> str:
    return render_verification([StepJudgement("t", "", label) for label in labels], all(labels))


class Prm:
    """Served PRM whose verdict depends on the seed alone, so that a wrong seed or cache entry
    shows.

    ``reply`` replaces the text, ``failure`` raises, ``held`` blocks until ``go`` is set. ``asked``
    are the received seeds.
    """

    fingerprint = "prm"

    def __init__(self, reply=None, failure=None, held=False, finish=FinishReason.STOP) -> None:
        self.reply, self.failure, self.finish = reply, failure, finish
        self.go, self.asked, self.prompts, self.cancelled, self.running, self.most = (
            asyncio.Event(),
            [],
            [],
            0,
            0,
            0,
        )
        self.version, self.alive, self.encoded = 0, True, 0
        self.engine, self.tokenizer = self, SimpleNamespace(encode_chat=self.encode)
        if not held:
            self.go.set()

    def encode(self, messages):
        self.encoded += 1
        return tuple(messages[0]["content"].encode())

    async def health(self):
        if self.version is None:
            raise EngineFailure("gone")
        return SimpleNamespace(alive=self.alive, weight_version=self.version)

    async def complete_prompt(self, prompt_ids, sampling, seed):
        self.asked.append(seed)
        self.prompts.append(prompt_ids)
        self.running += 1
        self.most = max(self.most, self.running)
        version = self.version
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1
        if self.failure:
            raise self.failure
        text = self.reply or said(seed % 2 == 0, seed % 3 == 0)
        ids = tuple(text.encode())
        generation = Generation(
            ids, (-1.0,) * len(ids), (version,) * (len(ids) - 1) + (self.version,), self.finish
        )
        return Completion(prompt_ids, generation, text)


async def service_of(prm: Prm, sampling=SAMPLED, **limits) -> PRMService:
    service = PRMService(prm, PROMPTS, sampling, ServiceLimits(**limits))
    await service.refresh()
    return service


def verify(
    service: PRMService,
    seed: int = 1,
    question="3 + 4?",
    canonical="## Step 1: a",
    num_steps: int = 2,
):
    return service.verify(service.case(question, canonical, num_steps), seed)


def test_limits_follow_the_servers_and_the_length_of_a_verification() -> None:
    """By default the queue is twice the engines' slots: fewer would leave servers idle, and more
    would wait there within their deadline. The default deadline grows with the tokens that may be
    sampled. Set values are kept.
    """
    small, large = (
        ServiceLimits.from_config(
            ModelReward(sampling=SamplingConfig(temperature=0.0, max_new_tokens=tokens)), slots
        )
        for tokens, slots in ((2048, 64), (16384, 16 * 256))
    )
    assert (small.queue, large.queue) == (128, 8192)
    assert small.deadline == 1800 + 0.25 * 2048 and large.deadline == 1800 + 0.25 * 16384
    named = ServiceLimits.from_config(ModelReward(queue=7, deadline_s=60.0, cache=0), 64)
    assert named == ServiceLimits(7, 60.0, 0)


def test_the_same_request_is_asked_once() -> None:
    """The later request gets the same answer, tokens included. Concurrent requests are tested
    below.
    """

    async def scenario():
        service = await service_of(prm := Prm())
        first, second = await verify(service), await verify(service)
        assert first == second and isinstance(first.outcome, Verdict) and prm.asked == [1]
        counts = service.take_counts()
        assert (counts.asked, counts.remembered, counts.sampled_tokens) == (2, 1, first.num_tokens)
        assert counts.metrics()["hit_rate"] == 0.5 and service.take_counts().asked == 0

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "change",
    [
        {"question": "3 + 5?"},
        {"canonical": "## Step 1: b"},
        {"num_steps": 3},
        {"seed": 2},
        {"fingerprint": "other"},
        {"version": 1},
        {"sampling": SamplingConfig(temperature=0.5)},
        {"prompts": prompt_set("paper")},
        {"variant": Variant.PRM},
    ],
    ids=lambda change: next(iter(change)),
)
def test_every_part_of_the_key_counts(change: dict[str, object]) -> None:
    """Content, seed (vote and attempt), model and its kind, weights, sampling and prompts
    distinguish requests.
    """

    async def scenario():
        service = await service_of(prm := Prm())
        await verify(service)
        parts = dict(change)
        for name, owner in (
            ("fingerprint", prm),
            ("version", prm),
            ("sampling", service),
            ("prompts", service),
            ("variant", service),
        ):
            if name in parts:
                setattr(owner, name, parts.pop(name))
        await service.refresh()
        await verify(service, **parts)
        assert len(prm.asked) == 2
        await verify(service, **parts)
        assert len(prm.asked) == 2

    asyncio.run(scenario())


def test_a_greedy_request_has_no_seed() -> None:
    """With greedy sampling, equal canonical text of another rollout is answered from the cache."""

    async def scenario():
        service = await service_of(prm := Prm(), GREEDY)
        assert await verify(service, 1) == await verify(service, 2) and prm.asked == [1]

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("reply", "finish", "kind"),
    [
        ("no grammar at all", FinishReason.STOP, ParseFailure),
        ("cut", FinishReason.LENGTH, Truncated),
    ],
)
def test_a_failure_of_the_content_is_remembered(
    reply: str, finish: FinishReason, kind: type
) -> None:
    """The same request would fail the same way again."""

    async def scenario():
        service = await service_of(prm := Prm(reply, finish=finish), GREEDY)
        answers = [await verify(service) for _ in range(2)]
        assert (
            answers[0] == answers[1]
            and isinstance(answers[0].outcome, kind)
            and len(prm.asked) == 1
        )

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("failure", "finish"),
    [(EngineFailure("out of memory"), FinishReason.STOP), (None, FinishReason.ABORT)],
)
def test_an_engine_error_is_never_remembered(failure, finish: FinishReason) -> None:
    """A failed or aborted request does not depend on the content: it is retried, and succeeds."""

    async def scenario():
        service = await service_of(prm := Prm(failure=failure, finish=finish), GREEDY)
        assert isinstance((await verify(service)).outcome, EngineError)
        prm.failure, prm.finish = None, FinishReason.STOP
        assert isinstance((await verify(service)).outcome, Verdict)

    asyncio.run(scenario())


def test_requests_at_the_same_time_share_one() -> None:
    """Single flight: ten callers share one request and one answer. Cancelling one of them does not
    cancel the others.
    """

    async def scenario():
        service = await service_of(prm := Prm(held=True))
        callers = [asyncio.create_task(verify(service)) for _ in range(10)]
        await asyncio.sleep(0)
        callers[0].cancel()
        await asyncio.sleep(0.001)
        prm.go.set()
        answers = await asyncio.gather(*callers[1:])
        assert len(set(answers)) == 1 and prm.asked == [1] and prm.cancelled == 0
        assert service.take_counts().shared == 9

    asyncio.run(scenario())


def test_when_the_last_caller_leaves_the_request_ends() -> None:
    """The engine gets the cancellation; the next caller starts a new request instead of joining the
    cancelled one.
    """

    async def scenario():
        service = await service_of(prm := Prm(held=True))
        callers = [asyncio.create_task(verify(service)) for _ in range(2)]
        await asyncio.sleep(0.001)
        for caller in callers:
            caller.cancel()
        later = asyncio.create_task(verify(service))
        await asyncio.gather(*callers, return_exceptions=True)
        prm.go.set()
        assert (
            isinstance((await later).outcome, Verdict) and prm.cancelled == 1 and prm.running == 0
        )

    asyncio.run(scenario())


def test_a_missed_deadline_is_an_engine_error_and_ends_the_request() -> None:
    """A missed deadline is never a score, is not cached, and cancels the engine's request."""

    async def scenario():
        service = await service_of(prm := Prm(held=True), deadline=0.01)
        outcome = (await verify(service)).outcome
        assert (
            isinstance(outcome, EngineError)
            and outcome.message.startswith("deadline")
            and prm.cancelled == 1
        )
        assert service.take_counts().deadline_missed == 1
        prm.go.set()
        assert isinstance((await verify(service)).outcome, Verdict)

    asyncio.run(scenario())


def test_more_than_the_queue_wait_and_their_clock_does_not_run() -> None:
    """At most ``queue`` verifications are at the engine. One that waits longer than the deadline
    for a slot is still served.
    """

    async def scenario():
        service = await service_of(prm := Prm(held=True), queue=2, deadline=0.2)
        callers = [asyncio.create_task(verify(service, seed)) for seed in range(8)]
        await asyncio.sleep(0.12)
        assert len(prm.asked) == 2
        prm.go.set()
        prm.go = asyncio.Event()
        await asyncio.sleep(0.12)
        prm.go.set()
        answers = await asyncio.gather(*callers)
        assert all(isinstance(answer.outcome, Verdict) for answer in answers) and prm.most == 2

    asyncio.run(scenario())


def test_the_cache_is_bounded_and_forgets_the_least_recently_used() -> None:
    """With two entries, the third evicts the least recently used one."""

    async def scenario():
        service = await service_of(prm := Prm(), cache_entries=2)
        for seed in (1, 2, 1, 3, 1, 2):
            await verify(service, seed)
        assert prm.asked == [1, 2, 3, 2]

    asyncio.run(scenario())


def test_weights_that_change_on_the_way_leave_nothing_behind() -> None:
    """A text sampled by two versions belongs to neither; nothing is cached while the version is
    unknown.
    """

    async def scenario():
        service = await service_of(prm := Prm(held=True))
        caller = asyncio.create_task(verify(service))
        await asyncio.sleep(0.001)
        prm.version = 1
        prm.go.set()
        assert isinstance((await caller).outcome, Verdict)
        await verify(service)
        assert len(prm.asked) == 2

    asyncio.run(scenario())


@pytest.mark.parametrize(("alive", "version"), [(False, 0), (True, None)])
def test_nothing_is_remembered_while_the_version_is_not_known(
    alive: bool, version: int | None
) -> None:
    """A server that does not answer reports its last known version or none; neither is used."""

    async def scenario():
        service = await service_of(prm := Prm())
        await verify(service, 5)
        prm.alive, prm.version = alive, version
        await service.refresh()
        prm.alive, prm.version = True, 0
        await verify(service, 5)
        await verify(service, 5)
        assert len(prm.asked) == 3

    asyncio.run(scenario())


def rollout(text: str, problem_id: str = "p") -> Rollout:
    parsed = split_response(text, StepFormat.TAGGED)
    problem = Problem(problem_id, "3 + 4?")
    return Rollout(problem, 0, (1,), (2,), (-1.0,), (0,), text, "stop", parsed=parsed)


RESPONSE = r"<think><step>one</step><step>two</step></think><answer>\boxed{7}</answer>"


@pytest.mark.parametrize("votes", [1, 5])
def test_rewards_are_the_same_with_and_without_the_cache(votes: int) -> None:
    """Rewards and tokens are equal with repeats and retries; the cache saves requests."""
    batch = [
        rollout(RESPONSE),
        rollout(RESPONSE),
        rollout(RESPONSE.replace("two", "2")),
        rollout(RESPONSE, "q"),
    ] * 2

    async def judged(entries: int):
        prm = Prm()
        judge = RewardJudge(await service_of(prm, cache_entries=entries), 1, votes, votes // 2 + 1)
        return await asyncio.gather(*(judge.judge(row) for row in batch)), len(prm.asked)

    (with_cache, few), (without, many) = asyncio.run(judged(100)), asyncio.run(judged(0))
    assert with_cache == without and (few, many) == (3 * votes, 8 * votes)


def test_one_vote_uses_the_seeds_it_always_used() -> None:
    """Pins the seeds, so that earlier runs can be repeated. More votes keep the first vote's seed
    and differ among themselves.
    """
    row = rollout(RESPONSE)
    assert vote_seed(row, 1, 0) == derive_seed("judge", "p", RESPONSE, 1)
    assert len({vote_seed(row, attempt, vote) for attempt in range(3) for vote in range(4)}) == 12


def test_votes_share_one_encoded_prompt_and_are_retried_alone() -> None:
    """Five votes and a failure: the prompt is encoded once, every request has equal ids, and only
    the failed vote is retried.
    """

    async def scenario():
        prm = Prm()
        bad = vote_seed(rollout(RESPONSE), 0, 2)
        sample = prm.complete_prompt

        async def complete_prompt(ids, sampling, seed):
            done = await sample(ids, sampling, seed)
            return dataclasses.replace(done, text="lost") if seed == bad else done

        prm.complete_prompt = complete_prompt
        judgement = await RewardJudge(await service_of(prm), 1, 5, 3).judge(rollout(RESPONSE))
        assert isinstance(judgement.outcome, Verdict)
        assert len(prm.asked) == 6 and prm.encoded == 1 and len(set(prm.prompts)) == 1
        canonical = canonical_solution(split_response(RESPONSE, StepFormat.TAGGED))
        assert canonical in bytes(prm.prompts[0]).decode()

    asyncio.run(scenario())
