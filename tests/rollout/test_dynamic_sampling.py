"""Dynamic sampling: the groups a step trains on, and judging while siblings still decode."""

from __future__ import annotations

import asyncio
from itertools import permutations
from types import SimpleNamespace

import pytest
from fake_sglang import FakeSglang

from spark_nemo.config import EngineConfig, RLConfig, SamplingConfig
from spark_nemo.config.reward import AnswerKeyReward
from spark_nemo.config.rollout import DynamicSampling, RolloutConfig
from spark_nemo.engines.async_utils import until_idle
from spark_nemo.engines.base import FinishReason, Generation, GenerationRequest, SamplingParams
from spark_nemo.engines.fleet import Fleet
from spark_nemo.engines.served_model import Completion, ServedModel
from spark_nemo.engines.sglang import SglangServer
from spark_nemo.grammar import prompt_set
from spark_nemo.records import Problem, RolloutVerdict
from spark_nemo.rollout.dynamic_sampling import dynamic_batch, first_useful, max_prompts
from spark_nemo.rollout.generator import RolloutGenerator
from spark_nemo.rollout.prefetch import prompt_indices
from spark_nemo.toy.resolve import ASSETS

PROMPTS = prompt_set("compact")
MIXED, EQUAL = "mixed", "equal"


class SlowPolicy:
    """A served model that answers after as many turns of the event loop as the problem's delay
    says.

    Tokens are bytes. Of a MIXED problem the group's first sample says "right" and the others
    "wrong", of an EQUAL one all say "right". Keeps the seeds it was asked with and the problems
    whose requests were cancelled.
    """

    tokenizer = SimpleNamespace(
        token_bytes=lambda ids: [bytes([i]) for i in ids], eos_ids=frozenset()
    )

    def __init__(self, delays: dict[str, int]) -> None:
        self.delays = delays
        self.engine = self
        self.asked: dict[str, int] = {}
        self.seeds: set[int] = set()
        self.cancelled: set[str] = set()

    async def health(self):
        return SimpleNamespace(running=0, waiting=0)

    async def complete(self, messages, sampling, seed):
        name = messages[-1]["content"].split()[0]
        first = name not in self.asked
        self.asked[name] = self.asked.get(name, 0) + 1
        self.seeds.add(seed)
        try:
            for _ in range(self.delays.get(name, 0)):
                await asyncio.sleep(0)
        except asyncio.CancelledError:
            self.cancelled.add(name)
            raise
        text = "right" if EQUAL in name or first else "wrong"
        ids = tuple(text.encode())
        return Completion(
            (1,), Generation(ids, (-1.0,) * len(ids), (0,) * len(ids), FinishReason.STOP), text
        )


def generator_of(
    policy, wanted: int, over_sampling_ratio: float, rounds: int = 4, **knobs
) -> RolloutGenerator:
    config = RLConfig(
        reward=AnswerKeyReward(),
        group_size=2,
        prompts_per_step=wanted,
        rollout=RolloutConfig(filter=DynamicSampling("dynamic", over_sampling_ratio, rounds)),
        **knobs,
    )
    return RolloutGenerator(
        policy, PROMPTS, config, 0, None, lambda shown: [text == "right" for _, text in shown]
    )


def problems(*names: str) -> list[Problem]:
    """One per name; a question begins with its name, as the scripted policy expects."""
    return [Problem(name, f"{name} ?") for name in names]


def sampled(
    delays: dict[str, int],
    names: tuple[str, ...],
    wanted: int,
    over_sampling_ratio: float,
    rounds=4,
):
    policy = SlowPolicy(delays)
    generator = generator_of(policy, wanted, over_sampling_ratio, rounds)
    return asyncio.run(dynamic_batch(generator, problems(*names), 0)), policy


def kept(batch) -> list[str]:
    return [rollout.problem.problem_id for rollout in batch.rollouts[::2]]


