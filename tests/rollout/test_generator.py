"""From sampled bytes to rewards for every ``rl.reward``, with scripted policy and reward model."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from types import SimpleNamespace

import pytest

from spark_nemo.config import (
    ConfigError,
    DataConfig,
    RLConfig,
    SamplingConfig,
    SparkConfig,
)
from spark_nemo.config.designs import design_settings
from spark_nemo.config.reward import AnswerKeyReward, HeldoutVerifier, MaskFailures, ModelReward
from spark_nemo.config.rl import AdvantageConfig, OverlongShaping, SelectiveAdvantage
from spark_nemo.engines.base import EngineLost, FinishReason, Generation
from spark_nemo.engines.served_model import Completion
from spark_nemo.evaluation.checker import AnswerGrade
from spark_nemo.grammar import (
    PROMPT_SETS,
    StepFormat,
    Variant,
    canonical_solution,
    prompt_set,
    split_response,
)
from spark_nemo.records import (
    AnswerVerdict,
    LabelEvidence,
    LabelledSolution,
    ParseFailure,
    Problem,
    Rollout,
    Solution,
    VariantOutcome,
)
from spark_nemo.rewards import FailureRateExceeded
from spark_nemo.rewards.judge import RewardJudge
from spark_nemo.rewards.prm_service import PRMService, ServiceLimits
from spark_nemo.rollout import engines
from spark_nemo.rollout.batch import RolloutBatch
from spark_nemo.rollout.generator import RolloutGenerator
from spark_nemo.rollout.reward_hacking_monitor import RewardHackingMonitor
from spark_nemo.rollout.samples import sample_rows
from spark_nemo.rollout.timeline import Timeline
from spark_nemo.rollout.worker import RolloutWorker
from spark_nemo.training.advantage_estimator import compute_advantages
from spark_nemo.verification.training_labels import sft_example

PROMPTS = prompt_set("compact")


def response(answer: str, steps: int = 2) -> str:
    body = "".join(f"<step>line {k}</step>" for k in range(steps))
    return rf"<think>{body}</think><answer>\boxed{{{answer}}}</answer>"


def verification(labels: tuple[bool, ...], verdict: str) -> str:
    said = "".join(
        f"## Step {k}: t\n**This step is {'correct' if c else 'incorrect'}.**\n\n"
        for k, c in enumerate(labels, start=1)
    )
    return f"{said}**Verification: Is the answer correct (Yes/No)? {verdict}**"


POLICY = [response("7"), response("7"), response("8"), "no format at all"]
JUDGE = [
    verification((True, True), "Yes"),
    verification((True, False), "Yes"),
    verification((True,), "Yes"),
]
"""In the order in which the responses are shown; the last judges one step of two."""


class Scripted:
    """A served model whose tokens are bytes and whose replies are given; keeps the messages it was
    sent.

    A prompt's "ids" are its messages. The weights are version 0.
    """

    fingerprint = "scripted"
    tokenizer = SimpleNamespace(
        token_bytes=lambda ids: [bytes([i]) for i in ids],
        eos_ids=frozenset(),
        encode_chat=lambda messages: messages,
    )

    def __init__(self, replies: list[str]) -> None:
        self.replies = replies
        self.messages = []
        self.engine = self

    async def health(self):
        return SimpleNamespace(alive=True, weight_version=0)

    async def complete(self, messages, sampling, seed):
        text = self.replies[len(self.messages) % len(self.replies)]
        self.messages.append(messages)
        ids = tuple(text.encode())
        generation = Generation(ids, (-1.0,) * len(ids), (0,) * len(ids), FinishReason.STOP)
        return Completion((1,), generation, text)

    complete_prompt = complete


VERIFIER_SAMPLING = ModelReward().sampling


def generator_of(
    reward: str,
    advantage: AdvantageConfig = AdvantageConfig(),  # noqa: B008
    variant: Variant = Variant.PRM_COT,
    replies=JUDGE,
    max_rate: float = 0.5,
    checker=lambda shown: ["8" in text for _, text in shown],
    **settings,
):
    """One group of four: fine, one step wrong, verification of another step count, no format."""
    chosen = design_settings(reward if advantage.name == "outcome" else advantage.name)
    chosen["advantage"] = advantage
    if hasattr(chosen["reward"], "failures"):
        chosen["reward"] = replace(chosen["reward"], failures=MaskFailures(max_rate=max_rate))
    if isinstance(chosen["reward"], ModelReward):
        chosen["reward"] = replace(chosen["reward"], retries=0)
    config = RLConfig(**(chosen | settings), group_size=4)
    model = Scripted(replies)
    # Without a cache, for the script answers the same greedy request differently.
    service = PRMService(model, PROMPTS, VERIFIER_SAMPLING, ServiceLimits(cache_entries=0), variant)
    judge = RewardJudge(service, 0) if config.asks_reward_model else None
    return RolloutGenerator(Scripted(POLICY), PROMPTS, config, 0, judge, checker), model, config


def rewards(batch: RolloutBatch) -> tuple[float, ...]:
    return tuple(rollout.reward for rollout in batch.rollouts)


def valid(batch: RolloutBatch) -> tuple[bool, ...]:
    return tuple(rollout.valid for rollout in batch.rollouts)


def outcomes(batch: RolloutBatch) -> list[VariantOutcome | None]:
    return [rollout.verdict.outcome for rollout in batch.rollouts]


def scored(reward: str, *design, **settings):
    """The batch of the same group."""
    generator, model, config = generator_of(reward, *design, **settings)
    return asyncio.run(generator.generate_batch([Problem("p", "3 + 4?")], 0)), model, config


@pytest.mark.parametrize(
    ("reward", "expected"),
    [
        ("process_aware", [1.0, 1.0, None, 0.0]),
        ("step_average", [1.0, 0.5, None, 0.0]),
        ("step_augmented", [1.0, 0.8, None, 0.0]),
        ("rlvr", [0.0, 0.0, 1.0, 0.0]),
        ("majority", [1.0, 1.0, 0.0, 0.0]),
    ],
)
def test_each_reward_scores_the_same_batch_by_its_own_rule(
    reward: str, expected: list[float | None]
) -> None:
    """A step count that does not match is masked and counted, neither a silent 0 nor labels that
    are cut to fit.
    """
    batch, _, _ = scored(reward)
    got = [r.reward if r.valid else None for r in batch.rollouts]
    assert got == pytest.approx(expected)
    assert batch.metrics["failure_rate"] == pytest.approx(1 / 3 if None in expected else 0.0)


def test_random_is_gated_and_the_same_on_a_second_run() -> None:
    """Coins depend on the run's seed and the place in the batch; a resumed run draws the same."""
    first, second = scored("random")[0], scored("random")[0]
    assert rewards(first) == rewards(second) and rewards(first)[3] == 0.0


