"""Stage I's sampling against an engine without a model: what is asked for, in which order, and what
it cost.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from fake_world import (
    SOLVE,
    VERIFY,
    FakeEngine,
    is_vote,
    problems,
    served,
    solution_of,
    stage,
    verification_of,
)

from spark_nemo.config import Stage1Config
from spark_nemo.engines.base import FinishReason, Generation, GenerationRequest, SamplingParams
from spark_nemo.grammar import (
    GRAMMAR_VERSION,
    ParsedResponse,
    StepFormat,
    canonical_solution,
    prompt_set,
    split_response,
)
from spark_nemo.records import (
    SOLUTION,
    VERIFICATION,
    Problem,
    Verification,
    content_key,
    derive_seed,
    outcome_from_json,
)
from spark_nemo.records.store import RecordStore
from spark_nemo.verification.early_stop import stopping_rule, votes_taken
from spark_nemo.verification.sampler import SamplingCounts, Stage1Sampler

RULES = [
    {},
    {"early_stop": "exact"},
    {"early_stop": "exact", "vote_batch_size": 3, "early_stop_verdict": True},
    {"early_stop": "sequential", "early_stop_error": 0.05},
]


class Killed(Exception):
    """Models SIGKILL: nothing after it runs in the collector."""


def collect(
    folder: Path,
    config: Stage1Config,
    engine: FakeEngine | None = None,
    *,
    count: int = 12,
    slots: int = 16,
    die_after: int | None = None,
    after_votes=None,
) -> Stage1Sampler:
    """One run over ``count`` problems on the store in ``folder``."""
    engine = engine or FakeEngine()
    results = 0

    def on_result(counts: SamplingCounts) -> None:
        nonlocal results
        results += 1
        if results == die_after:
            raise Killed

    with RecordStore(folder, writer_name="w", fsync_every=256) as store:
        collector = Stage1Sampler(
            config, 3, served(engine), served(engine), store, on_result, after_votes
        )
        try:
            asyncio.run(collector.run(problems(count), slots))
        except ExceptionGroup as group:
            if not group.subgroup(Killed):
                raise
    return collector


def records(folder: Path) -> dict[str, dict]:
    with RecordStore(folder) as store:
        return {key: row for kind in (SOLUTION, VERIFICATION) for key, row in store.iter(kind)}


def random_latency(seed: int) -> FakeEngine:
    draw = random.Random(seed)
    return FakeEngine(lambda request: draw.choice((0, 0, 0.0005, 0.002)))


def test_without_early_stopping_every_vote_has_the_key_and_seed_it_always_had(
    tmp_path: Path,
) -> None:
    """Proves that stores made before the pipeline was rebuilt are still found: keys and seeds
    written down again here.

    Nothing is missing, nothing is extra. That a real engine says the same was checked once on the
    toy task's full stage I (16,320 records, equal but for ``num_prompt_tokens``).
    """
    config, prompts, wanted = stage(), prompt_set("compact"), {}
    made_by = {
        name: (
            GRAMMAR_VERSION,
            prompts.version,
            "fake",
            {"temperature": 1.0, "top_p": 1.0, "max_new_tokens": sampling.max_new_tokens},
        )
        for name, sampling in (("solution", SOLVE), ("verification", VERIFY))
    }
    for problem in problems(12):
        for index in range(2):
            key = content_key("solution", problem.question, made_by["solution"], 3, index)
            text = solution_of(request((), SOLVE.max_new_tokens, derive_seed(key)))
            wanted[key] = text
            parsed = split_response(text, StepFormat.PLAIN)
            if isinstance(parsed, ParsedResponse):
                content = prompts.verify(problem.question, canonical_solution(parsed), 3)[0][
                    "content"
                ]
                for vote in range(8):
                    vote_key = content_key("verification", key, made_by["verification"], 3, vote)
                    wanted[vote_key] = verification_of(
                        request(
                            tuple(content.encode()), VERIFY.max_new_tokens, derive_seed(vote_key)
                        )
                    )
    collector = collect(tmp_path, config)
    assert {key: row["text"] for key, row in records(tmp_path).items()} == wanted
    assert collector.counts.saved_verifications == 0


def request(prompt_ids: tuple[int, ...], max_new_tokens: int, seed: int) -> GenerationRequest:
    return GenerationRequest(prompt_ids, SamplingParams(max_new_tokens, seed=seed))


@pytest.mark.parametrize("rule", RULES)
def test_the_votes_taken_depend_on_nothing_but_the_votes(tmp_path: Path, rule: dict) -> None:
    """Proves that completions in any order, and any number in flight, give the same store: what a
    replay would take.
    """
    for name, engine, slots in (
        ("a", FakeEngine(), 1),
        ("b", random_latency(1), 7),
        ("c", random_latency(2), 200),
    ):
        collect(tmp_path / name, stage(**rule), engine, slots=slots)
    collect(tmp_path / "full", stage())
    full, stopped = records(tmp_path / "full"), records(tmp_path / "a")
    assert stopped == records(tmp_path / "b") == records(tmp_path / "c")
    stopping, taken = (
        stopping_rule(stage(**rule)),
        Counter(r["solution_key"] for r in stopped.values() if "vote" in r),
    )
    assert taken
    for key, number in taken.items():
        votes = sorted(
            (r for r in full.values() if r.get("solution_key") == key), key=lambda r: r["vote"]
        )
        outcomes = [outcome_from_json(r["outcome"]) for r in votes]
        assert number == (votes_taken(stopping, outcomes) if stopping else 8)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("die_after", [1, 30, 90])
def test_a_killed_run_goes_on_where_it_was(tmp_path: Path, rule: dict, die_after: int) -> None:
    """Proves that nothing stored is asked for again, and that the end is that of an undisturbed
    run.

    The kill is an exception between two results; torn writes are the store's affair.
    """
    collect(tmp_path / "calm", stage(**rule))
    collect(tmp_path / "killed", stage(**rule), random_latency(3), die_after=die_after)
    before, engine = records(tmp_path / "killed"), FakeEngine()
    collector = collect(tmp_path / "killed", stage(**rule), engine)
    after = records(tmp_path / "killed")
    assert after == records(tmp_path / "calm")
    assert 0 < len(before) < len(after)
    assert len(engine.requests) == len(after) - len(before)
    assert collector.counts.reused == len(before)


@pytest.mark.parametrize("rule", RULES)
def test_growing_n_asks_only_for_the_new_votes(tmp_path: Path, rule: dict) -> None:
    """Proves that N=8 grown to N=16 ends where N=16 from the start would, at the price of the
    difference.
    """
    collect(tmp_path / "grown", stage(**rule))
    before, engine = records(tmp_path / "grown"), FakeEngine()
    collect(tmp_path / "grown", stage(**rule, verifications_per_solution=16), engine)
    collect(tmp_path / "fresh", stage(**rule, verifications_per_solution=16))
    after = records(tmp_path / "grown")
    assert after.keys() >= records(tmp_path / "fresh").keys()
    assert len(engine.requests) == len(after) - len(before)
    if rule.get("early_stop") != "sequential" and "vote_batch_size" not in rule:
        assert after == records(tmp_path / "fresh")


@pytest.mark.parametrize("rule", RULES)
def test_a_vote_that_could_not_be_had_is_asked_for_by_the_next_run(
    tmp_path: Path, rule: dict
) -> None:
    """Proves that an engine failure is not a vote, is not stored, and changes nothing about what is
    taken in the end.
    """
    collect(tmp_path / "calm", stage(**rule))
    flaky = FakeEngine(refuses=lambda request: is_vote(request) and request.sampling.seed % 9 == 0)
    first = collect(tmp_path / "flaky", stage(**rule), flaky)
    refused = len(flaky.requests) - len(flaky.served)
    assert refused > 0
    assert first.accounting.costs["verify"].failed == refused
    assert (first.counts.postponed_verifications > 0) == bool(rule)
    engine = FakeEngine()
    second = collect(tmp_path / "flaky", stage(**rule), engine)
    assert records(tmp_path / "flaky") == records(tmp_path / "calm")
    assert len(engine.requests) == len(records(tmp_path / "calm")) - len(flaky.served)
    assert second.counts.postponed_verifications == 0


def test_the_votes_of_a_solution_reach_the_engine_together_with_one_prompt(tmp_path: Path) -> None:
    """Proves what prefix caching needs: equal prompts one after the other, encoded once per
    solution.
    """
    engine = FakeEngine()
    with RecordStore(tmp_path, writer_name="w", fsync_every=256) as store:
        generator, verifier = served(engine), served(engine)
        collector = Stage1Sampler(stage(), 3, generator, verifier, store)
        asyncio.run(collector.run(problems(12), 5))
    prompts = [request.prompt_ids for request in engine.requests if is_vote(request)]
    runs = [ids for ids, before in zip(prompts, [None, *prompts]) if ids is not before]
    assert len(runs) == len(set(prompts)) == len(prompts) / 8
    assert verifier.tokenizer.chats_encoded == len(set(prompts))


@pytest.mark.parametrize("rule", RULES)
def test_token_accounting_adds_up_to_what_the_engine_served(tmp_path: Path, rule: dict) -> None:
    """Proves that sampled tokens are the engine's, that reuse is not counted as sampling, and that
    parts make wholes.

    Rejected requests (whose tokens are unknown) are counted and have no tokens. Seconds are not
    checked.
    """
    engine = FakeEngine(refuses=lambda request: request.sampling.seed % 9 == 0)
    first = collect(tmp_path, stage(**rule), engine).accounting
    sampled = first.costs["solve"].sampled + first.costs["verify"].sampled
    assert sampled == len(engine.served)
    assert first.costs["solve"].failed + first.costs["verify"].failed == len(engine.requests) - len(
        engine.served
    )
    assert sum(p.sampled_prompt_tokens for p in first.costs.values()) == engine.prompt_tokens
    assert (
        sum(p.sampled_completion_tokens for p in first.costs.values()) == engine.completion_tokens
    )
    summary = first.summary()
    for level in ("per_problem", "per_solution"):
        spread = summary[level]["completion_tokens"]
        assert spread["mean"] * spread["count"] == pytest.approx(engine.completion_tokens, rel=1e-4)
    again = FakeEngine()
    second = collect(tmp_path, stage(**rule), again).accounting
    assert (
        sum(p.sampled_completion_tokens for p in second.costs.values()) == again.completion_tokens
    )
    assert sum(p.reused for p in second.costs.values()) == sampled
    assert (
        sum(p.reused_completion_tokens for p in second.costs.values()) == engine.completion_tokens
    )
    assert sum(p.reused_prompt_tokens for p in second.costs.values()) == engine.prompt_tokens
    whole = second.summary(earlier=summary["all_runs"])["all_runs"]
    assert (
        whole["verify"]["sampled"] == first.costs["verify"].sampled + second.costs["verify"].sampled
    )


def test_saved_tokens_are_estimated_close_to_the_truth(tmp_path: Path) -> None:
    """On votes of similar length the estimate of the tokens not sampled is close."""
    full = collect(tmp_path / "full", stage()).accounting
    stopped = collect(tmp_path / "stopped", stage(early_stop="exact")).accounting
    saved = full.costs["verify"].completion_tokens - stopped.costs["verify"].completion_tokens
    assert saved > 0
    assert stopped.tokens_saved == pytest.approx(saved, rel=0.05)


@pytest.mark.parametrize("rule", RULES)
def test_after_votes_sees_every_solution_whose_votes_are_in(tmp_path: Path, rule: dict) -> None:
    """Proves that the hook gets all votes in order, once per solution, and none for a solution that
    lacks a vote.
    """
    seen: dict[str, list[Verification]] = {}

    async def after_votes(solution, parsed, votes) -> None:
        await asyncio.sleep(0)
        assert solution.key not in seen
        assert len(parsed.steps) == 3
        seen[solution.key] = votes

    flaky = FakeEngine(refuses=lambda request: is_vote(request) and request.sampling.seed % 29 == 0)
    collect(tmp_path, stage(**rule), flaky, after_votes=after_votes)
    asked, had = (
        [r.prompt_ids for r in rows if is_vote(r)] for rows in (flaky.requests, flaky.served)
    )
    lacking = Counter(asked) - Counter(had)
    assert 0 < len(seen) == len(set(asked)) - len(lacking) < len(set(asked))
    stored = Counter(row["solution_key"] for row in records(tmp_path).values() if "vote" in row)
    assert all(
        [vote.vote for vote in votes] == list(range(stored[key])) for key, votes in seen.items()
    )
    seen.clear()
    collect(tmp_path, stage(**rule), after_votes=after_votes)
    assert seen.keys() == {
        row["solution_key"] for row in records(tmp_path).values() if "vote" in row
    }


class SeedlessEngine(FakeEngine):
    """Ignores seeds, as SGLang does: two requests with one prompt get different solutions."""

    def __init__(self) -> None:
        super().__init__(latency=lambda request: 0.001)
        self.draws = 0

    async def generate(self, request: GenerationRequest) -> Generation:
        if not is_vote(request):
            self.draws += 1
            sampling = replace(request.sampling, seed=1000 + self.draws)
            request = replace(request, sampling=sampling)
        return await super().generate(request)


def test_two_problems_with_one_question_continue_with_the_stored_solution(tmp_path: Path) -> None:
    """Proves that a lost append continues with the stored record: both problems sample the same key
    at once and get different texts, and every vote is about the text that was stored.
    """
    engine = SeedlessEngine()
    twins = [Problem("first", "What is 3 + 4?"), Problem("second", "What is 3 + 4?")]
    with RecordStore(tmp_path, writer_name="w", fsync_every=256) as store:
        sampler = Stage1Sampler(stage(), 3, served(engine), served(engine), store)
        asyncio.run(sampler.run(twins, 16))
    stored = records(tmp_path)
    solutions = {key: row["text"] for key, row in stored.items() if "vote" not in row}
    assert engine.draws == 2 * len(solutions)
    prompts = {
        prompt_set("compact").verify("What is 3 + 4?", canonical_solution(parsed), 3)[0]["content"]
        for text in solutions.values()
        if isinstance(parsed := split_response(text, StepFormat.PLAIN), ParsedResponse)
    }
    assert prompts
    asked = {bytes(r.prompt_ids).decode() for r in engine.requests if is_vote(r)}
    assert asked == prompts


class AbortingEngine(FakeEngine):
    """Cuts short what ``aborts`` says: half of the tokens, and no error."""

    def __init__(self, aborts) -> None:
        super().__init__()
        self.aborts = aborts

    async def generate(self, request: GenerationRequest) -> Generation:
        done = await super().generate(request)
        if not self.aborts(request):
            return done
        half = len(done.token_ids) // 2
        return replace(
            done,
            token_ids=done.token_ids[:half],
            logprobs=done.logprobs[:half],
            weight_versions=done.weight_versions[:half],
            finish_reason=FinishReason.ABORT,
        )


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "what", [is_vote, lambda request: not is_vote(request)], ids=["votes", "solutions"]
)
def test_an_aborted_request_is_asked_again_by_the_next_run(
    tmp_path: Path, rule: dict, what
) -> None:
    """Half an answer of an engine that was stopped is not an outcome: nothing of it is stored, and
    after the next run the store holds what a run without aborts makes. Does not prove that a real
    engine says abort when it should.
    """
    aborts = AbortingEngine(lambda request: what(request) and request.sampling.seed % 3 == 0)
    collector = collect(tmp_path / "a", stage(**rule), aborts)
    assert sum(collector.counts.engine_failures.values()) > 0
    assert not [
        row
        for row in records(tmp_path / "a").values()
        if row.get("finish_reason") == "abort"
        or row.get("outcome", {}).get("kind") == "engine_error"
    ]
    collect(tmp_path / "a", stage(**rule))
    collect(tmp_path / "b", stage(**rule))
    assert records(tmp_path / "a") == records(tmp_path / "b")
