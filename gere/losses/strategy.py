"""What a replay strategy is: what it keeps of the base model, and how far a row has moved from that.

A strategy is one class in one file, and one line of `gere.config.STRATEGIES`.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gere.config import STRATEGIES

Tensors = dict[str, Tensor]


class Seen(NamedTuple):
    """What the model gives for a batch of replay rows.

    Attributes:
        states: States of the layers that the strategy reads, each [b, t, d].
        logits: Logits, [b, t, v].
        ids: Token ids, [b, t].
        mask: Real tokens, [b, t].
    """

    states: Sequence[Tensor]
    logits: Tensor
    ids: Tensor
    mask: Tensor


class Strategy:
    """Base of all strategies. By itself it keeps nothing and holds nothing: label fitting, `"ce"`.

    Subclasses take the settings that they need as keyword arguments with the names of `GeReConfig`'s fields.

    Args:
        depth: Number of layers of the model.
        live: Do not store targets. The base model gives them again in each step.
        half: The model computes in 16 bits.

    Attributes:
        name: What the distance is called in messages and in a checkpoint.
        order: 1 if the distance grows with the drift, 2 if it grows with the square of the drift.
        measures: Whether there is a distance.
        field: What the anchor holds, as its manifest names it.
        fields: What else the anchor depends on.
        kind: First word of the names of its shards; empty if it stores nothing of each token.
        constants_file: File of the constants that hold for all tokens; empty if there are none.
        layers: Layers whose states it reads, 1 for the first.
        wants_logits: Whether it reads logits.
        shard_bytes: Bytes of a shard for each number kept of a token; `None` for the size as kept.
        wants_parts: Whether what `keep` gives waits on the disk until all rows are evaluated.
    """

    name = "ce"
    order = 2
    measures = False
    field = "losses only"
    fields: Mapping[str, str] = MappingProxyType({})
    kind = ""
    constants_file = ""
    layers: tuple[int, ...] = ()
    wants_logits = False
    shard_bytes: float | None = None
    wants_parts = False

    def __init__(self, *, depth: int, live: bool = False, half: bool = False) -> None:
        self.depth = depth
        self.live = live
        self.half = half
        if live:
            # The manifest tells apart an anchor with targets from one without them.
            self.field = f"{self.field}, live"
            self.kind = ""
            self.wants_parts = bool(self.constants_file)

    def keep(self, states: Sequence[Tensor], logits: Tensor | None) -> Tensors:
        """What the strategy needs of some tokens.

        Args:
            states: States of `layers`, each [..., t, d].
            logits: Logits, [..., t, v]; `None` unless `wants_logits`.

        Returns:
            Tensors of shape [..., t, *] by name.
        """
        return {}

    def change(self, alone: Tensors, padded: Tensors) -> Tensor:
        """How far rounding alone moves two evaluations of the same tokens apart, [t, *]."""
        return torch.zeros(1, 1)

    def summary(self, kept: Tensors, tokens: int, first: int) -> list[Any]:
        """What the constants need of one part of the replay set.

        Args:
            kept: What was kept of its tokens.
            tokens: Tokens of the whole set.
            first: Number of its first token in the whole set.
        """
        return []

    def constants(self, summaries: Sequence[list[Any]], noise: Tensor) -> Tensors:
        """What holds for all tokens, from the summaries of all parts and the largest `change` of each dimension."""
        return {}

    def encode(self, kept: Tensors, constants: Tensors) -> Tensors:
        """Tensors of a shard, [t, *]."""
        return kept

    def distance(self, seen: Seen, targets: Tensors, constants: Tensors) -> tuple[Tensor, Tensor, Tensor]:
        """How far each row has moved from the base model.

        Args:
            seen: What the model gives now.
            targets: What the anchor holds of these rows, [b, t, *]; a live strategy gets what `keep` gives.
            constants: What the anchor holds for all tokens.

        Returns:
            The distance of each row, [b], with its graph; its violated elements and all its elements, [b], zeros where
            elements are not counted.
        """
        nothing = torch.zeros(len(seen.mask), device=seen.mask.device)
        return nothing, nothing, nothing


def make_strategy(name: str, settings: Mapping[str, Any], *, depth: int, live: bool, half: bool) -> Strategy:
    """Make the strategy with this name.

    Args:
        name: A key of `gere.config.STRATEGIES`.
        settings: Values by the names of `GeReConfig`'s fields; each strategy takes those that it knows.
        depth: Number of layers of the model.
        live: Do not store targets.
        half: The model computes in 16 bits.

    Raises:
        ConfigError: If the model does not have the layers that are asked for.
    """
    module, _, attribute = STRATEGIES[name].partition(":")
    strategy: type[Strategy] = getattr(importlib.import_module(module), attribute)
    known = inspect.signature(strategy).parameters
    own = {key: value for key, value in settings.items() if key in known}
    return strategy(depth=depth, live=live, half=half, **own)
