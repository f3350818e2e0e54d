"""Losses against a float64 NumPy oracle, numerical gradients, and what must hold for any input."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gere.cache import regions
from gere.losses.cross_entropy import next_token_ce
from gere.losses.margin import threshold_margin

CASES = range(200)


def oracle_margin(base, state, lower, upper, mask, normalization):
    """The definition, element by element, in float64."""
    rows = []
    for b in range(state.shape[0]):
        total, violated, elements = 0.0, 0, 0
        for t in range(state.shape[1]):
            for j in range(state.shape[2]):
                h, p, lo, hi = base[b, t, j], state[b, t, j], lower[j], upper[j]
                if not mask[b, t]:
                    continue
                if h <= lo:
                    loss = max(p - lo, 0.0)
                elif h >= hi:
                    loss = max(hi - p, 0.0)
                else:
                    loss = max(p - hi, 0.0) + max(lo - p, 0.0)
                total, violated, elements = total + loss, violated + (loss > 0), elements + 1
        rows.append(total / max(1, violated if normalization == "violations" else elements))
    return np.array(rows)


def oracle_ce(logits, ids, mask):
    rows = []
    for b in range(len(ids)):
        losses = []
        for t in range(ids.shape[1] - 1):
            if mask[b, t] and mask[b, t + 1]:
                x = logits[b, t]
                losses.append(x.max() + math.log(np.exp(x - x.max()).sum()) - x[ids[b, t + 1]])
        rows.append(np.mean(losses) if losses else 0.0)
    return np.array(rows)


def random_case(seed):
    rng = np.random.default_rng(seed)
    b, t, d = rng.integers(1, 5), rng.integers(1, 9), rng.integers(1, 14)
    base, state = rng.normal(size=(2, b, t, d))
    lower = -rng.uniform(0.2, 1.5, d)
    upper = rng.uniform(0.2, 1.5, d)
    lengths = rng.integers(0, t + 1, b)
    mask = np.arange(t)[None] < lengths[:, None]
    if rng.random() < 0.3:
        mask = mask[:, ::-1].copy()  # padding on the left
    return base, state, lower, upper, mask


@pytest.mark.parametrize("normalization", ["violations", "elements"])
@pytest.mark.parametrize("seed", CASES)
def test_margin_equals_oracle(seed, normalization):
    base, state, lower, upper, mask = random_case(seed)
    low, high = torch.from_numpy(lower), torch.from_numpy(upper)
    region = regions(torch.from_numpy(base), low, high)
    expected = oracle_margin(base, state, lower, upper, mask, normalization)
    exact = threshold_margin(torch.from_numpy(state), region, low, high, torch.from_numpy(mask), normalization)
    np.testing.assert_allclose(exact.numpy(), expected, rtol=1e-12, atol=1e-14)
    single = threshold_margin(
        torch.from_numpy(state).float(),
        region,
        low.float(),
        high.float(),
        torch.from_numpy(mask).long(),
        normalization,
    )
    np.testing.assert_allclose(single.numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("seed", CASES)
def test_ce_equals_oracle(seed):
    rng = np.random.default_rng(seed)
    b, t, v = rng.integers(1, 5), rng.integers(1, 12), rng.integers(2, 30)
    logits, ids = rng.normal(size=(b, t, v)) * 3, rng.integers(0, v, (b, t))
    mask = np.arange(t)[None] < rng.integers(0, t + 1, b)[:, None]
    mask = mask[:, ::-1].copy() if seed % 2 else mask  # padding on the left
    expected = oracle_ce(logits, ids, mask)
    for chunk in (1, 7, 1024):
        found = next_token_ce(torch.from_numpy(logits), torch.from_numpy(ids), torch.from_numpy(mask), chunk)
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("normalization", ["violations", "elements"])
def test_margin_gradcheck(seed, normalization):
    base, state, lower, upper, mask = (torch.from_numpy(part) for part in random_case(seed))
    region = regions(base, lower, upper)
    state.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda p: threshold_margin(p, region, lower, upper, mask, normalization), (state,), eps=1e-7, atol=1e-5
    )


@pytest.mark.parametrize("chunk", [3, 1024])
def test_ce_gradcheck(chunk):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, 7, dtype=torch.float64, generator=generator, requires_grad=True)
    ids = torch.randint(0, 7, (3, 5), generator=generator)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 0, 0, 0, 0]])
    assert torch.autograd.gradcheck(lambda x: next_token_ce(x, ids, mask, chunk), (logits,))


@pytest.mark.parametrize("normalization", ["violations", "elements"])
def test_masked_rows_are_zero_with_a_graph(normalization):
    state = torch.randn(2, 3, 4, requires_grad=True)
    region = torch.ones(2, 3, 4, dtype=torch.int8)
    zeros = torch.zeros(2, 3)
    loss = threshold_margin(state, region, -torch.ones(4), torch.ones(4), zeros, normalization)
    assert loss.tolist() == [0.0, 0.0] and loss.requires_grad
    loss.sum().backward()
    assert state.grad.abs().sum() == 0
    logits = torch.randn(2, 1, 4, requires_grad=True)
    ce = next_token_ce(logits, torch.zeros(2, 1, dtype=torch.long), torch.ones(2, 1))
    assert ce.tolist() == [0.0, 0.0] and ce.requires_grad


def test_nan_in_the_padding_reaches_neither_value_nor_gradient():
    state = torch.full((1, 2, 2), float("nan"))
    state[0, 0] = 3.0
    state.requires_grad_()
    loss = threshold_margin(
        state, torch.zeros(1, 2, 2, dtype=torch.int8), -torch.ones(2), torch.ones(2), torch.tensor([[1, 0]])
    )
    loss.sum().backward()
    assert loss.item() == 2.0 and state.grad[0, 1].tolist() == [0.0, 0.0]


def test_tolerance_drops_small_violations_and_keeps_large_ones_whole():
    state = torch.tensor([[[1.01, 1.5]]])
    arguments = (torch.zeros(1, 1, 2, dtype=torch.int8), -torch.ones(2), torch.ones(2), torch.ones(1, 1))
    assert threshold_margin(state, *arguments, tolerance=torch.tensor([0.02, 0.02])).item() == pytest.approx(0.5)
    assert threshold_margin(state, *arguments).item() == pytest.approx(0.255)


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 10**6), padding=st.integers(0, 4), left=st.booleans())
def test_padding_and_row_order_do_not_matter(seed, padding, left):
    base, state, lower, upper, mask = (torch.from_numpy(part) for part in random_case(seed))
    region = regions(base, lower, upper)
    plain = threshold_margin(state, region, lower, upper, mask)
    order = torch.randperm(len(state), generator=torch.Generator().manual_seed(seed))
    extra = (padding, 0) if left else (0, padding)
    pad = torch.nn.functional.pad
    wide = threshold_margin(
        pad(state[order], (0, 0, *extra), value=9.0), pad(region[order], (0, 0, *extra)), lower, upper,
        pad(mask[order].long(), extra),
    )  # fmt: skip
    torch.testing.assert_close(wide, plain[order], rtol=1e-12, atol=1e-12)


@settings(max_examples=200, deadline=None)
@given(base=st.floats(-3, 3), inside=st.floats(0, 1), step=st.floats(1e-3, 5))
def test_margin_is_zero_in_its_region_and_grows_outside(base, inside, step):
    lower, upper = torch.tensor([-1.0], dtype=torch.float64), torch.tensor([1.0], dtype=torch.float64)
    region = regions(torch.tensor([[[base]]], dtype=torch.float64), lower, upper)
    edges = {-1: (-5.0, -1.0), 0: (-1.0, 1.0), 1: (1.0, 5.0)}[int(region)]
    one = torch.ones(1, 1)
    within = edges[0] + inside * (edges[1] - edges[0])

    def loss(value: float) -> float:
        return threshold_margin(torch.full((1, 1, 1), value, dtype=torch.float64), region, lower, upper, one).item()

    assert loss(within) == pytest.approx(0, abs=1e-12)
    if int(region) <= 0:
        assert loss(edges[1] + step) == pytest.approx(step)
    if int(region) >= 0:
        assert loss(edges[0] - step) == pytest.approx(step)