def test_a_run_counts_what_was_shown_and_a_checkpoint_keeps_it(tmp_path) -> None:
    """One of three verifications fails, a third of them: above 0.3, but fewer than the four that
    0.3 is judged by. The step passes, its count is in the checkpoint, and the worker that resumes
    from there has it.
    """
    problem = Problem("p", "3 + 4?")

    def worker() -> RolloutWorker:
        generator, _, config = generator_of("process_aware", max_rate=0.3)
        loaded = engines.RolloutEngines(generator.policy, generator.judge, None, None)
        return RolloutWorker(SparkConfig(rl=config), [problem], tmp_path, Timeline(), loaded)

    before = worker()
    asyncio.run(before.generate_batch([problem], 0))
    for name, content in before.files().items():
        (tmp_path / name).write_bytes(content)
    after = worker()
    after.restore(tmp_path)
    counted = after.generator.failures
    assert counted == before.generator.failures
    assert (counted.failed.total(), counted.waiting) == (1, 3)
    with pytest.raises(FailureRateExceeded, match=r"33\.3% of 3"):
        counted.finish(0.3)


@pytest.mark.parametrize("reward", ["majority", "random", "rlvr"])
def test_a_run_of_a_baseline_passes_the_check_of_failures_at_its_end(tmp_path, reward: str) -> None:
    """Majority and random rewards have no failure policy of their own, since they cannot fail."""
    problem = Problem("p", "3 + 4?")
    generator, _, config = generator_of(reward)
    loaded = engines.RolloutEngines(generator.policy, None, None, generator.checker)
    worker = RolloutWorker(SparkConfig(rl=config), [problem], tmp_path, Timeline(), loaded)
    asyncio.run(worker.generate_batch([problem], 0))
    worker.check_failures()


@pytest.mark.parametrize("reward", ["process_aware", "step_augmented", "step_average"])
def test_every_reward_from_the_model_sends_the_step_wise_prompt(reward: str) -> None:
    """The published code sends the ORM's prompt to the PRM-CoT for some of its rewards. What broke
    the format is not sent at all.
    """
    _, model, _ = scored(reward)
    canonical = [canonical_solution(split_response(text, StepFormat.TAGGED)) for text in POLICY[:3]]
    assert model.messages == [PROMPTS.reward(Variant.PRM_COT, "3 + 4?", text) for text in canonical]


LINES = [
    "Step 1: Correct\nStep 2: Correct",
    "Step 1: Correct\nStep 2: Incorrect",
    "Step 1: Correct",
]
PRM = [f"{line}\n{verification((True,), 'Yes').splitlines()[-1]}" for line in LINES]
ORM = ["Yes", "No", "Yes, I think"]


