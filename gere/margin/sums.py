"""The sums of a margin with their gradient, from stored regions, without temporaries of the size of the state."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from gere.cache.codec import unpack
from gere.losses import MarginSums, margin_sums
from gere.margin import chunks
from gere.margin import plain as by_plain
from gere.margin.operands import Operands, Outcome, refuse_misfits
from gere.margin.trust import kernels_on

FUSED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def fused_margin_sums(
    state: Tensor,
    codes: Tensor,
    lower: Tensor,
    upper: Tensor,
    mask: Tensor,
    tolerance: Tensor | float = 0.0,
    *,
    plain: bool = False,
) -> MarginSums:
    """Sums of `gere.losses.margin_sums`, from packed regions, in one pass over the state.

    The gradient of a margin by an element is -1, 0 or 1 times that of its row. Two bits an element are all that is
    kept for the backward pass; the state is not.

    Where there is no fused version, the plain one is used: float64, a gradient of the bands, tensors that are no plain
    ones, code that is being compiled (the compiler fuses it), devices other than CPU and CUDA, and a GPU on which the
    kernels do not work, which is logged.

    References:
        The margin of GeRe, arXiv 2508.04676, as `gere.losses.threshold_margin` documents it.

    Inputs:
        | argument | shape | meaning |
        |---|---|---|
        | `state` | [b, t, d], float | state of the current model |
        | `codes` | [b, t, ceil(d / 4)], uint8 | regions in the base model, as `gere.cache.pack` packs them |
        | `lower`, `upper` | [d], float | bands, finite, `lower <= upper` |
        | `mask` | [b, t], bool or int | 1 for real tokens, 0 for padding |
        | `tolerance` | [d] or number, >= 0 | an element outside its region by no more than this counts as inside |

    Args:
        state: Current state.
        codes: Packed base regions.
        lower: Lower band.
        upper: Upper band.
        mask: Real tokens.
        tolerance: Rounding noise to be ignored.
        plain: Use the plain version.

    Returns:
        Total with its gradient, violated and all elements, each [b].

    Raises:
        CacheMismatchError: If the shapes do not belong together.

    Relations:
        Counts and gradients equal those of `margin_sums` bit for bit, the total up to the order of its sum.

    Example:
        >>> state, codes = torch.tensor([[[1.5]]]), torch.tensor([[[1]]], dtype=torch.uint8)
        >>> fused_margin_sums(state, codes, torch.tensor([-1.0]), torch.tensor([1.0]), torch.ones(1, 1)).total
        tensor([0.5000])
    """
    refuse_misfits(state, codes, lower, upper, mask)
    backend = None if plain else _backend(state, (lower, upper, tolerance))
    if backend is None:
        return margin_sums(state, unpack(codes, state.shape[-1]), lower, upper, mask, tolerance)
    own = _operands(state, codes, lower, upper, mask, tolerance)
    elements = own.mask.sum(dim=1) * state.shape[-1]
    if torch.is_grad_enabled() and state.requires_grad:
        total, violated = _Margin.apply(state, own._replace(state=state.detach()), backend)
    else:
        with torch.no_grad():
            total, violated, _ = backend.sums(own, False)
    return MarginSums(total, violated, elements)


def _backend(state: Tensor, constants: tuple[Tensor | float, ...]) -> Any:
    """What computes the fused version; `None` for the plain one."""
    if torch.compiler.is_compiling() or state.dtype not in FUSED_DTYPES or not state.numel():
        return None
    if type(state) not in (Tensor, torch.nn.Parameter) or sys.byteorder != "little":
        return None
    if any(isinstance(values, Tensor) and values.requires_grad for values in constants):
        return None
    if state.device.type == "cpu":
        return chunks
    return kernels_on(state.device, state.dtype) if state.device.type == "cuda" else None


def _operands(
    state: Tensor, codes: Tensor, lower: Tensor, upper: Tensor, mask: Tensor, tolerance: Tensor | float
) -> Operands:
    limit = torch.finfo(torch.float32).max
    low, high = (band.float().clamp(-limit, limit) for band in (lower, upper))
    allowed = torch.as_tensor(tolerance, dtype=torch.float32, device=state.device).clamp(max=limit).expand_as(low)
    return Operands(state, codes, low, high, allowed, mask.bool())


class _Margin(torch.autograd.Function):
    """Total and violated elements; keeps the signs of the gradient."""

    @staticmethod
    def forward(ctx: Any, state: Tensor, own: Operands, backend: Any) -> tuple[Tensor, Tensor]:
        done: Outcome = backend.sums(own, True)
        ctx.save_for_backward(done.signs)
        ctx.backend, ctx.dim, ctx.dtype = backend, state.shape[-1], state.dtype
        ctx.mark_non_differentiable(done.violated)
        return done.total, done.violated

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (signs,) = ctx.saved_tensors
        # With grad mode on, the gradient is itself to be differentiated.
        backend = by_plain if torch.is_grad_enabled() else ctx.backend
        return backend.expand(signs, grads[0], ctx.dim, ctx.dtype), None, None
