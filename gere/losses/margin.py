"""Threshold-based margin (TM): an element stays in the region that it had in the base model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from gere.config import LAST, parse_layers
from gere.losses.bands import QUANTILE_TOKENS, BandRule, Bands, MeanStd, Quantiles
from gere.losses.chunks import CHUNK_TOKENS, sum_in_chunks, wide
from gere.losses.codes import PER_BYTE, pack, regions, unpack
from gere.losses.strategy import Seen, Strategy, Tensors

# Rounding in 16 bits moves single elements over their bands by more than the measured tolerance. A row with so few
# violations has not drifted: training violates hundreds of times as many.
NOISE_SHARE_16_BITS = 1e-4

Normalization = Literal["violations", "elements"]


class MarginSums(NamedTuple):
    """What the margin of a batch is made of, each of shape [b]."""

    total: Tensor
    violated: Tensor
    elements: Tensor


def threshold_margin(
    state: Tensor,
    region: Tensor,
    lower: Tensor,
    upper: Tensor,
    mask: Tensor,
    normalization: Normalization = "violations",
    tolerance: Tensor | float = 0.0,
) -> Tensor:
    """Threshold-based margin loss (TM): keep each element in the region that it had in the base model.

    References:
        GeRe, arXiv 2508.04676, section on threshold-based margin; gere_trainer.py of the official code.

    Inputs:
        | argument | shape | meaning |
        |---|---|---|
        | `state` | [b, t, d], float | last-layer state of the current model |
        | `region` | [b, t, d], int8 | region in the base model: -1 below `lower`, 0 between, 1 above `upper` |
        | `lower`, `upper` | [d], float | bands, in the unit of the state |
        | `mask` | [b, t], bool or int | 1 for real tokens, 0 for padding |
        | `tolerance` | [d] or number | an element outside its region by no more than this counts as inside |

    Args:
        state: Current state.
        region: Base region.
        lower: Lower band.
        upper: Upper band.
        mask: Real tokens.
        normalization: `"violations"` divides by the violated elements of the row, `"elements"` by all of them.
        tolerance: Rounding noise to be ignored. 0 is the published loss.

    Returns:
        Loss of each row, shape [b], in float32 (float64 for a float64 state).

    Relations:
        L1 and L2 pull an element to its exact base value; TM is 0 in the whole region and linear outside it. With
        `"violations"` the value grows with the size of the drift, with `"elements"` with size times frequency.

    Example:
        >>> lower, upper = torch.tensor([-1.0]), torch.tensor([1.0])
        >>> state, region = torch.tensor([[[1.5]]]), torch.zeros(1, 1, 1, dtype=torch.int8)
        >>> threshold_margin(state, region, lower, upper, torch.ones(1, 1))
        tensor([0.5000])
    """
    return normalize_margin(margin_sums(state, region, lower, upper, mask, tolerance), normalization)


def margin_sums(
    state: Tensor,
    region: Tensor,
    lower: Tensor,
    upper: Tensor,
    mask: Tensor,
    tolerance: Tensor | float = 0.0,
    chunk_tokens: int = CHUNK_TOKENS,
) -> MarginSums:
    """Sum of margins, violated elements and all real elements of each row.

    Args:
        state: Current state, [b, t, d].
        region: Base region, int8 [b, t, d], or packed by `gere.losses.pack`, uint8 [b, t, ceil(d / 4)].
        lower: Lower band, [d].
        upper: Upper band, [d].
        mask: Real tokens, [b, t].
        tolerance: Rounding noise to be ignored, [d] or a number.
        chunk_tokens: Tokens whose states are held in float32 at one time.

    Returns:
        Three tensors of shape [b]; the total carries the graph.
    """

    def row_sums(state: Tensor, region: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        current = wide(state)
        low, high = lower.to(current), upper.to(current)
        base = region
        if region.dtype == torch.uint8:
            base = unpack(region, state.shape[-1])
        ceiling = torch.where(base < 0, low, torch.where(base > 0, torch.inf, high))
        ground = torch.where(base > 0, high, torch.where(base < 0, -torch.inf, low))
        margin = F.relu(current - ceiling) + F.relu(ground - current)
        violates = real.unsqueeze(-1) & ~(margin <= tolerance)  # NaN is no margin, and must not count as none
        return torch.where(violates, margin, 0.0).sum(dim=(1, 2)), violates.sum(dim=(1, 2))

    total, violated = sum_in_chunks(row_sums, (state, region, mask.bool()), chunk_tokens)
    return MarginSums(total, violated, mask.bool().sum(dim=1) * state.shape[-1])


def normalize_margin(sums: MarginSums, normalization: Normalization) -> Tensor:
    """Divide the margin sums by the count that `normalization` names; an empty count gives 0."""
    count = sums.elements
    if normalization == "violations":
        count = sums.violated
    return sums.total / count.clamp(min=1)


class Margin(Strategy):
    """Strategy `"tm"`: each element of a state stays in the region that it had in the base model.

    Args:
        layers: Layers that are held, as `GeReConfig.layers`.
        bands: Rule of the bands of the last layer.
        band_width: k of mu - k sigma and mu + k sigma.
        std_floor: Smallest sigma, as a share of the root mean square of all sigma.
        lower_quantile: Share of the negative region of quantile bands.
        upper_quantile: 1 - share of the positive region of quantile bands.
        normalization: What the margin of a row is divided by.
        **about: Arguments of `Strategy`.

    Raises:
        ConfigError: If the model does not have these layers.
    """

    measures = True
    kind = "regions"
    constants_file = "bands.safetensors"
    shard_bytes = 1 / PER_BYTE
    wants_parts = True

    def __init__(
        self,
        *,
        layers: str | Sequence[int] = LAST,
        bands: str = "mean_std",
        band_width: float = 1.0,
        std_floor: float = 1e-3,
        lower_quantile: float = 0.16,
        upper_quantile: float = 0.84,
        normalization: Normalization = "violations",
        **about: Any,
    ) -> None:
        depth = about["depth"]
        held = parse_layers(layers, depth)
        self.field = "regions of the last layer"
        if held != (depth,):
            self.field = f"regions of layers {', '.join(map(str, held))} of {depth}"
        super().__init__(**about)
        self.layers = held
        self.name = f"tm over {normalization}"
        self.order = 1 if normalization == "violations" else 2
        self._normalization = normalization
        # States of inner layers are not normalised and have outliers, which a standard deviation would follow.
        quantiles = Quantiles(lower_quantile, upper_quantile)
        self._rules: list[BandRule] = [quantiles] * len(held)
        if held[-1] == depth and bands == "mean_std":
            self._rules[-1] = MeanStd(band_width, std_floor)
        self.fields = {"bands": "; last layer: ".join(dict.fromkeys(map(str, self._rules)))}

    def keep(self, states: Sequence[Tensor], logits: Tensor | None) -> Tensors:
        """The states; of several layers they are stacked, [..., t, l, d]."""
        return {"state": _stacked(states)}

    def change(self, alone: Tensors, padded: Tensors) -> Tensor:
        """Difference of each element."""
        return (padded["state"].float() - alone["state"].float()).abs()

    def summary(self, kept: Tensors, tokens: int, first: int) -> list[Any]:
        """What the rule of each layer needs."""
        share = QUANTILE_TOKENS / (tokens * len(self.layers))
        layers = zip(self._rules, self._by_layer(kept["state"]), strict=True)
        return [rule.summary(state, share, first) for rule, state in layers]

    def constants(self, summaries: Sequence[list[Any]], noise: Tensor) -> Tensors:
        """Bands, [d]; of several layers [l, d]."""
        parts = zip(self._rules, zip(*summaries, strict=True), self._by_layer(noise), strict=True)
        made = [rule.bands(own, change) for rule, own, change in parts]
        columns = zip(Bands._fields, zip(*made, strict=True), strict=True)
        return {name: _stacked(column) for name, column in columns}

    def encode(self, kept: Tensors, constants: Tensors) -> Tensors:
        """Regions in 2 bits an element."""
        return {"codes": pack(regions(kept["state"], constants["lower"], constants["upper"]))}

    def distance(self, seen: Seen, targets: Tensors, constants: Tensors) -> tuple[Tensor, Tensor, Tensor]:
        """Mean margin over the layers; violated and all elements are summed over them."""
        if self.live:
            base = regions(targets["state"], constants["lower"], constants["upper"])
        else:
            base = targets["codes"]
        least = 0.0
        if self.half:
            least = NOISE_SHARE_16_BITS
        margins, violated, elements = [], [], []
        for place, state in enumerate(seen.states):
            own = Bands(**{name: self._by_layer(values)[place] for name, values in constants.items()})
            sums = margin_sums(state, self._by_layer(base)[place], own.lower, own.upper, seen.mask, own.tolerance)
            drifted = sums.violated > least * sums.elements
            margins.append(normalize_margin(sums, self._normalization) * drifted)  # a product, which keeps a NaN
            violated.append(sums.violated)
            elements.append(sums.elements)
        return torch.stack(margins).mean(dim=0), torch.stack(violated).sum(dim=0), torch.stack(elements).sum(dim=0)

    def _by_layer(self, stacked: Tensor) -> Sequence[Tensor]:
        if len(self.layers) == 1:
            return (stacked,)
        return stacked.unbind(-2)


def _stacked(layers: Sequence[Tensor]) -> Tensor:
    """One layer as it is; several along a new dimension before the last, in float32 if their types differ."""
    if len(layers) == 1:
        return layers[0]
    # Under autocast the last state can be wider than those of inner layers.
    if len({layer.dtype for layer in layers}) > 1:
        layers = [layer.float() for layer in layers]
    return torch.stack(list(layers), dim=-2)
