"""Regression tests for defects of the published scripts and of slime.

They use the objects that stage III builds (``RolloutWorker``, the judge, the batch, the advantages)
with scripted models, because the defects were between functions, not inside one.
"""

from __future__ import annotations

import asyncio
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from spark_nemo.config import SparkConfig
from spark_nemo.config.designs import (
    designs,
    has_own_baseline,
    needs_step_labels,
    reward_and_advantage,
    step_advantages,
)
from spark_nemo.config.reward import VARIANTS
from spark_nemo.engines.base import FinishReason, Generation
from spark_nemo.engines.served_model import Completion, ServedModel
from spark_nemo.grammar import Variant, prompt_set
from spark_nemo.records import (
    LabelEvidence,
    LabelledSolution,
    Problem,
    Rollout,
    RolloutVerdict,
    Solution,
    TokenSpan,
    Verdict,
)
from spark_nemo.rewards import FailureRateExceeded
from spark_nemo.rollout import engines
from spark_nemo.rollout.batch import RolloutBatch
from spark_nemo.rollout.timeline import Timeline
from spark_nemo.rollout.worker import RolloutWorker
from spark_nemo.run.compose import compose_config
from spark_nemo.training.advantage_estimator import compute_advantages
from spark_nemo.training.step_advantages import ScoredResponse, global_step_advantages
from spark_nemo.verification.training_labels import sft_example

QUESTION = "3 + 4, doubled?"
RESPONSE = r"<think><step>3+4=7</step><step>7*2=14</step></think><answer>\boxed{14}</answer>"
PLAIN = "Step 1: 3+4=7\nStep 2: 7*2=14\nAnswer: 14"
YES, NO = (f"**Verification: Is the answer correct (Yes/No)? {word}**" for word in ("Yes", "No"))


def analyses(*labels: bool) -> str:
    return "\n\n".join(
        f"## Step {k}: t\n**This step is {'correct' if c else 'incorrect'}.**"
        for k, c in enumerate(labels, start=1)
    )


class Scripted:
    """Served model whose tokens are bytes; returns its replies in turn and records the prompts."""

    fingerprint = "scripted"
    tokenizer = SimpleNamespace(
        token_bytes=lambda ids: [bytes([i]) for i in ids],
        eos_ids=frozenset(),
        encode_chat=lambda messages: messages,
    )

    def __init__(self, *replies: str) -> None:
        self.replies, self.messages, self.engine = replies, [], self

    async def health(self) -> SimpleNamespace:
        return SimpleNamespace(alive=True, weight_version=0)

    async def complete(self, messages, sampling, seed) -> Completion:
        text = self.replies[len(self.messages) % len(self.replies)]
        self.messages.append(messages)
        ids = tuple(text.encode())
        return Completion(
            (1,), Generation(ids, (-1.0,) * len(ids), (0,) * len(ids), FinishReason.STOP), text
        )

    complete_prompt = complete


def config_of(design: str, *overrides: str) -> SparkConfig:
    reward, advantage = reward_and_advantage(design)
    return compose_config(
        [
            "+experiment=toy",
            f"rl/reward={reward}",
            f"rl/advantage={advantage}",
            "rl.group_size=2",
            "rl.reward.failures.max_rate=1.0",
            "rl.reward.retries=0",
            "rl.reward.cache=0",
            *overrides,
        ]
    )


@pytest.fixture
def batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """``batch(config, policy replies, reward model replies)``: one group of two, and the reward
    model.
    """

    def run(
        config: SparkConfig, policy: tuple[str, ...], judge: tuple[str, ...]
    ) -> tuple[RolloutBatch, Scripted]:
        models = {"verifier": Scripted(*judge), "policy": Scripted(*policy)}
        monkeypatch.setattr(ServedModel, "load", lambda engine, folder, role, servers: models[role])
        monkeypatch.setattr(engines, "reward_model_folder", lambda config: Path("nowhere"))
        monkeypatch.setattr(engines, "freeze_heap", lambda: None)
        loaded = engines.RolloutEngines.load(config, tmp_path)
        worker = RolloutWorker(config, [], tmp_path, Timeline(), loaded)
        return asyncio.run(worker.generator.generate_batch([Problem("p", QUESTION)], 0)), models[
            "verifier"
        ]

    return run


