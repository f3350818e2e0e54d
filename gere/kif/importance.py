"""How much each trained weight matters: pure functions of tensors, in the order of the paper (arXiv 2502.17510, 3.1).

    I(w) = |w dL/dw|                                  sensitivity
    E   <- alpha E + (1 - alpha) I                    smoothed sensitivity
    U   <- beta U + (1 - beta) |I - E|                smoothed uncertainty, with the new E
    score = E, or E U
    m    = 1 where the score is among the greatest share of all entries, else 0

`Tensors` are the trained tensors by name. Their order never matters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Tensors = Mapping[str, Tensor]
Rule = Literal["first order", "second order", "mixed"]
RULES: Mapping[Rule, int] = {"first order": 1, "second order": 2, "mixed": 3}


class Importance(NamedTuple):
    """Smoothed importance of the trained tensors, float32.

    Attributes:
        sensitivity: E by name.
        uncertainty: U by name; empty where only E is kept.
    """

    sensitivity: dict[str, Tensor]
    uncertainty: dict[str, Tensor]


def sensitivity(weight: Tensor, gradient: Tensor, rule: Rule = "first order") -> Tensor:
    """Change of the loss if a weight were zero, by its Taylor expansion.

    Args:
        weight: A trained tensor, of any shape.
        gradient: Gradient of the loss, of the same shape.
        rule: `"first order"` is |w g|, `"second order"` (w g)^2, `"mixed"` |w g - (w g)^2 / 2|.

    Returns:
        Importance of each entry, float32, at least 0.
    """
    product = weight.detach().float() * gradient.detach().float()
    if rule == "second order":
        return product.square()
    if rule == "mixed":
        return (product - 0.5 * product.square()).abs()
    return product.abs()


def no_importance(weights: Tensors, *, uncertain: bool) -> Importance:
    """Importance before the first step: zeros, without a later correction; U only if `uncertain`."""
    zeros = {name: torch.zeros_like(weight, dtype=torch.float32) for name, weight in weights.items()}
    return Importance(zeros, {name: zero.clone() for name, zero in zeros.items()} if uncertain else {})


def observe(importance: Importance, now: Tensors, alpha: float, beta: float | None = None) -> None:
    """Smooth the importance by that of one more step, in place.

    A step with a NaN or an infinity in any tensor is left out for all of them: else the mask would compare entries
    that have seen different steps. The scaler of float16 leaves the weights of such a step alone, too.

    Args:
        importance: E and U, which are changed.
        now: Importance of the step, of the same names and shapes.
        alpha: Smoothing of E, from 0 (the last step alone) up to 1.
        beta: Smoothing of U; `None` for `alpha`.
    """
    beta = alpha if beta is None else beta
    # On the device: reading it here would make every step wait for the GPU. A sum of finite values of 1e30 can be
    # infinite, so the entries are asked one by one.
    sound = torch.stack([value.isfinite().all() for value in now.values()]).all()
    for name, smoothed in importance.sensitivity.items():
        value = now[name]
        moved = alpha * smoothed + (1 - alpha) * value
        smoothed.copy_(torch.where(sound, moved, smoothed))
        if name in importance.uncertainty:
            uncertainty = importance.uncertainty[name]
            moved = beta * uncertainty + (1 - beta) * (value - smoothed).abs()
            uncertainty.copy_(torch.where(sound, moved, uncertainty))


def scores(importance: Importance) -> dict[str, Tensor]:
    """Score of each entry: E U, or E where U is not kept."""
    if not importance.uncertainty:
        return dict(importance.sensitivity)
    return {name: smoothed * importance.uncertainty[name] for name, smoothed in importance.sensitivity.items()}


def top_share(values: Tensors, share: float) -> dict[str, Tensor]:
    """Mark the greatest entries over all tensors together.

    An entry is marked if it is above the (1 - share) quantile of all n entries. These are ceil(share (n - 1)) entries
    if no two are equal. Of equal entries at the quantile none is marked, so that ties, such as many zeros, do not mark
    everything.

    Args:
        values: Scores at least 0, by name; any shapes and any order of names.
        share: Share to mark, above 0 and below 1.

    Returns:
        Masks, bool, of the same names and shapes.
    """
    every = torch.cat([value.flatten() for value in values.values()])
    # An interpolated quantile lies between two neighbours, so the lower one separates the same entries. It is exact,
    # and `torch.quantile` takes no more than 2^24 entries. 0.2 of 16 entries must not become 3.0000000000000004.
    marked = math.ceil(share * (len(every) - 1) - 1e-9)
    threshold = every.kthvalue(len(every) - marked).values
    return {name: value > threshold for name, value in values.items()}
