"""The fused margin against the plain one and a float64 NumPy oracle: values, gradients, memory by count, fallbacks."""

from __future__ import annotations

import logging
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_losses import oracle_margin
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from gere.cache import pack, regions, unpack
from gere.losses.distances import MarginDistance, Seen
from gere.errors import CacheMismatchError
from gere.losses.margin import margin_sums
from gere.margin import chunks, fused_margin_sums, plain
from gere.margin.operands import Operands
from gere.margin.trust import CheckedKernels, small_case

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SHAPES = ((1, 1, 1), (3, 7, 13), (2, 5, 64), (4, 33, 30), (1, 2, 5))
SPECIAL = (torch.nan, torch.inf, -torch.inf, 0.0)


def case(seed, shape, dtype=torch.float32, share=0.0):
    """State, codes, bands, mask and tolerance; a `share` of the state is NaN, infinite or 0."""
    generator = torch.Generator().manual_seed(seed)
    b, t, d = shape
    base = torch.randn(shape, generator=generator)
    state = base + 0.5 * torch.randn(shape, generator=generator)
    odd = torch.rand(shape, generator=generator) < share
    state[odd] = torch.tensor(SPECIAL)[torch.randint(0, 4, shape, generator=generator)][odd]
    lower, upper = -torch.rand(d, generator=generator), torch.rand(d, generator=generator)
    mask = torch.rand(b, t, generator=generator) < 0.7
    tolerance = 0.1 * torch.rand(d, generator=generator)
    if not seed % 3:  # coarse numbers, so that elements lie on their bands, or off them by just the tolerance
        base, state, lower, upper = ((4 * values).round() / 4 for values in (base, state, lower, upper))
        tolerance = (2 * torch.rand(d, generator=generator)).round() / 4
    return state.to(dtype), pack(regions(base, lower, upper)), lower, upper, mask, tolerance


def both(state, *others, factor=None):
    """Sums and gradient of the fused and of the plain version."""
    found = []
    for use_plain in (False, True):
        own = state.detach().requires_grad_()
        sums = fused_margin_sums(own, *others, plain=use_plain)
        weight = torch.linspace(-1, 2, len(state)) if factor is None else factor
        total = torch.where(sums.total.detach().isfinite(), sums.total, 0 * sums.total.detach().nan_to_num())
        (total * weight).sum().backward()
        found.append((sums, own.grad))
    return found