@pytest.mark.parametrize("reward", ["process_aware", "step_augmented", "step_average"])
def test_a_prm_gives_the_rewards_of_a_prm_cot_that_says_the_same(reward: str) -> None:
    """Labels and verdicts without analyses, read by a parser of its own: the analyses' text is a
    failure to it, and its lines are one to the PRM-CoT's parser.
    """
    as_prm, as_cot = scored(reward, variant=Variant.PRM, replies=PRM)[0], scored(reward)[0]
    assert outcomes(as_prm)[:2] == outcomes(as_cot)[:2]
    assert valid(as_prm) == valid(as_cot) == (True, True, False, True)
    for variant, replies in ((Variant.PRM, JUDGE), (Variant.PRM_COT, PRM), (Variant.ORM, PRM)):
        wrong = scored("process_aware", variant=variant, replies=replies, max_rate=1.0)[0]
        assert wrong.metrics["failure/parse_failure"] == 1.0


def test_an_orm_gives_a_verdict_and_no_step_labels() -> None:
    """Yes is 1, No is 0, anything else is a parse failure that is masked; the share of correct
    steps is omitted.
    """
    batch, _, _ = scored("process_aware", variant=Variant.ORM, replies=ORM)
    assert outcomes(batch)[:2] == [AnswerVerdict(True), AnswerVerdict(False)]
    assert isinstance(outcomes(batch)[2], ParseFailure)
    assert rewards(batch)[:2] == (1.0, 0.0) and valid(batch) == (
        True,
        True,
        False,
        True,
    )
    assert "correct_step_fraction" not in batch.metrics and batch.metrics[
        "failure_rate"
    ] == pytest.approx(1 / 3)
    assert [row["outcome"]["kind"] for row in sample_rows(batch, 0) if row["outcome"]] == [
        "answer_verdict",
        "answer_verdict",
        "parse_failure",
    ]
    assert all(row["step_labels"] is None for row in sample_rows(batch, 0))


@pytest.mark.parametrize("variant", Variant)
@pytest.mark.parametrize("prompts", sorted(PROMPT_SETS))
def test_a_reward_model_is_asked_with_the_very_words_it_was_trained_on(
    variant: Variant, prompts: str
) -> None:
    """The messages of stage II's training example for a plain solution are those sent for the same
    steps in tags.
    """
    plain = "Step 1: line 0\nStep 2: line 1\nAnswer: 7"
    label = LabelledSolution(
        "single",
        Solution("s", "p", "3 + 4?", plain, "stop", 9),
        (True, False),
        True,
        verification((True, False), "Yes"),
        LabelEvidence((1, 0), 1, 1, 0, 1),
    )
    trained, _ = sft_example(label, prompt_set(prompts), variant)
    model = Scripted(["nothing"])
    service = PRMService(model, prompt_set(prompts), VERIFIER_SAMPLING, variant=variant)
    text = response("7")
    parsed = split_response(text, StepFormat.TAGGED)
    rollout = Rollout(
        Problem("p", "3 + 4?"), 0, (1,), (2,), (-1.0,), (0,), text, "stop", parsed=parsed
    )
    asyncio.run(RewardJudge(service, 0).judge(rollout))
    assert model.messages == [trained]


def test_a_selective_response_outside_its_bounds_has_no_outcome() -> None:
    """Both responses have two steps; a bound of three takes the reward of all, and a failure stays
    a failure.
    """
    inside = scored("process_aware", SelectiveAdvantage(min_steps=2, max_steps=2))[0]
    assert rewards(inside)[:2] == (1.0, 1.0)
    for bounds in ({"min_steps": 3}, {"max_steps": 1}):
        outside = scored("process_aware", SelectiveAdvantage(**bounds))[0]
        assert rewards(outside)[:2] == (0.0, 0.0) and valid(outside) == valid(inside)


@pytest.mark.parametrize("reward", ["process_aware", "rlvr"])
def test_the_overlong_punishment_is_added_to_whatever_the_reward_is(reward: str) -> None:
    """Tokens are bytes here: a response of R of at most M tokens, with a buffer of M, loses R / M.
    The masked one stays masked.
    """
    limit = 200
    plain = scored(reward)[0]
    batch = scored(
        reward, sampling=SamplingConfig(max_new_tokens=limit), shaping=OverlongShaping(buffer=limit)
    )[0]
    for rollout, ok, before, after in zip(
        batch.rollouts, valid(batch), rewards(plain), rewards(batch)
    ):
        if ok:
            assert after == pytest.approx(before - len(rollout.response_ids) / limit)
    assert valid(batch) == valid(plain)


