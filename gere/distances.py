"""How far a replay row is from the base model, for each strategy: stored targets in, one value per row out."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from gere.cache import Anchor, Bands, regions
from gere.config import GeReConfig
from gere.losses import (
    MarginSums,
    Normalization,
    TopLogits,
    l1_distance,
    l2_distance,
    margin_sums,
    normalize_margin,
    top_k_kl,
)
from gere.margin import fused_margin_sums

# Rounding in 16 bits moves single elements over their bands by more than the tolerance that was measured. A row with
# so few violations has not drifted: training violates hundreds of times as many.
NOISE_SHARE_16_BITS = 1e-4
# Largest difference of a number to the nearest one in bfloat16, as a share of it.
BF16_ROUNDING = 2.0**-8


def make_distance(config: GeReConfig, w_strategy: float | str, anchor: Anchor) -> Distance | None:
    """The distance of a strategy; `None` for label fitting."""
    bits16 = re.search(r"(bf|fp|float)16", anchor.fields["dtype"])
    noise_share = NOISE_SHARE_16_BITS if bits16 else 0.0
    if config.replay_strategy == "tm":
        return MarginDistance(anchor.constants, config.normalization_for(w_strategy), noise_share)
    if config.replay_strategy == "kl":
        return LogitDistance(anchor.constants, config.kl_temperature)
    if config.replay_strategy in ("l1", "l2"):
        order = 1 if config.replay_strategy == "l1" else 2
        return StateDistance(anchor.constants, order, BF16_ROUNDING if anchor.dim else 0.0)
    return None


class Seen(NamedTuple):
    """What the model gave for a replay batch.

    Attributes:
        states: States of the layers that the target is made from, each [b, t, d].
        logits: Logits, [b, t, v].
        mask: Real tokens, [b, t].
    """

    states: Sequence[Tensor]
    logits: Tensor
    mask: Tensor


class Distance(Protocol):
    """Distance of each row and sums for the log.

    Attributes:
        name: What it is.
        order: 1 if it grows with the drift, 2 if it grows with its square.
    """

    name: str
    order: int

    def __call__(self, seen: Seen, targets: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Distance, shape [b], and detached values for the log by name."""
        ...


class _Constants:
    """What holds for all tokens, moved to the device of a batch once."""

    def __init__(self, constants: Mapping[str, Tensor]) -> None:
        self._constants = dict(constants)

    def on(self, device: torch.device) -> dict[str, Tensor]:
        if any(values.device != device for values in self._constants.values()):
            self._constants = {name: values.to(device) for name, values in self._constants.items()}
        return self._constants


class MarginDistance(_Constants):
    """Threshold-based margin over one or several layers, whose mean it is.

    Args:
        constants: Bands.
        normalization: What the margin of a row is divided by.
        noise_share: Share of violations up to which a row has not drifted.
        plain: Use the plain loss for stored regions, too, to look for faults.
    """

    def __init__(
        self, constants: Mapping[str, Tensor], normalization: Normalization, noise_share: float, plain: bool = False
    ) -> None:
        super().__init__(constants)
        self.name = f"tm over {normalization}"
        self.order = 1 if normalization == "violations" else 2
        self._normalization = normalization
        self._noise_share = noise_share
        self._plain = plain

    def __call__(self, seen: Seen, targets: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Margin of each row; counts of violated elements and of all."""
        bands = Bands(**self.on(seen.mask.device))
        layers = range(len(seen.states))
        several = bands.lower.ndim > 1
        margins = []
        for layer in layers:
            own = Bands(*(band[layer] for band in bands)) if several else bands
            base = {name: values[:, :, layer] if several else values for name, values in targets.items()}
            margins.append(self._margin(seen.states[layer], base, own, seen.mask))
        distance = sum((part for part, _ in margins[1:]), margins[0][0])
        violated = sum((sums.violated for _, sums in margins[1:]), margins[0][1].violated)
        elements = sum((sums.elements for _, sums in margins[1:]), margins[0][1].elements)
        if several:
            distance = distance / len(margins)
        return distance, {"violated": violated, "elements": elements}

    def _margin(
        self, state: Tensor, base: Mapping[str, Tensor], bands: Bands, mask: Tensor
    ) -> tuple[Tensor, MarginSums]:
        sums = self._sums(state, base, bands, mask)
        drifted = sums.violated > self._noise_share * sums.elements
        return torch.where(drifted, normalize_margin(sums, self._normalization), 0.0), sums

    def _sums(self, state: Tensor, base: Mapping[str, Tensor], bands: Bands, mask: Tensor) -> MarginSums:
        """Sums to the stored regions, or to those of the base model's live state."""
        lower, upper, tolerance = bands
        if "state" in base:
            return margin_sums(state, regions(base["state"], lower, upper), lower, upper, mask, tolerance)
        return fused_margin_sums(state, base["codes"], lower, upper, mask, tolerance, plain=self._plain)


class StateDistance(_Constants):
    """Mean absolute or squared difference to the base state.

    Args:
        constants: Noise of each dimension.
        order: 1 for the absolute difference, 2 for the square.
        rounding: Largest rounding of a stored element, as a share of it.
    """

    def __init__(self, constants: Mapping[str, Tensor], order: int, rounding: float) -> None:
        super().__init__(constants)
        self.name = f"l{order}"
        self.order = order
        self._distance = l1_distance if order == 1 else l2_distance
        self._rounding = rounding

    def __call__(self, seen: Seen, targets: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Difference of each row."""
        target = targets["state"].float()
        rounding = 0.0 if seen.states[0].dtype == torch.bfloat16 else self._rounding
        tolerance = self.on(target.device)["tolerance"] + rounding * target.abs()
        return self._distance(seen.states[0], target, seen.mask, tolerance), {}


class LogitDistance(_Constants):
    """Divergence from the base distribution.

    Args:
        constants: Noise of a token.
        temperature: What the logits are divided by.
    """

    name, order = "kl", 2

    def __init__(self, constants: Mapping[str, Tensor], temperature: float) -> None:
        super().__init__(constants)
        self._temperature = temperature

    def __call__(self, seen: Seen, targets: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Divergence of each row."""
        tolerance = self.on(seen.mask.device)["tolerance"]
        base = TopLogits(targets["ids"], targets["log_probs"], targets["rest"])
        return top_k_kl(seen.logits, base, seen.mask, self._temperature, tolerance), {}
