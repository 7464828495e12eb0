"""Advantages per token from step labels: pure functions of one batch of scored responses.

Every design returns one float32 tensor [R] per response, R its number of tokens. An invalid
response gets zeros and does not enter any statistics. Groups go by id and may differ in size.

**Unusable labels.** ``ScoredResponse.labelled_steps`` is None for a response that was never
verified, or whose labels differ in number from its step spans. Labels are neither padded nor cut:
``parse_verifier_output`` rejects a verification of another step count, so the second case takes a
bug. The design then falls back to the reward of the whole response, as its docstring states.

**Inflation.** Splitting a correct step in two (same tokens, one more span) does not change any
response's total advantage under ``selective``, ``prefix`` and ``capo``. It does under
``global_step``, with or without penalty, and under ``min_form`` if no step is incorrect.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from spark_nemo.config.designs import register_advantage
from spark_nemo.config.rl import AdvantageConfig, StepPenaltyAdvantage
from spark_nemo.records import TokenSpan

from .advantages import STD_EPS, rloo_advantages

PROCESS_SHARE, STEP_SHARE = 0.8, 0.2
"""Global step-reward: the published code computes 80/20; its docstring states another ratio."""
MIN_FORM_TEMPERATURE = 0.1
PREFIX_REWARD = 0.5
CAPO_WHOLE, CAPO_WRONG_STEP = 2.0, 1.0


@dataclass(frozen=True, slots=True)
class ScoredResponse:
    """One response as an advantage design sees it.

    ``reward`` is the reward of the whole response (f * y), read only when ``valid``.
    ``step_labels`` is None without a verdict. ``step_spans[k]`` are the tokens of step k + 1.
    """

    group: int
    num_tokens: int
    reward: float
    valid: bool
    step_spans: tuple[TokenSpan, ...] = ()
    step_labels: tuple[bool, ...] | None = None

    def __post_init__(self) -> None:
        if any(span.end > self.num_tokens for span in self.step_spans):
            raise ValueError(f"ScoredResponse: a step span ends after token {self.num_tokens}")

    @property
    def labelled_steps(self) -> tuple[tuple[TokenSpan, bool], ...] | None:
        """Spans with their labels; None without labels or steps, or if their numbers differ."""
        if not self.step_labels or len(self.step_labels) != len(self.step_spans):
            return None
        return tuple(zip(self.step_spans, self.step_labels))


def broadcast_advantages(responses: Sequence[ScoredResponse], outcome_N: Tensor) -> list[Tensor]:
    """Return each response's advantage on all of its tokens."""
    return [
        torch.full((r.num_tokens,), a) for r, a in zip(responses, outcome_N.tolist(), strict=True)
    ]


def selective_advantages(
    responses: Sequence[ScoredResponse],
    outcome_N: Tensor,
    *,
    discount: float,
) -> list[Tensor]:
    """Discount the advantage A of tokens whose step label disagrees with the sign of A.

    ``A_t = A`` where the label of t's step agrees (A >= 0 and correct, or A < 0 and incorrect),
    else ``discount * A`` with a discount of 0 (zero) or 0.5 (half). Tokens outside steps keep A.
    ``outcome_N`` holds A, group-normalized from f * y. Source: arXiv 2512.03244, selective
    advantage.

    Without usable labels every token keeps A.
    Resists inflation: splitting a correct step changes no response's total advantage.
    """
    rows = broadcast_advantages(responses, outcome_N)
    for response, row_R, advantage in zip(responses, rows, outcome_N.tolist()):
        for span, correct in response.labelled_steps or ():
            if correct != (advantage >= 0):
                row_R[span.start : span.end] = discount * advantage
    return rows


def global_step_advantages(responses: Sequence[ScoredResponse], outcome_N: Tensor) -> list[Tensor]:
    """Add normalized step rewards to the outcome: ``A_t = 0.8 A + 0.2 sum_{t' >= t} z_t'``.

    z is the step reward (+1/n for a correct step, -1/n for an incorrect one, at the step's last
    token) normalized by mean and unbiased std over all steps of the prompt's group. ``outcome_N``
    holds A, from f * y. Source: arXiv 2512.03244, global step-reward; RL-Tango's advantage.

    Without usable labels a response gets no step rewards and keeps 0.8 A. A group with equal step
    rewards has z = 0. Does *not* resist inflation: splitting a correct step in two changes 1/n, the
    group's statistics, and the total advantage of every response in the group.
    """
    rows = [PROCESS_SHARE * row_R for row_R in broadcast_advantages(responses, outcome_N)]
    for members in _groups(responses):
        labelled = [i for i in members if responses[i].labelled_steps]
        rewards = [step_rewards(responses[i].step_labels) for i in labelled]
        if not rewards:
            continue
        all_S = torch.cat(rewards)
        centred_S = all_S - all_S.mean()
        spread = (centred_S.square().sum() / max(1, all_S.numel() - 1)).sqrt()
        if all_S.numel() < 2 or spread < STD_EPS:
            continue
        for i, rewards_K in zip(labelled, rewards):
            z_K = (rewards_K - all_S.mean()) / (spread + STD_EPS)
            rows[i] += (STEP_SHARE * _returns(_at_step_ends(responses[i], z_K))).to(torch.float32)
    return rows


