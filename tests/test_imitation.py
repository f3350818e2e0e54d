"""L1, L2 and KL against a float64 NumPy oracle, numerical gradients, and what the likeliest tokens miss."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gere.losses.imitation import l1_distance, l2_distance
from gere.losses.kl import TopLogits, top_k_kl, top_logits

CASES = range(200)


def random_mask(rng, b, t):
    mask = np.arange(t)[None] < rng.integers(0, t + 1, b)[:, None]
    return mask[:, ::-1].copy() if rng.random() < 0.3 else mask  # padding on the left


def oracle_difference(state, target, mask, power):
    rows = []
    for b in range(len(state)):
        values = [abs(x) ** power for t in range(state.shape[1]) if mask[b, t] for x in state[b, t] - target[b, t]]
        rows.append(sum(values) / max(1, len(values)))
    return np.array(rows)


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def oracle_kl(logits, base, mask, top_k, temperature):
    """The definition, token by token: the likeliest tokens one by one, all others as one."""
    rows = []
    for b in range(len(logits)):
        total = 0.0
        for t in range(logits.shape[1]):
            if not mask[b, t]:
                continue
            p, q = softmax(base[b, t] / temperature), softmax(logits[b, t] / temperature)
            kept = np.argsort(-p, kind="stable")[:top_k]
            total += sum(p[j] * math.log(p[j] / q[j]) for j in kept)
            rest = [j for j in range(len(p)) if j not in kept]
            if rest:
                total += p[rest].sum() * math.log(p[rest].sum() / q[rest].sum())
        rows.append(total / max(1, mask[b].sum()))
    return np.array(rows)


@pytest.mark.parametrize(("distance", "power"), [(l1_distance, 1), (l2_distance, 2)])
@pytest.mark.parametrize("seed", CASES)
def test_differences_equal_oracle(seed, distance, power):
    rng = np.random.default_rng(seed)
    b, t, d = rng.integers(1, 5), rng.integers(1, 9), rng.integers(1, 14)
    state, target = rng.normal(size=(2, b, t, d))
    mask = random_mask(rng, b, t)
    expected = oracle_difference(state, target, mask, power)
    exact = distance(torch.from_numpy(state), torch.from_numpy(target), torch.from_numpy(mask))
    np.testing.assert_allclose(exact.numpy(), expected, rtol=1e-12, atol=1e-14)
    single = distance(torch.from_numpy(state).float(), torch.from_numpy(target).float(), torch.from_numpy(mask).long())
    np.testing.assert_allclose(single.numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("seed", CASES)
def test_kl_equals_oracle(seed):
    rng = np.random.default_rng(seed)
    b, t, v = rng.integers(1, 4), rng.integers(1, 7), rng.integers(2, 20)
    base = rng.normal(size=(b, t, v)) * 3
    logits = base + rng.normal(size=base.shape)
    mask, temperature, top_k = random_mask(rng, b, t), rng.uniform(0.5, 3), int(rng.integers(1, v + 3))
    expected = oracle_kl(logits, base, mask, top_k, temperature)
    kept = top_logits(torch.from_numpy(base), top_k, temperature)
    for chunk in (1, 5, 1024):
        found = top_k_kl(torch.from_numpy(logits), kept, torch.from_numpy(mask), temperature, chunk_tokens=chunk)
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9, atol=1e-12)
    narrow = TopLogits(kept.ids, kept.log_probs.float(), kept.rest.float())
    single = top_k_kl(torch.from_numpy(logits).float(), narrow, torch.from_numpy(mask), temperature)
    np.testing.assert_allclose(single.numpy(), expected, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("distance", [l1_distance, l2_distance])
@pytest.mark.parametrize("seed", range(5))
def test_difference_gradcheck(distance, seed):
    generator = torch.Generator().manual_seed(seed)
    state, target = torch.randn(2, 3, 4, 5, dtype=torch.float64, generator=generator)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]])
    assert torch.autograd.gradcheck(lambda p: distance(p, target, mask), (state.requires_grad_(),))


@pytest.mark.parametrize("top_k", [1, 3, 7])
@pytest.mark.parametrize("chunk", [2, 1024])
def test_kl_gradcheck(top_k, chunk):
    generator = torch.Generator().manual_seed(0)
    base, logits = torch.randn(2, 3, 4, 7, dtype=torch.float64, generator=generator)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]])
    kept = top_logits(base, top_k, 2.0)
    assert torch.autograd.gradcheck(lambda x: top_k_kl(x, kept, mask, chunk_tokens=chunk), (logits.requires_grad_(),))


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 10**6), drift=st.floats(0.01, 3), temperature=st.floats(0.5, 4))
def test_the_likeliest_tokens_bound_the_divergence_from_below(seed, drift, temperature):
    """More tokens never lower it, all tokens give it whole, and what is missed is rest x divergence in the rest."""
    generator = torch.Generator().manual_seed(seed)
    base = 3 * torch.randn(1, 1, 40, dtype=torch.float64, generator=generator)
    logits = base + drift * torch.randn(base.shape, dtype=torch.float64, generator=generator)
    one = torch.ones(1, 1)
    log_p, log_q = ((x / temperature).log_softmax(-1).flatten() for x in (base, logits))
    full = (log_p.exp() * (log_p - log_q)).sum().item()
    found = [top_k_kl(logits, top_logits(base, k, temperature), one, temperature).item() for k in (1, 4, 16, 40)]
    assert all(small <= large + 1e-12 for small, large in zip(found, [*found[1:], full], strict=True))
    assert found[-1] == pytest.approx(full, abs=1e-12)
    kept = top_logits(base, 16, temperature)
    others = torch.ones(40, dtype=torch.bool)
    others[kept.ids.flatten().long()] = False
    p, q = (x[others] - x[others].logsumexp(0) for x in (log_p, log_q))
    missed = kept.rest.exp().item() * (p.exp() * (p - q)).sum().item()
    assert full - found[2] == pytest.approx(missed, abs=1e-10)


def test_a_tiny_rest_keeps_its_digits():
    """1 - the sum of the likeliest would be 0 in float32."""
    logits = torch.zeros(1, 1, 10)
    logits[..., 0] = 40.0
    base = top_logits(logits, 1, 1.0)
    assert base.rest.item() == pytest.approx(math.log(9) - 40, rel=1e-6)
    moved = logits.clone().requires_grad_()
    top_k_kl(moved, base, torch.ones(1, 1), 1.0, -1.0).sum().backward()
    assert moved.grad.isfinite().all()


def test_tolerance_and_padding_reach_neither_value_nor_gradient():
    state = torch.tensor([[[1.01, 2.0], [math.nan, math.nan]]], requires_grad=True)
    mask = torch.tensor([[1, 0]])
    for distance, value in ((l1_distance, 0.5), (l2_distance, 0.5)):
        state.grad = None
        loss = distance(state, torch.ones(1, 2, 2), mask, torch.tensor([0.02, 0.02]))
        loss.sum().backward()
        assert loss.item() == value and state.grad[0, 1].tolist() == [0, 0] and state.grad[0, 0, 0] == 0
    logits = torch.randn(1, 2, 9, generator=torch.Generator().manual_seed(0))
    base = top_logits(logits, 4, 2.0)
    moved = (logits + torch.tensor([1e-4, 1.0])[None, :, None] * torch.arange(9)).requires_grad_()
    loss = top_k_kl(moved, base, torch.ones(1, 2), 2.0, tolerance=1e-3)
    loss.sum().backward()
    assert loss.item() > 0 and moved.grad[0, 0].abs().sum() == 0 and moved.grad[0, 1].abs().sum() > 0


@pytest.mark.parametrize("distance", [l1_distance, l2_distance])
def test_a_row_of_padding_is_zero_with_a_graph(distance):
    state = torch.randn(2, 3, 4, requires_grad=True)
    loss = distance(state, torch.zeros(2, 3, 4), torch.zeros(2, 3))
    loss.sum().backward()
    assert loss.tolist() == [0, 0] and state.grad.abs().sum() == 0
    logits = torch.randn(1, 2, 5, requires_grad=True)
    loss = top_k_kl(logits, top_logits(torch.randn(1, 2, 5), 2, 2.0), torch.zeros(1, 2))
    loss.sum().backward()
    assert loss.tolist() == [0] and logits.grad.abs().sum() == 0
