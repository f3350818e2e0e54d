"""Bands of states: around the mean by mergeable moments, or between two quantiles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

CHUNK_ROWS = 4096
QUANTILE_TOKENS = 16384  # over all layers; enough to fix the share of a region to 0.3 points in one pass


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
        """Compute the moments of `values`, shape [n, d]."""
        total = cls.empty(values.shape[-1])
        # A float64 copy of all states at once would take four times their memory in bfloat16.
        for chunk in values.split(CHUNK_ROWS):
            wide = chunk.double()
            mean = wide.mean(dim=0)
            total = total.merge(cls(len(wide), mean, (wide - mean).square().sum(dim=0)))
        return total

    @classmethod
    def empty(cls, dim: int) -> Moments:
        """Return the moments of no values."""
        return cls(0, torch.zeros(dim, dtype=torch.float64), torch.zeros(dim, dtype=torch.float64))

    def merge(self, other: Moments) -> Moments:
        """Compute the moments of both sets together."""
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
        lower: Values at or below it lie in the negative region.
        upper: Values at or above it lie in the positive region.
        tolerance: Rounding noise of the state. A smaller violation is not counted.
    """

    lower: Tensor
    upper: Tensor
    tolerance: Tensor


class BandRule(Protocol):
    """How bands follow from the states of the replay set. The key of an anchor depends on its string."""

    def summary(self, state: Tensor, share: float, first: int) -> Any:
        """Summarise states, [n, d], of which the first is token `first` of the set; a `share` of them may do."""
        ...

    def bands(self, summaries: Sequence[Any], noise: Tensor) -> Bands:
        """Compute bands from all summaries in order, and the largest change of each dimension by rounding, [d]."""
        ...


class MeanStd(NamedTuple):
    """Bands of `width` deviations around the mean, the published rule.

    Shares of the negative, neutral and positive region for a normal distribution:

    | width | negative | neutral | positive |
    |---|---|---|---|
    | 0.5 | 30.9 % | 38.3 % | 30.9 % |
    | 1 | 15.9 % | 68.3 % | 15.9 % |
    | 1.5 | 6.7 % | 86.6 % | 6.7 % |
    | 2 | 2.3 % | 95.4 % | 2.3 % |

    Args:
        width: k of mu - k sigma and mu + k sigma.
        std_floor: Smallest sigma as a share of the root mean square sigma. Rounding alone would violate the band of a
            dimension that hardly moves.
    """

    width: float
    std_floor: float

    def __str__(self) -> str:
        return f"mean +- {self.width:g} std, floor {self.std_floor:g}"

    def summary(self, state: Tensor, share: float, first: int) -> Moments:
        """Compute the moments of all states."""
        return Moments.of(state)

    def bands(self, summaries: Sequence[Moments], noise: Tensor) -> Bands:
        """Compute the bands of the merged moments."""
        moments = Moments.empty(len(noise))
        for own in summaries:
            moments = moments.merge(own)
        return mean_std_bands(moments, self.width, self.std_floor, noise)


class Quantiles(NamedTuple):
    """Bands at two quantiles of each dimension, so that the regions have known shares, outliers or not.

    They are exact for up to 16,384 tokens over all layers. Larger sets are sampled down to that number.

    Args:
        lower: Share of the negative region.
        upper: 1 - share of the positive region.
    """

    lower: float
    upper: float

    def __str__(self) -> str:
        return f"quantiles {self.lower:g} and {self.upper:g}"

    def summary(self, state: Tensor, share: float, first: int) -> Tensor:
        """Return the states of a `share` of the tokens."""
        number = torch.arange(first + 1, first + len(state) + 1)
        # A hash of each token's number: every n-th token would prefer some places in rows of equal length. Parts and
        # processes choose the same tokens without asking each other.
        return state[(number * 2654435761) % 2**32 < share * 2**32]

    def bands(self, summaries: Sequence[Tensor], noise: Tensor) -> Bands:
        """Compute the bands of the chosen states together."""
        ordered = torch.cat(list(summaries)).float().sort(dim=0).values
        # A value on a band lies in the outer region: a band is the innermost value of its region, which is never
        # empty.
        below, above = round(self.lower * len(ordered)), round((1 - self.upper) * len(ordered))
        lower = ordered[max(below, 1) - 1].double()
        upper = ordered[len(ordered) - max(above, 1)].double()
        return _with_tolerance(lower, upper, noise)


def mean_std_bands(moments: Moments, width: float, std_floor: float, noise: Tensor) -> Bands:
    """Compute bands of `width` deviations around the mean.

    Args:
        moments: Moments of all states of the replay set.
        width: k of mu - k sigma and mu + k sigma.
        std_floor: Smallest sigma as a share of the root mean square sigma.
        noise: Largest change of each dimension's state between two evaluations of the same row, shape [d].
    """
    std = moments.std
    std = std.clamp(min=std_floor * std.square().mean().sqrt().item())
    return _with_tolerance(moments.mean - width * std, moments.mean + width * std, noise)


def _with_tolerance(lower: Tensor, upper: Tensor, noise: Tensor) -> Bands:
    # Noise is measured on a few rows, so twice its largest value is tolerated. Where it is 0, float32 still rounds.
    rounding = torch.finfo(torch.float32).eps * torch.maximum(lower.abs(), upper.abs())
    tolerance = torch.maximum(2.0 * noise.double(), 8.0 * rounding)
    return Bands(lower.float(), upper.float(), tolerance.float())