def global_step_penalty_advantages(
    responses: Sequence[ScoredResponse],
    outcome_N: Tensor,
    *,
    min_steps: int,
    max_steps: int,
) -> list[Tensor]:
    """Drop the step rewards of responses with fewer than ``min_steps`` or more than ``max_steps``.

    The rest is ``global_step_advantages``. A response outside the bounds keeps 0.8 A and does not
    enter the step statistics, this package's reading of "step rewards 0". Source: arXiv 2512.03244,
    global step-reward with step penalty; 3 and 20 in the published code.

    Does *not* resist inflation within the bounds: splitting a correct step has the effect described
    in ``global_step_advantages``. The bounds rule out one all-correct step, and more steps than
    ``max_steps``.
    """
    bounded = []
    for response in responses:
        if not min_steps <= len(response.step_spans) <= max_steps:
            response = replace(response, step_labels=None)
        bounded.append(response)
    return global_step_advantages(bounded, outcome_N)


def min_form_advantages(
    responses: Sequence[ScoredResponse],
    *,
    temperature: float = MIN_FORM_TEMPERATURE,
) -> list[Tensor]:
    """Value a response by its worst step (PURE).

    For response i of a group of K, with r*_t its step credit (``min_form_credit``) at the step's
    last token::

        A_t = y_i - mean_{j != i} y_j  +  sum_{t' >= t} (r*_t' - b_i)
        b_i = mean_{j != i} (sum_t r*_jt / R_j)

    b_i is a baseline per *token*: a baseline per step would favour responses of few steps. Nothing
    is divided by a std. Source: arXiv 2504.15275, with the verdict in the place of the answer key.

    Without usable labels a response counts as one step over all its tokens with reward 2 * reward -
    1, so breaking the format (reward 0) is the worst possible step, not an escape from the judge. A
    group with fewer than two valid members gives 0.

    Does *not* resist inflation in full. Splitting a correct step never changes the sum of the
    credits, hence the advantage at the first token, by more than exp(-2 / temperature). With an
    incorrect step in the response all credit goes to the incorrect steps and no token changes
    either. In a response of correct steps only, the same credit is spread over other step ends, so
    the total over tokens changes (either way, with the place of the cut).
    """
    rows = [torch.zeros(r.num_tokens, dtype=torch.float64) for r in responses]
    outcome_N = rloo_advantages(*_rewards(responses)).to(torch.float64)
    for members in _groups(responses):
        if len(members) < 2:
            continue
        credits = {i: _min_form_row(responses[i], temperature) for i in members}
        means = {i: float(credits[i].mean()) for i in members if credits[i].numel()}
        for i in members:
            baseline = (sum(means.values()) - means.get(i, 0.0)) / (len(members) - 1)
            rows[i] = outcome_N[i] + _returns(credits[i] - baseline)
    return [row_R.to(torch.float32) for row_R in rows]


def min_form_credit(rewards_K: Tensor, temperature: float = MIN_FORM_TEMPERATURE) -> Tensor:
    """Return ``r*_k = r_k softmax(-r / T)_k``; the sum tends to min_k r_k as T goes to 0.

    Source: arXiv 2504.15275, equation 5.
    """
    return rewards_K * torch.softmax(-rewards_K / temperature, dim=0)


def prefix_advantages(
    responses: Sequence[ScoredResponse],
    *,
    prefix_reward: float = PREFIX_REWARD,
    relu: bool = False,
) -> list[Tensor]:
    """Reward a failed response up to its first error (VPPO).

    ``A_t = r_t - mean_g(y)``, without division by the std. r_t is y, except that tokens before the
    first incorrect step of a response with verdict No have r_t = ``prefix_reward``. ``relu`` keeps
    the prefix's advantage from being negative in a group that mostly succeeds. Source: arXiv
    2601.18984, with the verdict in the place of the answer key.

    If all steps are correct and the verdict remains No, the error is in the answer: the prefix ends
    with the last step. Without usable labels the prefix is empty. A group with fewer than two valid
    members gives 0. Resists inflation: splitting a correct step changes no response's total
    advantage, the prefix is a set of tokens.
    """
    rows = [torch.zeros(r.num_tokens) for r in responses]
    for members in _groups(responses):
        if len(members) < 2:
            continue
        mean = sum(responses[i].reward for i in members) / len(members)
        for i in members:
            rows[i] += responses[i].reward - mean
            end = _prefix_end(responses[i])
            rows[i][:end] = max(0.0, prefix_reward - mean) if relu else prefix_reward - mean
    return rows


