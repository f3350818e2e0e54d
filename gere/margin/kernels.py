"""The margin on a GPU: one kernel forms sums and signs from state and regions, one the gradient from the signs.

Imports triton, so it is imported only when it is used. A program handles a tile of tokens by bytes by the four elements
of a byte, which lie side by side in a thread. Sums are formed of each program and added up later, always in the same
order.
"""

# mypy: disable-error-code="import-not-found,import-untyped,untyped-decorator"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gere.margin.operands import Operands, Outcome

TOKENS = 32  # tokens of a tile
BYTES = 32  # bytes of a token, at most


@triton.jit
def sums_kernel(
    state: Any, codes: Any, lower: Any, upper: Any, tolerance: Any, mask: Any,
    totals: Any, counts: Any, signs: Any,
    t: Any, d: Any, width: Any, state_row: Any, state_token: Any, state_dim: Any,
    codes_row: Any, codes_token: Any, codes_byte: Any,
    keep: tl.constexpr, tokens: tl.constexpr, bytes_: tl.constexpr,
) -> None:  # fmt: skip
    """Sum of margins and number of violations of a tile, and the signs of its elements."""
    row = tl.program_id(2).to(tl.int64)
    token = tl.program_id(0) * tokens + tl.arange(0, tokens)
    byte = tl.program_id(1) * bytes_ + tl.arange(0, bytes_)
    place = tl.arange(0, 4)
    column = byte[:, None] * 4 + place[None, :]
    inside = column < d
    low = tl.load(lower + column, mask=inside, other=0.0)[None, :, :]
    high = tl.load(upper + column, mask=inside, other=0.0)[None, :, :]
    allowed = tl.load(tolerance + column, mask=inside, other=0.0)[None, :, :]
    real = tl.load(mask + row * t + token, mask=token < t, other=0) != 0
    wide = token.to(tl.int64)
    packed = tl.load(
        codes + row * codes_row + wide[:, None] * codes_token + byte[None, :] * codes_byte,
        mask=real[:, None] & (byte < width)[None, :],
        other=0,
    ).to(tl.int32)
    # What is not there reads as NaN, which no comparison takes for a violation.
    x = tl.load(
        state + row * state_row + wide[:, None, None] * state_token + column[None, :, :] * state_dim,
        mask=real[:, None, None] & inside[None, :, :],
        other=float("nan"),
    ).to(tl.float32)
    below = (packed[:, :, None] & (3 << (2 * place))[None, None, :]) == 0
    above = (packed[:, :, None] & (2 << (2 * place))[None, None, :]) != 0
    floor = tl.where(below, float("-inf"), tl.where(above, high, low))
    ceiling = tl.where(above, float("inf"), tl.where(below, low, high))
    excess = x - tl.minimum(tl.maximum(x, floor), ceiling)
    size = tl.abs(excess)
    violates = size > allowed
    at = (row * tl.num_programs(0) + tl.program_id(0)) * tl.num_programs(1) + tl.program_id(1)
    tl.store(totals + at, tl.sum(tl.sum(tl.sum(tl.where(violates, size, 0.0), axis=2), axis=1), axis=0))
    tl.store(counts + at, tl.sum(tl.sum(tl.sum(violates.to(tl.int32), axis=2), axis=1), axis=0))
    if keep:
        code = tl.where(violates, tl.where(excess < 0, 3, 1), 0)
        sign = tl.sum(code << (2 * place)[None, None, :], axis=2)
        tl.store(
            signs + (row * t + wide[:, None]) * width + byte[None, :],
            sign.to(tl.uint8),
            mask=(token < t)[:, None] & (byte < width)[None, :],
        )


@triton.jit
def expand_kernel(
    signs: Any, grads: Any, gradient: Any, t: Any, d: Any, width: Any,
    tokens: tl.constexpr, bytes_: tl.constexpr,
) -> None:  # fmt: skip
    """Gradient of a tile from its signs."""
    row = tl.program_id(2).to(tl.int64)
    token = tl.program_id(0) * tokens + tl.arange(0, tokens)
    byte = tl.program_id(1) * bytes_ + tl.arange(0, bytes_)
    place = tl.arange(0, 4)
    column = byte[:, None] * 4 + place[None, :]
    grad = tl.load(grads + row).to(tl.float32)
    line = row * t + token.to(tl.int64)
    there = (token < t)[:, None] & (byte < width)[None, :]
    packed = tl.load(signs + line[:, None] * width + byte[None, :], mask=there, other=0).to(tl.int32)
    code = (packed[:, :, None] >> (2 * place)[None, None, :]) & 3
    value = tl.where(code == 1, grad, tl.where(code == 3, -grad, 0.0))
    tl.store(
        gradient + line[:, None, None] * d + column[None, :, :],
        value.to(gradient.dtype.element_ty),
        mask=(token < t)[:, None, None] & (column < d)[None, :, :],
    )


def sums(own: Operands, keep: bool) -> Outcome:
    """Sums of each row, and the packed signs if `keep`."""
    state, codes = own.state, own.codes
    b, t, d = state.shape
    width = codes.shape[-1]
    grid, tile = _grid(b, t, width)
    totals = state.new_empty(b, grid[0] * grid[1], dtype=torch.float32)
    counts = state.new_empty(totals.shape, dtype=torch.int32)
    signs = state.new_empty((b, t, width) if keep else (0,), dtype=torch.uint8)
    bands = (band.contiguous() for band in (own.lower, own.upper, own.tolerance))
    mask = own.mask.contiguous().view(torch.uint8)
    with torch.cuda.device_of(state):
        sums_kernel[grid](
            state, codes, *bands, mask, totals, counts, signs,
            t, d, width, *state.stride(), *codes.stride(), keep, TOKENS, tile,
        )  # fmt: skip
    return Outcome(totals.sum(dim=1), counts.sum(dim=1), signs if keep else None)


def expand(signs: Tensor, grad_total: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """Gradient of the state, [b, t, d] in `dtype`, from packed signs and the gradient of each row's total, [b]."""
    b, t, width = signs.shape
    grid, tile = _grid(b, t, width)
    gradient = signs.new_empty(b, t, dim, dtype=dtype)
    with torch.cuda.device_of(signs):
        expand_kernel[grid](signs, grad_total.float().contiguous(), gradient, t, dim, width, TOKENS, tile)
    return gradient


def _grid(b: int, t: int, width: int) -> tuple[tuple[int, int, int], int]:
    """Programs by tokens, bytes and rows, and the bytes of each."""
    tile = min(BYTES, triton.next_power_of_2(width))
    return (triton.cdiv(t, TOKENS), triton.cdiv(width, tile), b), tile