def assert_same(fused, reference):
    (sums, gradient), (wanted, expected) = fused, reference
    assert torch.equal(gradient, expected) and gradient.dtype == expected.dtype
    assert torch.equal(sums.violated, wanted.violated) and sums.violated.dtype == wanted.violated.dtype
    assert torch.equal(sums.elements, wanted.elements) and sums.elements.dtype == wanted.elements.dtype
    torch.testing.assert_close(sums.total, wanted.total, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("share", [0.0, 0.3])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_the_plain_version(dtype, shape, share):
    for seed in range(5):
        assert_same(*both(*case(seed, shape, dtype, share)))


@pytest.mark.parametrize("seed", range(20))
def test_equals_a_float64_oracle(seed):
    rng = np.random.default_rng(seed)
    shape = tuple(rng.integers(1, 7, 3))
    base, state = rng.normal(size=(2, *shape)).astype(np.float32)
    lower, upper = -rng.uniform(0.1, 1, shape[2]), rng.uniform(0.1, 1, shape[2])
    lower, upper = lower.astype(np.float32).astype(float), upper.astype(np.float32).astype(float)
    mask = rng.random(shape[:2]) < 0.7
    low, high = torch.from_numpy(lower).float(), torch.from_numpy(upper).float()
    codes = pack(regions(torch.from_numpy(base), low, high))
    now = torch.from_numpy(state).requires_grad_()
    sums = fused_margin_sums(now, codes, low, high, torch.from_numpy(mask))
    sums.total.sum().backward()
    arguments = (lower, upper, mask)
    mean = oracle_margin(base.astype(float), state.astype(float), *arguments, "elements")
    np.testing.assert_allclose((sums.total.detach() / sums.elements.clamp(min=1)).numpy(), mean, rtol=1e-5, atol=1e-7)
    mean_of_violated = oracle_margin(base.astype(float), state.astype(float), *arguments, "violations")
    mean = (sums.total.detach() / sums.violated.clamp(min=1)).numpy()
    np.testing.assert_allclose(mean, mean_of_violated, rtol=1e-5, atol=1e-7)
    step = 1e-4  # smaller than the distance to any band: the slope is the gradient
    for place in np.ndindex(*shape):
        moved = [np.array(state, dtype=float) for _ in range(2)]
        moved[0][place] -= step
        moved[1][place] += step
        down, up = (oracle_margin(base.astype(float), values, *arguments, "elements") for values in moved)
        slope = ((up - down) * np.maximum(mask.sum(1), 1) * shape[2]).sum() / (2 * step)
        if abs(slope - round(slope)) < 1e-6:
            assert now.grad[place].item() == round(slope)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_size_chunk_and_stride(data):
    shape = data.draw(st.tuples(st.integers(1, 4), st.integers(1, 12), st.integers(1, 40)))
    dtype = data.draw(st.sampled_from(DTYPES[:3]))
    chunk = data.draw(st.integers(1, 200))
    share = data.draw(st.sampled_from((0.0, 0.2)))
    order = data.draw(st.permutations(range(3)))
    layers = data.draw(st.integers(1, 3))
    state, codes, lower, upper, mask, tolerance = case(data.draw(st.integers(0, 99)), shape, dtype, share)
    back = [order.index(axis) for axis in range(3)]
    strided = state.permute(order).contiguous().permute(back)
    layered = torch.stack([codes.flip(0)] * layers + [codes], dim=2)[:, :, -1]
    own = Operands(strided, layered, lower, upper, tolerance, mask)
    done, wanted = chunks.sums(own, True, chunk), plain.sums(own, True)
    assert torch.equal(done.signs, wanted.signs) and torch.equal(done.violated, wanted.violated)
    torch.testing.assert_close(done.total, wanted.total, rtol=1e-5, atol=1e-6)
    grads = torch.linspace(-1, 2, shape[0])
    gradient = chunks.expand(done.signs, grads, shape[2], dtype, chunk)
    assert torch.equal(gradient, plain.expand(wanted.signs, grads, shape[2], dtype))
    assert chunks.sums(own, False, chunk).signs is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 3, 8), (2, 0, 8), (0, 0, 5)])
def test_nothing_gives_nothing(shape, dtype):
    fused, reference = both(*case(0, shape, dtype))
    assert_same(fused, reference)
    assert fused[0].total.requires_grad and fused[1].shape == shape


@pytest.mark.parametrize("dtype", DTYPES)
def test_padding_reaches_neither_value_nor_gradient(dtype):
    state, codes, lower, upper, mask, tolerance = case(0, (3, 6, 9), dtype)
    mask[0], mask[1] = False, torch.arange(6) < 3
    clean = both(state, codes, lower, upper, mask, tolerance)[0]
    for value in SPECIAL:
        dirty = state.masked_fill(~mask[..., None], value)
        sums, gradient = both(dirty, codes, lower, upper, mask.long(), tolerance, factor=torch.ones(3))[0]
        assert torch.equal(sums.total, clean[0].total) and torch.equal(sums.violated, clean[0].violated)
        assert not gradient[~mask].any() and gradient[2].any()
    assert clean[0].total[0] == 0 == clean[0].elements[0]


@pytest.mark.parametrize("factor", [torch.nan, torch.inf])
def test_a_broken_factor_stays_at_the_violations(factor):
    assert_equal = [torch.nan_to_num(grad, 7.0) for _, grad in both(*case(0, (2, 5, 9)), factor=torch.tensor(factor))]
    assert torch.equal(*assert_equal) and (assert_equal[0] == 0).any()


def test_without_grad_there_is_no_graph_and_no_signs():
    state, *others = case(0, (2, 5, 9))
    for own, mode in ((state, torch.enable_grad()), (state.clone().requires_grad_(), torch.no_grad())):
        with mode, Made() as made:
            sums = fused_margin_sums(own, *others)
        assert not sums.total.requires_grad
        assert not [kept for kept in made.tensors if kept.dtype == torch.uint8 and kept.shape == others[0].shape]


