"""The margin on a GPU: one kernel forms sums and signs from state and regions, one the gradient from the signs.

Imports triton, so it is imported only when it is used. Sums are formed of each program and added up later, always in
the same order.
"""

# triton compiles what an annotation of a kernel names, so its kernels have none.
# ruff: noqa: ANN001, ANN201
# mypy: disable-error-code="import-not-found,import-untyped,untyped-decorator,no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gere.margin.operands import Operands, Outcome

TILE = 2048  # bytes of codes that a program handles, four elements each
WIDTHS = (128, 64, 32)  # of them, those of one token


@triton.jit
def sums_kernel(
    state, codes, lower, upper, tolerance, mask,
    totals, counts, signs,
    t, d, width, state_row, state_token, state_dim,
    codes_row, codes_token, codes_byte,
    keep: tl.constexpr, tokens: tl.constexpr, size: tl.constexpr,
):  # fmt: skip
    """Sum of margins and number of violations of a tile, and the signs of its elements."""
    row = tl.program_id(2).to(tl.int64)
    token = tl.program_id(0) * tokens + tl.arange(0, tokens)
    byte = tl.program_id(1) * size + tl.arange(0, size)
    there = (token < t)[:, None] & (byte < width)[None, :]
    real = tl.load(mask + row * t + token, mask=token < t, other=0) != 0
    line = token.to(tl.int64)[:, None]
    packed = tl.load(
        codes + row * codes_row + line * codes_token + byte[None, :] * codes_byte,
        mask=there & real[:, None],
        other=0,
    ).to(tl.int32)
    total = tl.zeros((tokens, size), tl.float32)
    sign = tl.zeros((tokens, size), tl.int32)
    for place in tl.static_range(4):  # the four elements of a byte lie in one thread, and one line of the cache
        column = byte * 4 + place
        inside = column < d
        low = tl.load(lower + column, mask=inside, other=0.0)[None, :]
        high = tl.load(upper + column, mask=inside, other=0.0)[None, :]
        allowed = tl.load(tolerance + column, mask=inside, other=0.0)[None, :]
        # What is not there reads as NaN, which no comparison takes for a violation.
        x = tl.load(
            state + row * state_row + line * state_token + column[None, :] * state_dim,
            mask=real[:, None] & inside[None, :],
            other=float("nan"),
        ).to(tl.float32)
        below = (packed & (3 << (2 * place))) == 0
        above = (packed & (2 << (2 * place))) != 0
        floor = tl.where(below, float("-inf"), tl.where(above, high, low))
        ceiling = tl.where(above, float("inf"), tl.where(below, low, high))
        excess = x - tl.minimum(tl.maximum(x, floor), ceiling)
        margin = tl.abs(excess)
        violates = margin > allowed
        total += tl.where(violates, margin, 0.0)
        sign |= tl.where(violates, tl.where(excess < 0, 3 << (2 * place), 1 << (2 * place)), 0)
    ones = sign & 0x55  # the lower bit of each code says that there is a violation
    ones = (ones & 0x33) + ((ones >> 2) & 0x33)
    ones = (ones & 0xF) + (ones >> 4)
    at = (row * tl.num_programs(0) + tl.program_id(0)) * tl.num_programs(1) + tl.program_id(1)
    tl.store(totals + at, tl.sum(tl.sum(total, axis=1), axis=0))
    tl.store(counts + at, tl.sum(tl.sum(ones, axis=1), axis=0))
    if keep:
        tl.store(signs + (row * t + line) * width + byte[None, :], sign.to(tl.uint8), mask=there)


@triton.jit
def expand_kernel(
    signs, grads, gradient, t, d, width,
    tokens: tl.constexpr, size: tl.constexpr,
):  # fmt: skip
    """Gradient of a tile from its signs."""
    row = tl.program_id(2).to(tl.int64)
    token = tl.program_id(0) * tokens + tl.arange(0, tokens)
    column = tl.program_id(1) * size * 4 + tl.arange(0, size * 4)
    there = (token < t)[:, None] & (column < d)[None, :]
    line = (row * t + token)[:, None]
    grad = tl.load(grads + row)
    packed = tl.load(signs + line * width + (column // 4)[None, :], mask=there, other=0).to(tl.int32)
    code = packed >> (2 * (column % 4))[None, :]
    value = tl.where((code & 1) == 0, 0.0, tl.where((code & 2) == 0, grad, -grad))
    tl.store(gradient + line * d + column[None, :], value.to(gradient.dtype.element_ty), mask=there)


def sums(own: Operands, keep: bool) -> Outcome:
    """Sums of each row, and the packed signs if `keep`."""
    state, codes = own.state, own.codes
    b, t, d = state.shape
    grid, tokens, size = _grid(codes)
    totals = state.new_empty(b, grid[0] * grid[1], dtype=torch.float32)
    counts = state.new_empty(totals.shape, dtype=torch.int32)
    signs = state.new_empty(codes.shape if keep else (0,), dtype=torch.uint8)
    bands = (band.contiguous() for band in (own.lower, own.upper, own.tolerance))
    mask = own.mask.contiguous().view(torch.uint8)
    with torch.cuda.device_of(state):
        sums_kernel[grid](
            state, codes, *bands, mask, totals, counts, signs,
            t, d, codes.shape[-1], *state.stride(), *codes.stride(), keep, tokens, size,
        )  # fmt: skip
    return Outcome(totals.sum(dim=1), counts.sum(dim=1), signs if keep else None)


def expand(signs: Tensor, grad_total: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """Gradient of the state, [b, t, d] in `dtype`, from packed signs and the gradient of each row's total, [b]."""
    b, t, width = signs.shape
    grid, tokens, size = _grid(signs)
    gradient = signs.new_empty(b, t, dim, dtype=dtype)
    with torch.cuda.device_of(signs):
        expand_kernel[grid](signs, grad_total.float().contiguous(), gradient, t, dim, width, tokens, size)
    return gradient


def _grid(codes: Tensor) -> tuple[tuple[int, int, int], int, int]:
    """Programs by tokens, bytes and rows; the tokens, and the bytes of each, of a program: few of them to no end."""
    b, t, width = codes.shape
    widest = triton.next_power_of_2(width)
    size = min((min(size, widest) for size in WIDTHS), key=lambda size: triton.cdiv(width, size) * size)
    tokens = min(TILE // size, triton.next_power_of_2(t))
    return (triton.cdiv(t, tokens), triton.cdiv(width, size), b), tokens, size