NAMES = ("a-mixed", "b-equal", "c-mixed", "d-mixed")


@pytest.mark.parametrize("order", list(permutations((0, 20, 40, 60))))
def test_the_first_useful_groups_in_prompt_order_are_kept_whichever_ends_first(
    order: tuple[int, ...],
) -> None:
    """In every order of arrival: a and c, never d, whose prompt goes back. Equal content and
    counts, so a repeated run trains on the same. Groups are renumbered, since advantages are
    computed by group.
    """
    batch, _ = sampled(dict(zip(NAMES, order)), NAMES, 2, 2.0)
    assert kept(batch) == ["a-mixed", "c-mixed"]
    assert [rollout.group for rollout in batch.rollouts] == [0, 0, 1, 1]
    assert batch.consumed == 3
    assert batch.metrics["dynamic/useful_fraction"] == pytest.approx(2 / 3)
    assert batch.metrics["reward"] == pytest.approx(4 / 6), (
        "of all groups looked at, so that dropping does not flatter"
    )


def test_what_is_not_needed_any_more_is_aborted() -> None:
    """The slow fourth group's requests are cancelled, and they are over when the batch is there."""
    _, policy = sampled({"d-mixed": 10**6}, NAMES, 2, 2.0)
    assert policy.cancelled == {"d-mixed"}


def test_missing_groups_are_replaced_round_by_round() -> None:
    """The first round finds one of two; later rounds start what is missing times the ratio."""
    names = ("a-equal", "b-mixed", "c-equal", "d-mixed", "e-mixed")
    batch, policy = sampled({}, names, 2, 1.0)
    assert kept(batch) == ["b-mixed", "d-mixed"]
    assert batch.metrics["dynamic/rounds"] == 3 and batch.consumed == 4
    assert "e-mixed" not in policy.asked


def test_a_step_trains_on_what_there_is_after_the_last_round() -> None:
    """One useful group of three wanted; with none at all the first ones stay, which leave the
    policy as it was.
    """
    few, _ = sampled({}, ("a-equal", "b-mixed", "c-equal", "d-equal", "e-mixed"), 3, 1.0, 1)
    assert kept(few) == ["b-mixed"] and few.consumed == 3
    none, _ = sampled({}, ("a-equal", "b-equal", "c-equal", "d-equal"), 2, 1.0, 2)
    assert kept(none) == ["a-equal", "b-equal"] and none.consumed == 4
    assert none.metrics["dynamic/useful_fraction"] == 0


def test_a_problem_that_comes_twice_in_a_step_is_sampled_anew() -> None:
    """At the end of the data; the same seeds would make its two groups one group twice."""
    _, policy = sampled({}, ("a-equal", "a-equal"), 2, 1.0, 1)
    assert len(policy.seeds) == 4


def test_a_failure_counts_only_where_its_group_is_needed() -> None:
    """An engine failure in a group before the last one kept is raised; behind it, it does
    not matter.
    """

    async def group(value: int) -> int:
        if value < 0:
            raise RuntimeError("failed")
        return value

    async def run(*values: int) -> list:
        return await first_useful([lambda value=value: group(value) for value in values], bool, 1)

    assert asyncio.run(run(0, 1, -1)) == [(0, False), (1, True)]
    with pytest.raises(RuntimeError, match="failed"):
        asyncio.run(run(0, -1, 1))


def test_the_data_cursor_takes_every_problem_once_per_epoch() -> None:
    """Slices of any sizes, one after the other, are the epochs' permutations, each in full; nothing
    is skipped at their ends, and no step asks for more than it may.
    """
    order = prompt_indices(0, 20, 10, seed=3)
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10)) and order[:10] != order[10:]
    assert [
        i for start, count in ((0, 4), (4, 9), (13, 7)) for i in prompt_indices(start, count, 10, 3)
    ] == order
    assert (
        max_prompts(
            RLConfig(
                prompts_per_step=3, rollout=RolloutConfig(filter=DynamicSampling("dynamic", 1.5, 2))
            )
        )
        == 10
    )


