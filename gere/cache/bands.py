"""Mean and deviation of states by mergeable moments, and the bands that follow from them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

CHUNK_ROWS = 4096


class Moments(NamedTuple):
    """Number, mean and sum of squared deviations of each dimension, in float64.

    References:
        Chan, Golub, LeVeque 1979: merging keeps the accuracy that E[x^2] - E[x]^2 loses.
    """

    number: int
    mean: Tensor
    m2: Tensor

    @classmethod
    def of(cls, values: Tensor) -> Moments:
        """Moments of `values`, shape [n, d]."""
        total = cls.empty(values.shape[-1])
        for chunk in values.split(CHUNK_ROWS):
            wide = chunk.double()
            mean = wide.mean(dim=0)
            total = total.merge(cls(len(wide), mean, (wide - mean).square().sum(dim=0)))
        return total

    @classmethod
    def empty(cls, dim: int) -> Moments:
        """Moments of nothing."""
        return cls(0, torch.zeros(dim, dtype=torch.float64), torch.zeros(dim, dtype=torch.float64))

    def merge(self, other: Moments) -> Moments:
        """Moments of both sets together."""
        number = self.number + other.number
        if not number:
            return self
        step = other.mean - self.mean
        mean = self.mean + step * (other.number / number)
        m2 = self.m2 + other.m2 + step.square() * (self.number * other.number / number)
        return Moments(number, mean, m2)

    @property
    def std(self) -> Tensor:
        """Population standard deviation, shape [d]."""
        return (self.m2 / max(1, self.number)).sqrt()


class Bands(NamedTuple):
    """Bands of each dimension, float32, shape [d].

    Attributes:
        lower: mu - k sigma.
        upper: mu + k sigma.
        tolerance: Rounding noise of the state, up to which a violation is not counted.
    """

    lower: Tensor
    upper: Tensor
    tolerance: Tensor


def mean_std_bands(moments: Moments, width: float, std_floor: float, noise: Tensor) -> Bands:
    """Bands of `width` deviations around the mean.

    Args:
        moments: Moments of all states of the replay set.
        width: k.
        std_floor: Smallest sigma as a share of the root mean square sigma; a dimension that hardly moves would
            otherwise be violated by rounding alone.
        noise: Largest change of each dimension's state between two evaluations of the same row, shape [d].

    Returns:
        The bands.
    """
    std = moments.std
    std = std.clamp(min=std_floor * std.square().mean().sqrt().item())
    lower, upper = moments.mean - width * std, moments.mean + width * std
    rounding = torch.finfo(torch.float32).eps * torch.maximum(lower.abs(), upper.abs())
    tolerance = torch.maximum(2.0 * noise.double(), 8.0 * rounding)
    return Bands(lower.float(), upper.float(), tolerance.float())
