"""What the fused margin reads and gives, and the two bits of a sign."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gere.cache.codec import PER_BYTE, unpack
from gere.errors import CacheMismatchError


class Operands(NamedTuple):
    """What the margin of a layer is made of.

    Attributes:
        state: Current state, [b, t, d], of 16 or 32 bits.
        codes: Packed regions of the base model, [b, t, ceil(d / 4)].
        lower: Lower band, [d], float32.
        upper: Upper band, likewise.
        tolerance: What an element may leave its region by, likewise.
        mask: Real tokens, [b, t], bool.
    """

    state: Tensor
    codes: Tensor
    lower: Tensor
    upper: Tensor
    tolerance: Tensor
    mask: Tensor


class Outcome(NamedTuple):
    """What one pass over the state gives.

    Attributes:
        total: Sum of the margins of each row, [b], float32.
        violated: Violated elements of each row, [b], int64.
        signs: Gradient of the total by the state, two bits an element, [b, t, ceil(d / 4)]; `None` if not asked for.
    """

    total: Tensor
    violated: Tensor
    signs: Tensor | None


def refuse_misfits(state: Tensor, codes: Tensor, lower: Tensor, upper: Tensor, mask: Tensor) -> None:
    """Refuse operands that do not belong together: kernels would read beyond their end.

    Raises:
        CacheMismatchError: If a shape or type is not the one that the state asks for.
    """
    b, t, d = state.shape
    wanted = {"codes": (b, t, -(-d // PER_BYTE)), "lower": (d,), "upper": (d,), "mask": (b, t)}
    found = {"codes": codes, "lower": lower, "upper": upper, "mask": mask}
    wrong = [name for name, shape in wanted.items() if tuple(found[name].shape) != shape]
    if wrong or codes.dtype != torch.uint8:
        raise CacheMismatchError(
            "The stored regions do not fit the states of the model.",
            where=", ".join(wrong) or "codes",
            expected=f"{wanted} for a state of shape {(b, t, d)}, and codes of 8 bits",
            found=f"{ {name: tuple(values.shape) for name, values in found.items()} }, and codes of {codes.dtype}",
            fix="Train the model that the anchor was made from, or build the anchor anew.",
        )


def code_table(device: torch.device) -> Tensor:
    """The four codes of each byte, [256, 4] in int8, from 0 to 3."""
    return unpack(torch.arange(256, dtype=torch.uint8, device=device).unsqueeze(1)) + 1


def sign_table(device: torch.device) -> Tensor:
    """The four signs of each byte, [256, 4] in int8: 0 for code 0, 1 for code 1, -1 for code 3."""
    code = code_table(device)
    return (code & 1) * (1 - (code & 2))
