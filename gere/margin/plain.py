"""What the fused versions do, from the plain loss and its gradient: to check them, and to take their place."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from gere.cache.codec import PER_BYTE, unpack
from gere.losses import margin_sums
from gere.margin.operands import Operands, Outcome, sign_table


def sums(own: Operands, keep: bool) -> Outcome:
    """Sums of each row, and the packed signs if `keep`; a checkpoint around it does not see its tensors."""
    quiet = torch.autograd.graph.saved_tensors_hooks(lambda kept: kept, lambda kept: kept)
    with torch.inference_mode(False), torch.set_grad_enabled(keep), quiet:
        state = own.state.detach().clone().requires_grad_(keep)
        region = unpack(own.codes, state.shape[-1])
        found = margin_sums(state, region, own.lower, own.upper, own.mask, own.tolerance)
        gradient = torch.autograd.grad(found.total.sum(), state)[0] if keep else None
    return Outcome(found.total.detach(), found.violated, None if gradient is None else _packed(gradient))


def expand(signs: Tensor, grad_total: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """Gradient of the state, [b, t, d], by operations that have a gradient of their own."""
    sign = sign_table(signs.device)[signs.long()].flatten(-2)[..., :dim]
    grad = grad_total[:, None, None]
    return torch.where(sign > 0, grad, torch.where(sign < 0, -grad, 0.0)).to(dtype)


def _packed(gradient: Tensor) -> Tensor:
    code = gradient.to(torch.int8) & 3
    code = F.pad(code, (0, -code.shape[-1] % PER_BYTE)).unflatten(-1, (-1, PER_BYTE)).int()
    shifts = torch.arange(0, 2 * PER_BYTE, 2, device=code.device)
    return (code << shifts).sum(dim=-1).to(torch.uint8)