@pytest.mark.parametrize(
    ("design", "variant"),
    [
        (design, variant)
        for design in ["process_aware", *filter(needs_step_labels, designs())]
        for variant in VARIANTS
        if variant != "orm" or design == "process_aware"
    ],
)
def test_no_design_sends_another_prompt_than_its_reward_model_was_trained_with(
    batch, design, variant
) -> None:
    """Defect 1: a list of reward types with the step-wise prompt omitted three, so the ORM's prompt
    went to a PRM-CoT. Here every design and kind sends the prompt of the kind's training examples.
    """
    config = config_of(design, f"rl.reward.variant={variant}")
    label = LabelledSolution(
        "single",
        Solution("s", "p", QUESTION, PLAIN, "stop", 9),
        (True, True),
        True,
        f"{analyses(True, True)}\n\n{YES}",
        LabelEvidence((1, 1), 1, 1, 0, 1),
    )
    trained, _ = sft_example(label, prompt_set(config.stage1.prompt_set), Variant(variant))
    _, model = batch(config, (RESPONSE,), ("anything",))
    assert model.messages == [trained, trained]


@pytest.mark.parametrize("design", step_advantages())
@pytest.mark.parametrize("labels", [(False,), (True, False, True)])
def test_labels_of_another_number_of_steps_touch_no_token(
    batch, design: str, labels: tuple[bool, ...]
) -> None:
    """Defect 2: labels were used although one was missing or surplus. Here the response is treated
    exactly like one whose verification did not parse, also with a penalty instead of a mask.
    """
    config = config_of(design, "rl/reward/failures=penalize", "rl.reward.failures.penalty=0.0")
    good = f"{analyses(True, False)}\n\n{YES}"
    rows = [
        compute_advantages(batch(config, (RESPONSE,), (good, said))[0].rollouts, config.rl)
        for said in (f"{analyses(*labels)}\n\n{YES}", "no verification at all")
    ]
    assert all(torch.equal(a, b) for a, b in zip(*rows))
    assert any(row.any() for row in rows[0])


