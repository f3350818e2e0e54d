"""How a task and the earlier ones come together: pure functions of tensors.

Recurrent-KIF (arXiv 2502.17510, 3.3) fuses after every Q inner and M outer steps, entry by entry:

    theta_(b+1) = theta_b + w_in tau_in + w_out tau_out

TaSL (arXiv 2408.09857) consolidates once after a task, unit by unit: a matrix, or a rank of a LoRA pair.

    theta = p theta_present + (1 - p) theta_previous
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gere.kif.importance import Tensors

PRESENT, PREVIOUS = 0.3, 0.7


class FusionWeights(NamedTuple):
    """Shares of the two updates; an entry that matters to one side alone takes the update of that side whole.

    Attributes:
        both_inner: Share of tau_in where both masks are 1.
        both_outer: Share of tau_out where both masks are 1.
        neither: Share of both updates where no mask is 1; 0 prunes them.
    """

    both_inner: float
    both_outer: float
    neither: float


def fusion_weights(inner: Tensor, outer: Tensor, weights: FusionWeights) -> tuple[Tensor, Tensor]:
    """Shares of the two updates for each entry.

    Args:
        inner: Mask of the current task, bool.
        outer: Mask of the earlier tasks, bool, of the same shape.
        weights: What is done where both or neither is set.

    Returns:
        w_in and w_out, float32.
    """
    both, neither = inner & outer, ~(inner | outer)
    w_in = inner.float().masked_fill(both, weights.both_inner).masked_fill(neither, weights.neither)
    w_out = outer.float().masked_fill(both, weights.both_outer).masked_fill(neither, weights.neither)
    return w_in, w_out


def fuse(start: Tensor, middle: Tensor, end: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
    """Fuse one tensor: start + w_in (middle - start) + w_out (end - middle).

    Args:
        start: theta_b, before the inner steps.
        middle: After the inner steps: tau_in is middle - start.
        end: After the outer steps: tau_out is end - middle.
        w_in: Share of tau_in, float32.
        w_out: Share of tau_out, float32.

    Returns:
        theta_(b+1), float32. Shares of 1 without outer steps give `middle`, and shares of 0 `start`, bit for bit.
    """
    middle = middle.float()
    return torch.lerp(start.float(), middle, w_in) + w_out * (end.float() - middle)


# Consolidation of TaSL. A unit's score is the mean of E U over it.


def matrix_scores(scores: Tensors) -> Tensor:
    """Score of each matrix, float64 [u], in the order of the names."""
    return torch.stack([score.double().mean() for score in scores.values()])


def rank_scores(a: Tensor, b: Tensor) -> Tensor:
    """Score of each rank of a LoRA pair, float64 [r]: the mean over row r of A times the mean over column r of B."""
    return a.double().mean(1) * b.double().mean(0)


def min_max(scores: Tensor) -> Tensor:
    """Move scores to 0..1; NaN where all are equal, which says that none stands out."""
    least = scores.min()
    return (scores - least) / (scores.max() - least)


def share_of_present(present: Tensor, previous: Tensor, share: float) -> Tensor:
    """Share p of the present weights in each unit, float64 [u].

    0.3 where the unit is among the top share of the task and of the history, 1 or 0 where it is among one of them,
    0.5 where it is among none. Of scores that are NaN none is.
    """
    now, before = (values > values.quantile(1 - share) for values in (present, previous))
    p = torch.full_like(present, 0.5)
    p[now & ~before], p[before & ~now], p[now & before] = 1.0, 0.0, PRESENT
    return p


def soft_share_of_present(present: Tensor, previous: Tensor, temperature: float) -> Tensor:
    """Share p of the present weights in each unit by a softmax of the two scores, float64 [u]; 0.5 for NaN."""
    return torch.sigmoid((present - previous) / temperature).nan_to_num(0.5)


def next_history(present: Tensor, previous: Tensor) -> Tensor:
    """Scores of all tasks so far, float64 [u], 0..1. A task whose scores are all equal leaves them as they were."""
    if present.isnan().any():
        return previous
    if previous.isnan().any():
        return present
    return min_max(PRESENT * present + PREVIOUS * previous)


def consolidate(present: Tensor, previous: Tensor, p: Tensor) -> Tensor:
    """Mix p present + (1 - p) previous, float32; p is a number, or broadcasts over the tensor."""
    return torch.lerp(previous.float(), present.float(), p.float())


def lora_pairs(names: Sequence[str]) -> Mapping[str, str]:
    """Names of the B matrices by those of their A matrices."""
    known = {*names}
    pairs = {name: name.replace("lora_A", "lora_B") for name in names if "lora_A" in name}
    return {a: b for a, b in pairs.items() if b in known}
