"""Regions of states, and four of them in a byte."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from gere.losses.chunks import wide

PER_BYTE = 4


def regions(state: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """Say on which side of the bands each element lies.

    Args:
        state: States, shape [..., d]; compared in float32 (float64 stays).
        lower: Lower band, shape [d].
        upper: Upper band, shape [d].

    Returns:
        int8 of shape [..., d]: -1 where `state <= lower`, 1 where `state >= upper`, else 0.
    """
    values = wide(state)
    above = values >= upper.to(values)
    below = values <= lower.to(values)
    # Where both bands are equal, a value on them is below and above. The negative region takes it.
    return above.to(torch.int8) * (~below).to(torch.int8) - below.to(torch.int8)


def pack(region: Tensor) -> Tensor:
    """Pack regions into 2 bits each.

    Element 4j + i lies in bits 2i and 2i + 1 of byte j, as region + 1. Missing elements of the last byte are 0.

    Args:
        region: int8 of shape [..., d] with values in {-1, 0, 1}.

    Returns:
        uint8 of shape [..., ceil(d / 4)].

    Raises:
        ValueError: If a value is not -1, 0 or 1.
    """
    # Another value could spill into the bits of its neighbours, and `unpack` would not see it.
    if region.numel() and bool((region.abs() > 1).any()):
        raise ValueError(f"regions are -1, 0 or 1, found {region.min().item()} to {region.max().item()}")
    codes = (region + 1).to(torch.uint8)
    codes = F.pad(codes, (0, -codes.shape[-1] % PER_BYTE)).unflatten(-1, (-1, PER_BYTE))
    packed = codes[..., 0].clone()
    for place in range(1, PER_BYTE):
        packed |= codes[..., place] << (2 * place)
    return packed


def unpack(packed: Tensor, dim: int | None = None) -> Tensor:
    """Undo `pack`.

    Args:
        packed: uint8 of shape [..., n].
        dim: Number of elements d of the packed regions; `None` for 4 n.

    Returns:
        int8 of shape [..., d].
    """
    shifts = torch.arange(0, 2 * PER_BYTE, 2, dtype=torch.uint8, device=packed.device)
    codes = (packed.unsqueeze(-1) >> shifts) & 3
    return codes.flatten(-2)[..., :dim].to(torch.int8) - 1
