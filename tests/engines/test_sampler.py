"""The distribution that is drawn from."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spark_nemo.engines.local.sampler import RowSampling, cut_probabilities, draw


def rows(count, temperature=1.0, top_p=1.0, top_k=0, seed=0):
    return RowSampling(
        torch.full((count,), temperature),
        torch.zeros(count, dtype=torch.bool),
        torch.full((count,), top_p),
        torch.full((count,), top_k),
        torch.rand(count, generator=torch.Generator().manual_seed(seed)),
        any_greedy=False,
        any_cut=top_p < 1 or top_k > 0,
    )


def reference_cut(logits_V, top_p, top_k):
    """Plain Python: the k largest, then the smallest head of them whose mass reaches top_p of
    theirs.
    """
    probs = torch.softmax(logits_V.double(), -1).tolist()
    order = sorted(range(len(probs)), key=lambda token: -probs[token])[: top_k or None]
    mass, kept = sum(probs[token] for token in order), []
    for token in order:
        kept.append(token)
        if sum(probs[t] for t in kept) >= top_p * mass:
            break
    total = sum(probs[token] for token in kept)
    return [probs[token] / total if token in kept else 0.0 for token in range(len(probs))]


@pytest.mark.parametrize(
    "temperature, top_p, top_k", [(1.0, 1.0, 0), (0.5, 1.0, 0), (1.0, 0.8, 0), (2.0, 0.9, 7)]
)
def test_draws_follow_the_distribution(temperature, top_p, top_k):
    """Chi-square of 40 000 one-step draws against plain Python stays under its 99.9 % quantile
    (roughly).
    """
    logits_V = torch.randn(12, generator=torch.Generator().manual_seed(5)) * 1.5
    count = 40_000
    tokens_N, _ = draw(logits_V.expand(count, -1), rows(count, temperature, top_p, top_k))
    expected_V = torch.tensor(reference_cut(logits_V / temperature, top_p, top_k)) * count
    seen_V = torch.bincount(tokens_N, minlength=12).double()
    possible = expected_V > 0
    assert seen_V[~possible].sum() == 0
    degrees = int(possible.sum()) - 1
    chi_square = ((seen_V - expected_V)[possible] ** 2 / expected_V[possible]).sum().item()
    assert chi_square < degrees + 3.1 * (2 * degrees) ** 0.5 + 4


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.01, 1.0), st.integers(0, 40))
def test_cut_keeps_exactly_the_nucleus(seed, top_p, top_k):
    """Kept tokens equal plain Python's, whatever another row of the batch asks for."""
    logits_NV = torch.randn(3, 30, generator=torch.Generator().manual_seed(seed)) * 2
    probs_NV = torch.softmax(logits_NV, -1)
    cut_NV = cut_probabilities(
        probs_NV, torch.tensor([top_p, 1.0, 0.5]), torch.tensor([top_k, 0, 3])
    )
    reference_V = torch.tensor(reference_cut(logits_NV[0], top_p, min(top_k, 30)))
    differing = (cut_NV[0] > 0) != (reference_V > 0)
    assert probs_NV[0][differing].sum() < 1e-5  # only rounding at the edge of the nucleus
    assert torch.equal(cut_NV[1], probs_NV[1])
    assert int((cut_NV[2] > 0).sum()) <= 3


@given(st.floats(0, 1, exclude_max=True, width=32), st.integers(0, 1000))
@settings(max_examples=150, deadline=None)
def test_any_uniform_gives_a_possible_token(uniform, seed):
    """No uniform in [0, 1) selects a token of probability 0, nor runs past the end."""
    logits_NV = torch.randn(1, 50, generator=torch.Generator().manual_seed(seed)) * 30
    sampling = dataclasses.replace(rows(1), uniform_N=torch.tensor([uniform]))
    tokens_N, logprobs_N = draw(logits_NV, sampling)
    assert logprobs_N.exp().item() > 0
    assert logprobs_N.item() == torch.log_softmax(logits_NV, -1)[0, tokens_N.item()].item()


def test_not_finite_logits_are_rejected():
    """NaN weights end in an error, not in a token."""
    with pytest.raises(FloatingPointError, match="not finite"):
        draw(torch.full((2, 5), float("nan")), rows(2))
