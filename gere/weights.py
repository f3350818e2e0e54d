"""Weight of the distance of each replay row: fixed, dynamic, or found by itself."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor


def row_weight(w_strategy: float | Literal["dy"], ce: Tensor, distance: Tensor) -> Tensor:
    """Weight of the distance of each row; carries no gradient and needs no device sync.

    Args:
        w_strategy: A fixed number, or `"dy"` for CE / (distance + 1e-8).
        ce: Cross-entropy of each row, shape [b].
        distance: Distance of each row, shape [b].

    Returns:
        Weights, shape [b].
    """
    if w_strategy == "dy":
        return ce.detach() / (distance.detach() + 1e-8)
    return torch.full_like(distance.detach(), w_strategy)