def capo_advantages(
    responses: Sequence[ScoredResponse],
    *,
    whole: float = CAPO_WHOLE,
    wrong_step: float = CAPO_WRONG_STEP,
) -> list[Tensor]:
    """Penalize the tokens of incorrect steps (CAPO).

    ``r_t = whole * y - wrong_step * 1[t is in an incorrect step]``, normalized by mean and unbiased
    std over all tokens of the group (this package's reading). The asymmetry whole > wrong_step
    keeps a correct response with wrong steps above a wrong response without. Source: arXiv
    2508.02298, with the verdict in the place of the answer key.

    Without usable labels no token is penalized. A group with fewer than two valid members, or
    without contrast, gives 0. Resists inflation: splitting a correct step changes no response's
    total advantage.
    """
    if not whole > wrong_step >= 0:
        raise ValueError(
            f"capo_advantages: whole={whole} must be larger than wrong_step={wrong_step} >= 0"
        )
    rows = [torch.zeros(r.num_tokens) for r in responses]
    for members in _groups(responses):
        rewards = {i: _capo_row(responses[i], whole, wrong_step) for i in members}
        all_T = torch.cat(list(rewards.values()))
        if len(members) < 2 or all_T.numel() < 2:
            continue
        std = all_T.std()
        if std < STD_EPS:
            continue
        for i, row_R in rewards.items():
            rows[i] = ((row_R - all_T.mean()) / (std + STD_EPS)).to(torch.float32)
    return rows


@register_advantage("selective")
def _selective(
    responses: Sequence[ScoredResponse], outcome_N: Tensor, config: AdvantageConfig
) -> list[Tensor]:
    return selective_advantages(responses, outcome_N, discount=0.0)


@register_advantage("selective_half")
def _selective_half(
    responses: Sequence[ScoredResponse], outcome_N: Tensor, config: AdvantageConfig
) -> list[Tensor]:
    return selective_advantages(responses, outcome_N, discount=0.5)


@register_advantage("global_step")
def _global_step(
    responses: Sequence[ScoredResponse], outcome_N: Tensor, config: AdvantageConfig
) -> list[Tensor]:
    return global_step_advantages(responses, outcome_N)


@register_advantage("global_step_penalty")
def _global_step_penalty(
    responses: Sequence[ScoredResponse], outcome_N: Tensor, config: StepPenaltyAdvantage
) -> list[Tensor]:
    return global_step_penalty_advantages(
        responses, outcome_N, min_steps=config.min_steps, max_steps=config.max_steps
    )


@register_advantage("min_form")
def _min_form(
    responses: Sequence[ScoredResponse], outcome_N: None, config: AdvantageConfig
) -> list[Tensor]:
    return min_form_advantages(responses)


@register_advantage("prefix")
def _prefix(
    responses: Sequence[ScoredResponse], outcome_N: None, config: AdvantageConfig
) -> list[Tensor]:
    return prefix_advantages(responses)


@register_advantage("capo")
def _capo(
    responses: Sequence[ScoredResponse], outcome_N: None, config: AdvantageConfig
) -> list[Tensor]:
    return capo_advantages(responses)


def step_rewards(labels: Sequence[bool]) -> Tensor:
    """Return +1/n for a correct step and -1/n for an incorrect one, float64 [n]."""
    signs_K = torch.tensor([1.0 if correct else -1.0 for correct in labels], dtype=torch.float64)
    return signs_K / len(labels)


def _rewards(responses: Sequence[ScoredResponse]) -> tuple[Tensor, list[int], Tensor]:
    return (
        torch.tensor([r.reward for r in responses]),
        [r.group for r in responses],
        torch.tensor([r.valid for r in responses], dtype=torch.bool),
    )


def _groups(responses: Sequence[ScoredResponse]) -> list[list[int]]:
    """Indices of the valid members of each group."""
    members: dict[int, list[int]] = {}
    for index, response in enumerate(responses):
        if response.valid:
            members.setdefault(response.group, []).append(index)
    return list(members.values())


def _at_step_ends(response: ScoredResponse, values_K: Tensor) -> Tensor:
    row_R = torch.zeros(response.num_tokens, dtype=torch.float64)
    for span, value in zip(response.step_spans, values_K.tolist(), strict=True):
        # Added: a step without a token of its own shares its neighbour's.
        row_R[max(span.end - 1, 0)] += value
    return row_R


def _returns(rewards_R: Tensor) -> Tensor:
    """``G_t = sum_{t' >= t} r_t'``."""
    return rewards_R.flip(0).cumsum(0).flip(0)


def _min_form_row(response: ScoredResponse, temperature: float) -> Tensor:
    if response.labelled_steps is not None:
        signs_K = step_rewards(response.step_labels) * len(response.step_labels)
        return _at_step_ends(response, min_form_credit(signs_K, temperature))
    row_R = torch.zeros(response.num_tokens, dtype=torch.float64)
    row_R[-1:] = 2 * response.reward - 1
    return row_R


def _prefix_end(response: ScoredResponse) -> int:
    steps = response.labelled_steps
    if steps is None or response.reward > 0:
        return 0
    for span, correct in steps:
        if not correct:
            return span.start
    return steps[-1][0].end


def _capo_row(response: ScoredResponse, whole: float, wrong_step: float) -> Tensor:
    row_R = torch.full((response.num_tokens,), whole * response.reward, dtype=torch.float64)
    for span, correct in response.labelled_steps or ():
        if not correct:
            row_R[span.start : span.end] = whole * response.reward - wrong_step
    return row_R