def test_an_abort_on_the_embedded_engine_leaves_no_trace() -> None:
    """Requests cancelled in the middle leave the batch at once, and what is sampled next is bit for
    bit what a fresh engine samples. For servers, tests/engines shows that a cancelled request is
    aborted there.
    """

    async def sample(interrupted: bool) -> tuple[float, ...]:
        served = ServedModel.load(
            EngineConfig(max_batch_size=8, max_context=320), ASSETS / "generator", "policy"
        )
        sampling = SamplingConfig(temperature=1.0, max_new_tokens=40)
        asked = range(12 if interrupted else 0)
        ask = [served.complete(PROMPTS.policy(f"What is {k} + 5?"), sampling, k) for k in asked]
        tasks = [asyncio.create_task(one) for one in ask]
        for _ in range(20 if interrupted else 0):
            await asyncio.sleep(0)
        if interrupted:
            assert (await served.engine.health()).running == 8
        for task in tasks:
            task.cancel()
        await until_idle(served.engine)
        assert (await served.engine.health()).running == 0
        done = await asyncio.gather(
            *(served.complete(PROMPTS.policy("What is 7 + 5?"), sampling, k) for k in range(5))
        )
        await served.engine.close()
        return tuple(logprob for one in done for logprob in one.generation.logprobs)

    assert asyncio.run(sample(True)) == asyncio.run(sample(False))


def test_an_abort_reaches_the_servers_of_a_pool() -> None:
    """Against the fake SGLang server, behind a fleet: when the batch is there the requests of the
    group that was not needed have been aborted by name, and nothing else runs on the server.
    """

    class Remote(SlowPolicy):
        async def complete(self, messages, sampling, seed):
            name = messages[-1]["content"].split()[0]
            await self.engine.generate(
                GenerationRequest((1, 2), SamplingParams(100 if "d-" in name else 1))
            )
            return await super().complete(messages, sampling, seed)

    async def run() -> None:
        async with FakeSglang() as fake:
            fake.faults.token_s = 0.05
            server = SglangServer(
                fake.url,
                api_key=None,
                vocab_size=64,
                max_context=122,
                max_in_flight=16,
                request_timeout_s=20.0,
                control_timeout_s=5.0,
            )
            policy = Remote({})
            policy.engine = Fleet({"one": server})
            batch = await dynamic_batch(generator_of(policy, 2, 2.0), problems(*NAMES), 0)
            assert kept(batch) == ["a-mixed", "c-mixed"]
            assert all(request.aborted for request in fake.running.values())
            assert len([path for path, _ in fake.calls if path == "/abort_request"]) == 2
            await policy.engine.close()

    asyncio.run(run())


def test_a_response_is_judged_while_its_siblings_still_decode() -> None:
    """The last response of the group may only end once a verification has begun: waiting for the
    whole group before verifying would hang here.
    """

    async def run() -> None:
        begun = asyncio.Event()

        class Policy(SlowPolicy):
            async def complete(self, messages, sampling, seed):
                last = sum(self.asked.values()) == 1
                done = await super().complete(messages, sampling, seed)
                if last:
                    await begun.wait()
                return done

        class Judge:
            service = SimpleNamespace(refresh=lambda: asyncio.sleep(0))

            async def judge(self, rollout):
                begun.set()
                return RolloutVerdict(None, None)

        made = RolloutGenerator(Policy({}), PROMPTS, RLConfig(group_size=2), 0, Judge(), None)
        async with asyncio.timeout(10):
            judged = await made.generate_group(0, Problem("a-equal", "a-equal ?"), 0)
        assert len(judged) == 2
        generated, verified = (made.timeline.of(kind) for kind in ("generate", "verify"))
        assert min(start for start, _ in verified) < max(end for _, end in generated)

    asyncio.run(run())