def test_sampled_step_spans_meet_the_labels_they_belong_to() -> None:
    """The half that is judged wrong is, in bytes, the second step and nothing else: spans travel
    from the sampled tokens to the advantage.
    """
    batch, _, config = scored("process_aware", AdvantageConfig("capo"))
    row = compute_advantages(batch.rollouts, config)[1]
    punished = bytes(
        i for i, a in zip(batch.rollouts[1].response_ids, row.tolist()) if a < row.max()
    )
    assert punished.decode() == "<step>line 1</step>"


def test_an_answer_that_nobody_could_compare_is_no_reward(tmp_path, monkeypatch) -> None:
    """math-verify that is late or dies says nothing about a response: the RLVR baseline masks it
    and counts it, as rl.reward.failures says. It used to be a reward of 0.
    """
    path = tmp_path / "keys.jsonl"
    path.write_text('{"problem_id": "p", "answer": "7"}\n')
    says = {"7": AnswerGrade.EQUAL, "8": AnswerGrade.TIMEOUT, None: AnswerGrade.CRASHED}
    monkeypatch.setattr(
        engines, "grade_answers", lambda pairs: [says[answer] for answer, _ in pairs]
    )
    checker = engines.answer_checker(
        SparkConfig(rl=RLConfig(reward=AnswerKeyReward()), data=DataConfig(rl_answers=str(path)))
    )
    batch = scored("rlvr", checker=checker)[0]
    assert rewards(batch)[:2] == (1.0, 1.0) and valid(batch) == (
        True,
        True,
        False,
        False,
    )
    assert batch.metrics["failure/engine_error"] == 0.5
    with pytest.raises(ConfigError, match=r"data\.rl_answers.*no answer for problem q"):
        checker([("q", "")])


@pytest.mark.parametrize(
    "settings",
    [
        {"shaping": OverlongShaping(buffer=200), "sampling": SamplingConfig(max_new_tokens=200)},
        {"advantage": SelectiveAdvantage(min_steps=3)},
    ],
)
def test_a_held_out_verifier_that_agrees_leaves_no_gap(tmp_path, settings: dict) -> None:
    """Its judgements are made into rewards exactly as training makes them, with what length and
    steps do to them; a punishment of length on one side alone would look like a gap that closes.
    """
    batch, _, config = scored("process_aware", **settings)
    limits = ServiceLimits(cache_entries=0)
    service = PRMService(Scripted(JUDGE), PROMPTS, VERIFIER_SAMPLING, limits)
    held_out = RewardJudge(service, 0)
    heldout = replace(config.reward, heldout=HeldoutVerifier(model="other"))
    judged = SparkConfig(rl=replace(config, reward=heldout))
    monitor = RewardHackingMonitor(judged, tmp_path, held_out=held_out)
    assert asyncio.run(monitor.metrics(batch, 0))["hacking/reward_gap"] == 0
    assert rewards(batch) != rewards(scored("process_aware")[0])


@pytest.mark.parametrize(
    "settings", [{"reward": "majority"}, {"reward": "process_aware", "replies": ["no verdict"]}]
)
def test_steps_that_nobody_judged_have_no_share_of_correct_ones(settings: dict) -> None:
    """A baseline asks no reward model, and here no verification parses: neither may be drawn as a
    curve at 0.
    """
    assert "correct_step_fraction" not in scored(**settings, max_rate=1.0)[0].metrics
    assert scored("process_aware")[0].metrics["correct_step_fraction"] == 3 / 4


def test_nothing_of_a_batch_goes_on_when_a_part_of_it_has_failed() -> None:
    """The run ends, and what it does at its end (telling servers, naming tensors that differ) must
    not share them with the rest of the batch. Here the policy's engine is lost after two responses,
    and votes on them are on their way.
    """
    slow = []

    class Lost(Scripted):
        async def complete(self, messages, sampling, seed):
            if len(self.messages) < 2:
                return await super().complete(messages, sampling, seed)
            await asyncio.sleep(0.01 if len(self.messages) == 2 else 60)
            raise EngineLost("gone")

    class Slow(Scripted):
        async def complete_prompt(self, prompt, sampling, seed):
            slow.append(asyncio.current_task())
            await asyncio.sleep(60)

    async def run() -> set:
        sampling = SamplingConfig(temperature=1.0)
        config = RLConfig(group_size=2, reward=ModelReward(votes=2, sampling=sampling))
        judge = RewardJudge(PRMService(Slow([]), PROMPTS, sampling), 0, votes=2)
        generator = RolloutGenerator(Lost([response("7")]), PROMPTS, config, 0, judge, None)
        with pytest.raises(EngineLost):
            await generator.generate_batch([Problem(name, "3 + 4?") for name in "abc"], 0)
        return asyncio.all_tasks() - {asyncio.current_task()}

    assert asyncio.run(run()) == set() and slow