EARLY = {
    "prm_cot": f"I first thought:\n{YES}\n\n{analyses(True, False)}\n\n{NO}",
    "prm": f"{YES}\nStep 1: Correct\nStep 2: Incorrect\n{NO}",
    "orm": "Yes\nNo",
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_yes_before_the_final_no_does_not_win(batch, variant: str) -> None:
    """Defect 3: the first match anywhere was the verdict. Here the last word counts, and an ORM
    writes one word or none.
    """
    scored, _ = batch(
        config_of("process_aware", f"rl.reward.variant={variant}"), (RESPONSE,), (EARLY[variant],)
    )
    paid = [rollout.reward for rollout in scored.rollouts if rollout.valid]
    assert paid == ([] if variant == "orm" else [0.0, 0.0])


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_cannot_be_read_is_counted_and_is_no_zero(batch, variant: str) -> None:
    """Defect 4: an unparsable verification silently had reward 0. Here it is masked with NaN, has
    its own failure rate, and too many stop the run.
    """
    asked = [f"rl.reward.variant={variant}"]
    scored, _ = batch(config_of("process_aware", *asked), (RESPONSE,), ("The answer seems fine.",))
    assert all(not rollout.valid and math.isnan(rollout.reward) for rollout in scored.rollouts)
    assert (
        scored.metrics["failure/parse_failure"] == 1.0 and scored.metrics["valid_fraction"] == 0.0
    )
    with pytest.raises(FailureRateExceeded, match="parse_failure: 2"):
        batch(
            config_of("process_aware", *asked, "rl.reward.failures.max_rate=0.9"),
            (RESPONSE,),
            ("The answer seems fine.",),
        )


@pytest.mark.parametrize(
    "loophole",
    [
        r"<think><step>3+4=7</step></think>\boxed{14}<answer>fourteen</answer>",
        r"<think><step>3+4=\boxed{14}</step></think><answer>fourteen</answer>",
    ],
)
def test_a_box_outside_the_answer_tag_is_out_of_format(batch, loophole: str) -> None:
    """Defect 5: the published gate counts boxes and tags without their position. Here such a
    response is not verified, and has reward 0 under the gate's rule.
    """
    scored, model = batch(config_of("process_aware"), (loophole,), (f"{analyses(True)}\n\n{YES}",))
    assert [rollout.reward for rollout in scored.rollouts] == [0.0, 0.0] and model.messages == []
    assert scored.metrics["violation/box_in_answer"] == 1.0


def test_the_global_step_shares_are_those_that_run_and_not_those_of_a_docstring() -> None:
    """Defect 6: the published docstring has weights 60/40, the code 80/20. A response of one step
    has no contrast among steps, so exactly its outcome's share is left.
    """
    alone = ScoredResponse(0, 3, 1.0, True, (TokenSpan(0, 2),), (True,))
    assert global_step_advantages([alone], torch.tensor([1.0]))[0].tolist() == pytest.approx(
        [0.8] * 3
    )
    pair = [ScoredResponse(0, 2, 1.0, True, (TokenSpan(0, 1), TokenSpan(1, 2)), (True, False))]
    z = 0.5 / math.sqrt(0.5)  # step rewards +1/2 and -1/2: mean 0, unbiased std sqrt(1/2)
    expected = [0.2 * (z - z), 0.2 * -z]
    assert global_step_advantages(pair, torch.tensor([0.0]))[0].tolist() == pytest.approx(
        expected, abs=1e-5
    )


def group(number: int, *verdicts: bool) -> list[Rollout]:
    return [
        Rollout(
            problem=Problem(f"p{number}", "?"),
            group=number,
            prompt_ids=(1,),
            response_ids=(1,) * 5,
            logprobs=(-1.0,) * 5,
            weight_versions=(0,) * 5,
            text="",
            finish_reason="stop",
            step_spans=(TokenSpan(0, 2), TokenSpan(2, 4)),
            verdict=RolloutVerdict(None, Verdict((True, yes), yes)),
            reward=float(yes),
        )
        for yes in verdicts
    ]


@pytest.mark.parametrize("estimator", ["grpo", "dr_grpo", "rloo"])
@pytest.mark.parametrize("design", ["process_aware", *step_advantages()])
def test_groups_of_different_sizes_are_normalised_each_by_itself(
    design: str, estimator: str
) -> None:
    """If samples are not prompts times group size (a group lost members), slime's
    ``_post_process_rewards`` silently normalises over the whole batch.

    Here groups of 4, 2 and 3, also interleaved, have the advantages that each has alone.
    REINFORCE++ is over the batch by definition.
    """
    own_baseline = design != "process_aware" and has_own_baseline(design)
    if own_baseline and estimator != "grpo":
        pytest.skip("uses no estimator")
    config = config_of(
        design,
        *([] if own_baseline else [f"rl/estimator={estimator}"]),
        *(["rl.advantage.min_steps=2"] if design == "global_step_penalty" else []),
    ).rl
    groups = [
        group(0, True, False, False, True),
        group(1, True, False),
        group(2, False, False, True),
    ]

    def advantages(rows: list[Rollout]) -> list[list[float]]:
        return [torch.as_tensor(a).tolist() for a in compute_advantages(rows, config)]

    alone = [advantages(rows) for rows in groups]
    assert advantages([row for rows in groups for row in rows]) == [
        a for rows in alone for a in rows
    ]
    places = [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1), (0, 2), (2, 2), (0, 3)]
    assert advantages([groups[g][k] for g, k in places]) == [alone[g][k] for g, k in places]
    assert json.dumps(alone[0]) != json.dumps(alone[1])
