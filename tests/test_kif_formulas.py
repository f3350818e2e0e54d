"""Importance and fusion: what the official code of Recurrent-KIF and TaSL returns, and properties.

Set GERE_DATA to the folder that holds golden/kif_rows.safetensors for the recorded values.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from gere.kif.fusion import (
    FusionWeights,
    consolidate,
    fuse,
    fusion_weights,
    lora_pairs,
    matrix_scores,
    min_max,
    next_history,
    rank_scores,
    share_of_present,
    soft_share_of_present,
)
from gere.kif.importance import RULES, no_importance, observe, scores, sensitivity, top_share

GOLDEN = Path(os.environ.get("GERE_DATA", "")) / "golden" / "kif_rows.safetensors"
recorded = pytest.mark.skipif(not GOLDEN.is_file(), reason="GERE_DATA is not set to the recorded values")
CODE = FusionWeights(0.4, 0.6, 0.5)
RULE_NAMES = {number: name for name, number in RULES.items()}


class Case:
    """One recorded case; `case[key]` is a value, `case.all(key)` those of every tensor by name."""

    def __init__(self, number: int) -> None:
        with safe_open(GOLDEN, "pt") as stored:
            meta, prefix = stored.metadata(), f"{number:02d}."
            self.kind, self.order = meta[f"{prefix}kind"], meta[f"{prefix}order"].split(",")
            start = f"{prefix}{self.kind}."
            keys = [key for key in stored.keys() if key.startswith(start)]  # noqa: SIM118 (it is no mapping)
            self._values = {key.removeprefix(start): stored.get_tensor(key) for key in keys}

    def __getitem__(self, key: str) -> torch.Tensor:
        return self._values[key]

    def all(self, key: str, at: int | None = None) -> dict[str, torch.Tensor]:
        values = {name: self._values[f"{key}.{name}"] for name in self.order if f"{key}.{name}" in self._values}
        return values if at is None else {name: value[at] for name, value in values.items()}


def close(ours, theirs, rtol=1e-5, atol=0.0):
    assert ours.keys() == theirs.keys()
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=rtol, atol=atol, check_dtype=False)


def same_masks(ours, theirs):
    assert all(torch.equal(ours[name], theirs[name].bool()) for name in theirs)


def official_step(importance, weights, gradients, betas, rule="first order"):
    """One official call: a NaN ends it, so that only the tensors before it are updated."""
    now = {}
    for name, weight in weights.items():
        if gradients[name].isnan().any():
            break
        now[name] = sensitivity(weight, gradients[name], rule)
    if now:
        part = type(importance)(*({n: t for n, t in state.items() if n in now} for state in importance))
        observe(part, now, *betas)


@recorded
@pytest.mark.parametrize("number", range(6))
@pytest.mark.parametrize("side", ["in", "out"])
def test_recorded_importance(number, side):
    case = Case(number)
    weights, gradients = case.all(f"p_{side}"), case.all(f"g_{side}")
    betas, share = case["beta"].tolist(), 1 - case["quantile"].item()
    importance = no_importance({name: value[0] for name, value in weights.items()}, uncertain=True)
    for step in range(len(weights[case.order[0]])):
        official_step(importance, case.all(f"p_{side}", step), case.all(f"g_{side}", step), betas)
        close(importance.sensitivity, case.all(f"E_{side}", step))
        close(importance.uncertainty, case.all(f"U_{side}", step))
    values = scores(importance)
    close(values, case.all(f"score_{side}"))
    same_masks(top_share(values, share), case.all(f"mask_{side}"))
    for name, mask in case.all(f"mask_local_{side}").items():
        same_masks(top_share({name: values[name]}, share), {name: mask})
    assert gradients.keys() == weights.keys()


@recorded
@pytest.mark.parametrize("number", [6, 7, 8])
def test_recorded_fusion(number):
    case = Case(number)
    share = 1 - case["quantile"].item()
    inner, outer = (top_share(case.all(f"score_{side}"), share) for side in ("in", "out"))
    same_masks(inner, case.all("m_in"))
    same_masks(outer, case.all("m_out"))
    for name in case.order:
        w_in, w_out = fusion_weights(inner[name], outer[name], CODE)
        close({"in": w_in, "out": w_out}, {"in": case[f"w_in.{name}"], "out": case[f"w_out.{name}"]})
        start = case[f"theta_b.{name}"].double()
        middle = start + case[f"tau_in.{name}"]
        fused = fuse(start, middle, middle + case[f"tau_out.{name}"], w_in, w_out)
        torch.testing.assert_close(fused, case[f"theta_fused.{name}"], rtol=1e-5, atol=3e-7)


@recorded
@pytest.mark.parametrize("number", [9, 10])
def test_recorded_loop(number):
    """Importance, masks and fusions in the order of the official training loop."""
    case = Case(number)
    betas, share = case["beta"].tolist(), 1 - case["quantile"].item()
    shapes = case.all("theta_b", 0)
    state = {side: no_importance(shapes, uncertain=True) for side in ("in", "out")}
    steps, fusions = {"in": 0, "out": 0}, 0
    for event in case["events"].tolist():
        if event < 2:
            side = ("in", "out")[event]
            at = steps[side]
            official_step(state[side], case.all(f"p_{side}", at), case.all(f"g_{side}", at), betas)
            steps[side] += 1
            continue
        masks = {}
        for side, importance in state.items():
            close(importance.sensitivity, case.all(f"E_{side}", fusions))
            close(importance.uncertainty, case.all(f"U_{side}", fusions))
            masks[side] = top_share(scores(importance), share)
            same_masks(masks[side], case.all(f"m_{side}", fusions))
        for name in case.order:
            start = case[f"theta_b.{name}"][fusions]
            middle = start + case[f"tau_in.{name}"][fusions]
            end = middle + case[f"tau_out.{name}"][fusions]
            fused = fuse(start, middle, end, *fusion_weights(masks["in"][name], masks["out"][name], CODE))
            torch.testing.assert_close(fused, case[f"fused.{name}"][fusions], rtol=1e-5, atol=3e-7)
        state["in"] = no_importance(shapes, uncertain=True)
        fusions += 1
    assert fusions > 1


@recorded
@pytest.mark.parametrize("number", [11, 12, 13, 14])
def test_recorded_consolidation(number):
    case = Case(number)
    by_rank = case.kind == "taslora"
    rule = RULE_NAMES[case["taylor"].item()] if by_rank else "first order"
    pairs = lora_pairs(case.order)
    for task in range(3):
        weights = case.all(f"p.{task}")
        importance = no_importance(case.all(f"p.{task}", 0), uncertain=True)
        for step in range(1, len(weights[case.order[0]])):
            given = case.all(f"p.{task}", step), case.all(f"g.{task}", step)
            official_step(importance, *given, case["beta"].tolist(), rule)
        close(importance.sensitivity, case.all(f"E.{task}"))
        close(importance.uncertainty, case.all(f"U.{task}"))
        values = scores(importance)
        if by_rank:
            units = torch.cat([rank_scores(values[a], values[b]) for a, b in pairs.items()])
        else:
            units = matrix_scores(values)
        torch.testing.assert_close(units, case[f"score.{task}"], rtol=3e-5, atol=0)
        if not task:
            continue
        present, previous = case[f"norm_present.{task}"], case[f"norm_previous.{task}"]
        torch.testing.assert_close(min_max(units), present, rtol=3e-5, atol=3e-5, equal_nan=True)
        if not (present.isnan().any() or previous.isnan().any()):
            after = next_history(present, previous)
            torch.testing.assert_close(after, case[f"history_after.{task}"], rtol=1e-5, atol=1e-9)
        if by_rank:
            rank = weights[case.order[0]].shape[1]
            shares = iter(soft_share_of_present(present, previous, case["tau"].item()).split(rank))
            p = {}
            for a, b in pairs.items():
                ranks = next(shares)
                p |= {a: ranks[:, None], b: ranks[None]}
        else:
            p = dict(zip(case.order, share_of_present(present, previous, 0.2), strict=True))
        mixed = {
            name: consolidate(case[f"w_present.{task}.{name}"], case[f"w_previous.{task}.{name}"], p[name])
            for name in case.order
        }
        close(mixed, case.all(f"w_out.{task}"), atol=1e-7)


# Properties

SHAPES = st.lists(st.tuples(st.integers(1, 7), st.integers(1, 7)), min_size=1, max_size=5)
SHARES = st.floats(0.01, 0.99)


def distinct(shapes, seed=0):
    """Tensors whose entries are all positive and different."""
    sizes = [rows * columns for rows, columns in shapes]
    values = np.random.default_rng(seed).permutation(sum(sizes)) + 1.0
    parts = np.split(values, np.cumsum(sizes)[:-1])
    pairs = zip(parts, shapes, strict=True)
    return {f"t{at}": torch.tensor(part).float().reshape(shape) for at, (part, shape) in enumerate(pairs)}


@settings(max_examples=40)
@given(SHAPES, SHARES)
def test_the_mask_has_exactly_the_top_share(shapes, share):
    values = distinct(shapes)
    every = torch.cat([value.flatten() for value in values.values()])
    marked = torch.cat([mask.flatten() for mask in top_share(values, share).values()])
    assert marked.sum() == math.ceil(share * (len(every) - 1) - 1e-9)
    assert abs(marked.sum().item() - share * len(every)) < 1 + share
    if marked.any():
        assert every[marked].min() > every[~marked].max()


@given(SHAPES, SHARES, st.integers(1, 3))
def test_ties_do_not_select_everything(shapes, share, levels):
    values = {name: (value % levels) for name, value in distinct(shapes).items()}
    every = torch.cat([value.flatten() for value in values.values()])
    marked = torch.cat([mask.flatten() for mask in top_share(values, share).values()])
    assert marked.sum() <= math.ceil(share * len(every))
    assert not marked[every == 0].any()
    quantile = np.quantile(every.numpy().astype(np.float64), 1 - share)
    assert np.array_equal(marked.numpy(), every.numpy() > quantile + 1e-9)


@given(SHAPES, SHARES, st.randoms())
def test_the_order_of_tensors_does_not_matter(shapes, share, random):
    values = distinct(shapes)
    names = list(values)
    random.shuffle(names)
    mixed = {name: values[name] for name in names}
    same_masks(top_share(mixed, share), top_share(values, share))
    one, two = (no_importance(given, uncertain=True) for given in (values, mixed))
    for importance, given_values in ((one, values), (two, mixed)):
        for step in (1.0, 3.0):
            observe(importance, {name: step * value for name, value in given_values.items()}, 0.55)
    assert all(torch.equal(one.uncertainty[name], two.uncertainty[name]) for name in names)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_changes_nothing(bad):
    values = distinct([(2, 3), (4, 2)])
    importance = no_importance(values, uncertain=True)
    observe(importance, values, 0.55)
    before = [{name: tensor.clone() for name, tensor in state.items()} for state in importance]
    broken = {**values, "t1": values["t1"].clone()}
    broken["t1"][1, 1] = bad
    observe(importance, broken, 0.55)
    for kept, state in zip(before, importance, strict=True):
        assert all(torch.equal(kept[name], state[name]) for name in kept)
    observe(importance, values, 0.55)
    assert not torch.equal(before[0]["t0"], importance.sensitivity["t0"])


@given(st.integers(0, 2**31 - 1))
def test_the_paper_prunes_and_keeps_bit_for_bit(seed):
    random = torch.Generator().manual_seed(seed)
    start, middle, end = torch.randn(3, 40, generator=random)
    inner, outer = torch.rand(2, 40, generator=random) < 0.5
    fused = fuse(start, middle, end, *fusion_weights(inner, outer, FusionWeights(1, 1, 0)))
    neither, alone = ~(inner | outer), inner & ~outer
    assert torch.equal(fused[neither], start[neither]) and torch.equal(fused[alone], middle[alone])
    wanted = start.double() + inner * (middle.double() - start) + outer * (end.double() - middle)
    torch.testing.assert_close(fused.double(), wanted, rtol=1e-6, atol=1e-6)
    ones = fusion_weights(inner, torch.zeros_like(outer), FusionWeights(1, 1, 1))
    assert torch.equal(fuse(start, middle, middle, *ones), middle)


def test_equal_scores_say_nothing_and_leave_the_history():
    equal, other = min_max(torch.ones(4, dtype=torch.float64)), min_max(torch.tensor([1.0, 2, 3, 9]).double())
    assert share_of_present(equal, other, 0.2).tolist() == [0.5, 0.5, 0.5, 0.0]
    assert soft_share_of_present(equal, other, 0.25).tolist() == [0.5] * 4
    assert torch.equal(next_history(equal, other), other) and torch.equal(next_history(other, equal), other)
    assert share_of_present(other, other, 0.2).tolist() == [0.5, 0.5, 0.5, 0.3]


@pytest.mark.slow
def test_more_entries_than_a_quantile_of_torch_takes():
    large = torch.rand(2**24 + 6, generator=torch.Generator().manual_seed(0))
    marked = top_share({"large": large}, 0.2)["large"].sum().item()
    assert marked == pytest.approx(0.2 * len(large), rel=1e-3)
