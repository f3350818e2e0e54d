"""Each tuned tensor with its base tensor, and the point between the two."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gere.blend.files import Stored
from gere.errors import BlendError


class Pair(NamedTuple):
    """A tuned tensor, and what it goes back to.

    Attributes:
        name: Its name in the tuned files.
        base: Name of its base tensor; empty if there is none.
        moves: Whether it moves with the share: A of LoRA does not, and B without a base tensor goes to zeros.
    """

    name: str
    base: str
    moves: bool


class Line(NamedTuple):
    """The straight line from base to tuned weights.

    Attributes:
        tuned: The tuned weights, share 1.
        base: The base weights, share 0; `None` if no tensor needs them.
        pairs: A pair for each tuned tensor.
    """

    tuned: Stored
    base: Stored | None
    pairs: tuple[Pair, ...]

    @property
    def grown(self) -> dict[str, int]:
        """For each tuned tensor with more rows than its base tensor the number of its rows."""
        base = self.base.shapes if self.base is not None else {}
        shapes = {pair.name: (self.tuned.shapes[pair.name], base.get(pair.base)) for pair in self.pairs if pair.base}
        return {name: own[0] for name, (own, other) in shapes.items() if own != other}

    @property
    def notes(self) -> list[str]:
        """What the user should know, one sentence each."""
        return [
            f"{name}, now of {rows} rows: those that the base lacks stay as tuned."
            for name, rows in self.grown.items()
        ]

    def at(self, pair: Pair, share: float) -> Tensor:
        """Form a tensor at a share of the line, in the dtype of the tuned tensor.

        Raises:
            BlendError: If it is not finite, or is of whole numbers that differ.
        """
        tuned = self.tuned.read(pair.name)
        if not pair.moves:
            return tuned
        base = None
        if pair.base and self.base is not None:
            base = self.base.read(pair.base)
        if not tuned.is_floating_point() or (base is not None and not base.is_floating_point()):
            return _whole_numbers(tuned, base, pair.name)
        point = between(tuned, base, share)
        if not point.isfinite().all():
            raise BlendError(
                "A tensor is not finite.",
                where=f"{pair.name}, share {share:g}, {self.tuned.places[pair.name].name}",
                expected="finite numbers",
                found=f"{int((~point.isfinite()).sum())} of {point.numel()} that are not",
                fix="Take another checkpoint: this training has diverged, or the base weights overflow its dtype.",
            )
        return point


def between(tuned: Tensor, base: Tensor | None, share: float) -> Tensor:
    """Compute base + share (tuned - base) in float32 (float64 for float64), in the dtype of `tuned`.

    Args:
        tuned: The tensor at share 1, which is returned bit for bit.
        base: The tensor at share 0, with as many rows or fewer; rows that it lacks stay as tuned. `None` for zeros.
        share: From 0 to 1.

    Example:
        >>> between(torch.tensor([3.0, 5.0]), torch.tensor([1.0]), 0.5)
        tensor([2., 5.])
    """
    if share == 1:
        return tuned
    wide = torch.promote_types(tuned.dtype, torch.float32)
    start = torch.zeros_like(tuned, dtype=wide) if base is None else base.to(wide)
    point = tuned.clone()
    rows = point[: len(start)] if point.ndim else point
    if share == 0:  # the sum below would lose the sign of -0.0
        rows.copy_(start)
    else:
        # In place: embeddings are large.
        rows.copy_((rows.to(wide) - start).mul_(share).add_(start))
    return point


def _whole_numbers(tuned: Tensor, base: Tensor | None, name: str) -> Tensor:
    if base is not None and tuned.dtype == base.dtype and torch.equal(tuned, base):
        return tuned
    raise BlendError(
        "A tensor of whole numbers differs, and has no point in between.",
        where=name,
        expected="the same in TUNED and in the base, as buffers are",
        found=f"{tuned.dtype}, in the base {None if base is None else base.dtype}",
        fix="Give weights of both that are not quantized.",
    )