class Made(TorchDispatchMode):
    """Keeps every tensor that operations give, views of others left out."""

    def __init__(self):
        super().__init__()
        self.tensors = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {
            leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)
        }
        out = func(*args, **(kwargs or {}))
        new = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        self.tensors += [leaf for leaf in new if leaf.untyped_storage()._cdata not in given]
        return out


@pytest.mark.parametrize("dtype", DTYPES[:3])
def test_no_temporary_of_the_size_of_the_state(dtype, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK", 2048)
    shape = b, t, d = 3, 64, 130
    state, *others = case(0, shape, dtype)
    large, saved = {}, {}
    for use_plain in (False, True):
        own, kept = state.clone().requires_grad_(), []
        with Made() as made, saved_tensors_hooks(lambda x, kept=kept: kept.append(x.nbytes) or x, lambda x: x):
            sums = fused_margin_sums(own, *others, plain=use_plain)
            sums.total.sum().backward()
        floats = [x for x in made.tensors if x.is_floating_point() and x.numel() >= b * t * d]
        large[use_plain], saved[use_plain] = [x.dtype for x in floats], sum(kept)
        if not use_plain:
            others_made = [x.nbytes for x in made.tensors if x.data_ptr() != own.grad.data_ptr()]
            assert max(others_made) < b * t * d, "beside the gradient: signs, chunks, tables"
    assert large[False] == [dtype] and len(large[True]) > 10
    assert saved[False] == b * t * -(-d // 4) and saved[True] > 8 * saved[False]


def test_autocast_changes_nothing():
    state, *others = case(0, (2, 9, 22), torch.bfloat16)
    expected = both(state, *others)[1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(both(state, *others)[0], expected)


@pytest.mark.parametrize("reentrant", [True, False])
def test_inside_a_checkpoint(reentrant):
    state, *others = case(0, (2, 9, 22))
    own = state.clone().requires_grad_()
    total = checkpoint(lambda x: fused_margin_sums(2 * x, *others).total, own, use_reentrant=reentrant)
    total.sum().backward()
    assert torch.equal(own.grad, 2 * both(2 * state, *others, factor=torch.ones(2))[1][1])


def test_a_compiler_takes_the_plain_version():
    state, *others = case(0, (2, 9, 22))
    expected = both(state, *others, factor=torch.ones(2))[1]
    own = state.clone().requires_grad_()
    torch._dynamo.reset()
    sums = torch.compile(fused_margin_sums, backend="eager", fullgraph=True)(own, *others)
    sums.total.sum().backward()
    assert_same((sums, own.grad), expected)


def test_the_gradient_has_a_gradient():
    """Of a penalty on it: the margin is linear, so only the factor of its row is left."""
    results = []
    for use_plain in (False, True):
        state, *others = case(0, (3, 4, 10))
        own, factor = state.requires_grad_(), torch.tensor([1.0, 2.0, -3.0], requires_grad=True)
        total = fused_margin_sums(own, *others, plain=use_plain).total
        (gradient,) = torch.autograd.grad((factor * total).sum(), own, create_graph=True)
        gradient.square().sum().backward()
        results.append(factor.grad)
    torch.testing.assert_close(*results)
    assert results[0].abs().min() > 0


def test_bands_that_learn_get_their_gradient():
    state, codes, lower, upper, mask, _ = case(0, (2, 4, 8))
    fused_margin_sums(state, codes, lower, upper.requires_grad_(), mask).total.sum().backward()
    assert upper.grad.abs().sum() > 0


@pytest.mark.parametrize("wrong", ["codes", "lower", "mask"])
def test_misfits_are_refused(wrong):
    names = ("state", "codes", "lower", "upper", "mask")
    operands = dict(zip(names, case(0, (2, 4, 8)), strict=False))
    operands[wrong] = operands[wrong][..., :-1]
    with pytest.raises(CacheMismatchError, match=f"where: +{wrong}"):
        fused_margin_sums(**operands)


@pytest.mark.parametrize("layers", [1, 3])
def test_the_distance_of_one_and_of_several_layers(layers):
    cases = [case(seed, (3, 6, 10)) for seed in range(layers)]
    mask = cases[0][4]
    bands = {name: torch.stack([own[place] for own in cases]) for name, place in (("lower", 2), ("upper", 3))}
    bands["tolerance"] = torch.stack([own[5] for own in cases])
    codes = torch.stack([own[1] for own in cases], dim=2)
    if layers == 1:
        bands, codes = {name: values[0] for name, values in bands.items()}, codes[:, :, 0]
    found = []
    for use_plain in (False, True):
        states = [own[0].clone().requires_grad_() for own in cases]
        distance = MarginDistance(bands, "violations", 0.0, plain=use_plain)
        values, counts = distance(Seen(states, torch.empty(0), mask), {"codes": codes})
        values.sum().backward()
        found.append((values, counts["violated"], *(state.grad for state in states)))
    for ours, reference in zip(*found, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-7)


def kernels_that(**changes):
    """Stands in for the kernels."""
    return SimpleNamespace(**{"sums": chunks.sums, "expand": chunks.expand, **changes})


def fails(*arguments):
    raise RuntimeError("no such architecture")


def wrong_sign(signs, grad, dim, dtype):
    return -chunks.expand(signs, grad, dim, dtype)


def wrong_total(own, keep):
    done = chunks.sums(own, keep)
    return done._replace(total=1.01 * done.total)


@pytest.mark.parametrize(
    ("kernels", "reason"),
    [
        (kernels_that(sums=fails), "RuntimeError: no such architecture"),
        (kernels_that(expand=fails), "RuntimeError: no such architecture"),
        (kernels_that(expand=wrong_sign), "differs from the plain version for a torch.bfloat16 state"),
        (kernels_that(sums=wrong_total), "differs from the plain version for a torch.bfloat16 state"),
        (None, "ModuleNotFoundError: No module named 'gere.margin.nothing'"),
    ],
)
def test_kernels_that_do_not_work_are_named_once(kernels, reason, monkeypatch, caplog):
    if kernels is not None:
        monkeypatch.setitem(sys.modules, "gere.margin.nothing", kernels)
    checked = CheckedKernels(torch.device("cpu"), "gere.margin.nothing")
    with caplog.at_level(logging.WARNING, "gere"):
        assert not any(checked.work_for(dtype) for dtype in (torch.bfloat16, torch.float32, torch.bfloat16))
    assert len(caplog.records) == 1 and reason in caplog.text and "on cpu" in caplog.text


def test_kernels_that_work_are_used_until_they_fail(monkeypatch, caplog):
    calls = []
    good = kernels_that(sums=lambda *parts: calls.append(1) or chunks.sums(*parts))
    monkeypatch.setitem(sys.modules, "gere.margin.nothing", good)
    checked = CheckedKernels(torch.device("cpu"), "gere.margin.nothing")
    assert checked.work_for(torch.float32) and len(calls) == 2
    assert checked.work_for(torch.float32) and len(calls) == 2 and checked.work_for(torch.bfloat16) and len(calls) == 4
    monkeypatch.setattr("gere.margin.sums._backend", lambda *parts: checked)
    state, *others = case(0, (2, 5, 9))
    expected = both(state, *others)[1]
    assert_same(both(state, *others)[0], expected)
    monkeypatch.setattr(good, "expand", fails)
    with caplog.at_level(logging.WARNING, "gere"):
        for _ in range(2):
            assert_same(both(state, *others)[0], expected)
    assert len(caplog.records) == 1 and "no such architecture" in caplog.text and not checked.work_for(torch.float32)


@pytest.mark.parametrize("dtype", DTYPES[:3])
def test_the_small_case_has_all_that_can_go_wrong(dtype):
    own = small_case((2, 5, 13), dtype, torch.device("cpu"))
    signs = plain.sums(own, True).signs
    assert {int(code) for byte in signs.flatten() for code in ((byte >> shift) & 3 for shift in (0, 2, 4, 6))} == {
        0,
        1,
        3,
    }
    assert set(unpack(own.codes, 13)[own.mask].flatten().tolist()) == {-1, 0, 1} and not own.mask.all()
    assert own.state.isnan().any() and own.state.isinf().any() and plain.sums(own, False).total.isfinite().all()
    wanted = margin_sums(own.state, unpack(own.codes, 13), *own[2:4], own.mask, own.tolerance)
    assert torch.equal(plain.sums(own, False).total, wanted.total)
