"""Asking for critiques, merges and verifications with the answer in view, against a critic made of
a function.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace

import pytest
from label_cases import solution, text, votes

from spark_nemo.config import LabelsConfig, Stage1Config
from spark_nemo.config.verification import RevisionSamplingConfig
from spark_nemo.engines.base import EngineFailure, FinishReason
from spark_nemo.grammar import ParsedResponse, StepFormat, split_response
from spark_nemo.records import (
    CRITIQUE,
    MERGE,
    REFERENCE_VERIFICATION,
    VERIFICATION,
    ReferenceVerification,
)
from spark_nemo.records.store import RecordStore
from spark_nemo.verification.meta_critique import MetaCritiqueSampler, stored_meta_critiques
from spark_nemo.verification.reference import (
    ReferenceSampler,
    stored_reference_verifications,
)


class Critic:
    """Answers with ``reply(prompt)``: a text, a pair with a finish reason, or an exception; keeps
    what it was asked.
    """

    def __init__(self, reply, fingerprint="critic"):
        self.reply, self.fingerprint, self.asked = reply, fingerprint, []

    async def complete(self, messages, sampling, seed):
        prompt = messages[0]["content"]
        self.asked.append((prompt, sampling, seed))
        said = self.reply(prompt)
        if isinstance(said, Exception):
            raise said
        said, reason = said if isinstance(said, tuple) else (said, FinishReason.STOP)
        return SimpleNamespace(
            text=said,
            prompt_ids=(),
            generation=SimpleNamespace(
                token_ids=tuple(range(len(said.split()))), finish_reason=reason
            ),
        )


def honest(prompt):
    return text("CI") if prompt.endswith("Merge.") else "Step 2 is wrong."


def sample(folder, critic, given_votes, picks=("single",), sampling=RevisionSamplingConfig()):  # noqa: B008
    """One run over one solution; its counts, and the meta_critiques stored so far."""
    config = Stage1Config(
        prompt_set="compact", meta_critique=list(picks), revision_sampling=sampling
    )
    parsed = split_response(solution().text, StepFormat.PLAIN)
    assert isinstance(parsed, ParsedResponse)
    with RecordStore(folder, "writer") as store:
        sampler = MetaCritiqueSampler(config, LabelsConfig(), 0, critic, store)
        asyncio.run(sampler.sample(solution(), parsed, given_votes))
        return sampler.counts, stored_meta_critiques(store, "s")


def test_the_pick_gets_one_critique_and_one_merge_greedily(tmp_path: Path) -> None:
    """Proves the chain verification -> critique -> merge: each prompt holds what it must, the merge
    is read as a verification, and it is stored under the verification it is about.
    """
    critic = Critic(honest)
    counts, meta_critiques = sample(tmp_path, critic, votes("CC", "CI"))
    (first, sampling, _), (second, _, _) = critic.asked
    assert first.endswith("Critique.") and text("CC") in first and second.endswith("Merge.")
    assert text("CC") in second and "Step 2 is wrong." in second
    assert (sampling.temperature, sampling.max_new_tokens) == (0.0, 8192)
    assert list(meta_critiques) == ["s-0"] and meta_critiques["s-0"].merge.outcome.step_labels == (
        True,
        False,
    )
    assert (counts.critiques, counts.merges, counts.failed_merges) == (1, 1, 0)


def test_a_verification_that_several_picks_choose_is_criticised_once(tmp_path: Path) -> None:
    """With one usable vote, all three picks are that vote."""
    critic = Critic(honest)
    counts, meta_critiques = sample(
        tmp_path, critic, votes("CC"), ("single", "outcome_consistency", "step_consistency")
    )
    assert (len(critic.asked), len(meta_critiques), counts.nothing_chosen) == (2, 1, 0)


def test_nothing_is_asked_for_twice_and_other_settings_are_asked_anew(tmp_path: Path) -> None:
    """A second run reuses both texts; another critic or sampling is another key."""
    sample(tmp_path, Critic(honest), votes("CC"))
    again = Critic(honest)
    counts, _ = sample(tmp_path, again, votes("CC"))
    assert (again.asked, counts.reused, counts.tokens) == ([], 2, 0)
    for critic, sampling in (
        (Critic(honest, "another"), RevisionSamplingConfig()),
        (again, RevisionSamplingConfig(temperature=0.5)),
    ):
        sample(tmp_path, critic, votes("CC"), sampling=sampling)
        assert len(critic.asked) == 2


def test_thinking_reaches_neither_critic_nor_merge(tmp_path: Path) -> None:
    """Proves it for the verification's thinking and for the critique's."""
    (vote,) = votes("CC")
    thoughtful = type(vote)(
        vote.key, vote.solution_key, 0, f"<think>SECRET</think>\n{vote.text}", vote.outcome, 10
    )
    critic = Critic(
        lambda p: text("CI") if p.endswith("Merge.") else "<think>SECRET</think>Step 2 is wrong."
    )
    sample(tmp_path, critic, [thoughtful])
    assert len(critic.asked) == 2 and not any("SECRET" in prompt for prompt, _, _ in critic.asked)


@pytest.mark.parametrize("failing", ["Critique.", "Merge."])
@pytest.mark.parametrize("how", [EngineFailure("died"), ("half a", FinishReason.ABORT)])
def test_what_an_engine_failed_to_write_is_not_stored_and_asked_for_again(
    tmp_path: Path, failing, how
) -> None:
    """Proves a failure costs a run and never becomes a record."""
    counts, meta_critiques = sample(
        tmp_path, Critic(lambda p: how if p.endswith(failing) else honest(p)), votes("CC")
    )
    assert counts.failed_critiques + counts.failed_merges == 1
    assert all(r.merge is None for r in meta_critiques.values()) and len(meta_critiques) == (
        failing == "Merge."
    )
    _, meta_critiques = sample(tmp_path, Critic(honest), votes("CC"))
    assert meta_critiques["s-0"].merge is not None


def test_a_critique_that_was_cut_off_is_kept_and_not_merged(tmp_path: Path) -> None:
    """A second request would be cut off too; the record has the reason for the missing merge."""
    critic = Critic(lambda p: ("and then", FinishReason.LENGTH))
    counts, meta_critiques = sample(tmp_path, critic, votes("CC"))
    assert (len(critic.asked), counts.failed_critiques, counts.merges) == (1, 1, 0)
    assert (meta_critiques["s-0"].critique.finish_reason, meta_critiques["s-0"].merge) == (
        "length",
        None,
    )


def test_a_merge_that_does_not_parse_is_stored_as_the_failure_it_is(tmp_path: Path) -> None:
    """One step judged where the solution has two."""
    _, meta_critiques = sample(
        tmp_path, Critic(lambda p: text("C") if p.endswith("Merge.") else "Fine."), votes("CC")
    )
    assert "step_count" in meta_critiques["s-0"].merge.outcome.reason


def test_verifications_that_saw_the_answer_have_a_kind_and_type_of_their_own(
    tmp_path: Path,
) -> None:
    """Proves the prompt holds what the closure put in, that reading the votes' kind finds none of
    them, and that another answer in the prompt is another key.
    """
    config = Stage1Config(
        prompt_set="compact", reference_answers="answers.jsonl", reference_verifications=3
    )
    parsed = split_response(solution().text, StepFormat.PLAIN)
    critic = Critic(lambda p: text("CC"))

    def ask(answer):
        return lambda solution, parsed: [{"role": "user", "content": f"the answer is {answer}"}]

    with RecordStore(tmp_path, "writer") as store:
        for answer, asked in (("3", 3), ("3", 3), ("4", 6)):
            asyncio.run(
                ReferenceSampler(config, 0, critic, ask(answer), store).sample(solution(), parsed)
            )
            assert len(critic.asked) == asked == len(store.keys(REFERENCE_VERIFICATION))
        assert not store.keys(VERIFICATION) and not store.keys(CRITIQUE) and not store.keys(MERGE)
        stored = stored_reference_verifications(store, "s")
    assert critic.asked[0][0] == "the answer is 3"
    assert all(type(record) is ReferenceVerification for record in stored)
    assert len({seed for _, _, seed in critic.asked}) == 6
