"""The margin on a CPU: few vectorised operations over chunks of tokens that stay in the cache.

Comparisons into bool, `torch.where` and `masked_fill_` cost torch's CPU code ten times what an addition does, so the
regions are turned into limits by additions, minima and maxima of infinities.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor

from gere.cache.codec import PER_BYTE
from gere.margin.operands import Operands, Outcome, code_table, sign_table

# Elements of a chunk for each thread: three float32 buffers of it fit into the second-level cache of a core, and the
# calls into torch are few (python -m benchmarks.tm_loss --chunks).
CHUNK = 1 << 17
# Four bytes of a code each, times this, hold the packed codes in their highest byte; no other term reaches it.
GATHER = (1 << 24) + (1 << 18) + (1 << 12) + (1 << 6)


def sums(own: Operands, keep: bool, chunk: int | None = None) -> Outcome:
    """Sums of each row, and the packed signs if `keep`; `chunk` elements are held in float32 at one time."""
    scratch = _Scratch(own, chunk)
    margin, count = torch.empty(own.mask.shape), torch.empty(own.mask.shape)
    signs = torch.empty(own.codes.shape, dtype=torch.uint8) if keep else None
    for rows, tokens in scratch.parts():
        excess, outside = scratch.excess(own, rows, tokens)
        torch.sum(outside, -1, out=count[rows, tokens])
        if signs is not None:
            signs[rows, tokens] = scratch.packed(excess, outside, own.mask[rows, tokens])
        torch.sum(excess.abs_(), -1, out=margin[rows, tokens])
    total = torch.where(own.mask, margin, 0.0).sum(dim=1)
    return Outcome(total, torch.where(own.mask, count, 0.0).long().sum(dim=1), signs)


def expand(signs: Tensor, grad_total: Tensor, dim: int, dtype: torch.dtype, chunk: int | None = None) -> Tensor:
    """Gradient of the state, [b, t, d] in `dtype`, from packed signs and the gradient of each row's total, [b]."""
    b, t, width = signs.shape
    sign, grad = sign_table(signs.device), grad_total.float()[:, None, None]
    tables = torch.where(sign > 0, grad, torch.where(sign < 0, -grad, 0.0)).to(dtype)
    gradient = torch.empty(b, t, dim, dtype=dtype)
    step = max(1, _chunk(chunk) // (PER_BYTE * width))
    index = torch.empty(min(step, t) * width, dtype=torch.int32)
    buffer = torch.empty(0 if dim == PER_BYTE * width else len(index) * PER_BYTE, dtype=dtype)
    for row, first in product(range(b), range(0, t, step)):
        part = signs[row, first : first + step].flatten()
        target = gradient[row, first : first + step]
        whole = buffer[: len(part) * PER_BYTE] if len(buffer) else target.view(-1)
        _lookup(tables[row], index[: len(part)].copy_(part), whole)
        if len(buffer):
            target.copy_(whole.view(len(target), -1)[:, :dim])
    return gradient


class _Scratch:
    """Buffers of one chunk, used again for each."""

    def __init__(self, own: Operands, chunk: int | None) -> None:
        self._shape = own.state.shape
        b, t, d = self._shape
        room = max(1, _chunk(chunk) // d)
        self._rows, self._tokens = max(1, min(b, room // t)), min(t, room)
        self._width = own.codes.shape[-1]
        most = self._rows * self._tokens
        infinities = torch.tensor([-torch.inf, 0.0, torch.inf, torch.inf])
        self._table = infinities[code_table(infinities.device).long()]
        self._index = torch.empty(most * self._width, dtype=torch.int32)
        self._floor = torch.empty(most * self._width * PER_BYTE)
        self._ceiling = torch.empty(most * d)
        self._wide = torch.empty(0 if own.state.dtype == torch.float32 else most * d)
        self._bytes = torch.zeros(most * self._width * PER_BYTE, dtype=torch.int8)

    def parts(self) -> Iterator[tuple[slice, slice]]:
        """Rows and tokens of each chunk."""
        b, t, _ = self._shape
        for row, token in product(range(0, b, self._rows), range(0, t, self._tokens)):
            yield slice(row, row + self._rows), slice(token, token + self._tokens)

    def excess(self, own: Operands, rows: slice, tokens: slice) -> tuple[Tensor, Tensor]:
        """How far each element of a chunk is above (or, negative, below) its region, 0 up to the tolerance.

        The second tensor is 1 where it is not 0.
        """
        state, codes = own.state[rows, tokens], own.codes[rows, tokens]
        shape, count = state.shape, codes.numel()
        index = self._index[:count]
        index.view(codes.shape).copy_(codes)
        floor = self._floor[: count * PER_BYTE]
        _lookup(self._table, index, floor)
        floor = floor.view(*shape[:2], -1)[..., : shape[-1]]
        ceiling = self._ceiling[: state.numel()].view(shape)
        torch.add(floor, own.upper, out=ceiling)
        torch.maximum(ceiling, own.lower, out=ceiling)
        floor.add_(own.lower)
        torch.minimum(floor, own.upper, out=floor)
        wide = self._wide[: state.numel()].view(shape).copy_(state) if len(self._wide) else state
        torch.clamp(wide, floor, ceiling, out=ceiling)
        excess = torch.sub(wide, ceiling, out=ceiling)
        excess.nan_to_num_(nan=0.0, posinf=torch.inf, neginf=-torch.inf)  # as in the plain version: no violation
        size = torch.abs(excess, out=floor)
        outside = torch.gt(size, own.tolerance, out=floor)
        # An infinite excess is outside, whatever the tolerance: no 0 meets an infinity here.
        return excess.mul_(outside), outside

    def packed(self, excess: Tensor, sign: Tensor, mask: Tensor) -> Tensor:
        """Two bits for the sign of each element, 0 for padding; overwrites `sign`."""
        torch.sign(excess, out=sign)
        lines = excess.shape[:2]
        whole = self._bytes[: mask.numel() * self._width * PER_BYTE]
        whole.view(*lines, -1)[..., : excess.shape[-1]].copy_(sign)
        four = whole.bitwise_and_(3).view(torch.int32)  # what is beyond the last element stays 0
        four = torch.mul(four, GATHER, out=self._index[: len(four)]).bitwise_right_shift_(24)
        return four.view(*lines, -1).mul_(mask.unsqueeze(-1).int())


def _lookup(table: Tensor, index: Tensor, out: Tensor) -> None:
    """Four numbers for each byte, moved as one number of their size."""
    whole = torch.int64 if table.element_size() == 2 else torch.complex128
    torch.index_select(table.view(whole).view(-1), 0, index, out=out.view(whole))


def _chunk(chunk: int | None) -> int:
    return chunk or CHUNK * torch.get_num_threads()
