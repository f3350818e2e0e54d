"""What an anchor keeps of the base model for each strategy: from states and logits to the tensors of a shard."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from gere.cache.bands import QUANTILE_TOKENS, BandRule, Bands
from gere.cache.codec import PER_BYTE, pack, regions
from gere.losses import TopLogits, top_logits

Tensors = dict[str, Tensor]
STATE_DTYPE = torch.bfloat16
LEAST_DIVERGENCE = 1e-6  # of a token, in nats: rounding of the sum over its likeliest tokens in float32
LEAST_DIFFERENCE = 1e-6  # of an element of a normalised state, likewise


class Target(ABC):
    """A kind of stored target.

    Attributes:
        field: What the anchor holds, as its manifest names it.
        fields: What else it depends on.
        kind: First word of the names of its shards; empty if it stores nothing of each token.
        constants_file: File of what holds for all tokens; empty if there is nothing.
        layers: States that it is made from, 1 for the output of the first layer; empty for none.
        wants_logits: Whether it is made from logits.
        shard_bytes: Bytes of a shard for each number that is kept of a token; `None` for as many as were kept.
        wants_parts: Whether what `keep` gives has to wait on the disk until all rows are evaluated.
    """

    field: str
    fields: Mapping[str, str] = MappingProxyType({})
    kind: str
    constants_file = "noise.safetensors"
    layers: tuple[int, ...] = ()
    wants_logits = False
    shard_bytes: float | None = None
    wants_parts = True

    @abstractmethod
    def keep(self, states: Sequence[Tensor], logits: Tensor | None) -> Tensors:
        """What is needed of some tokens, each of shape [..., t, *]; states in the order of `layers`."""

    @abstractmethod
    def change(self, alone: Tensors, padded: Tensors) -> Tensor:
        """How far two evaluations of the same tokens differ, [t, *]."""

    def summary(self, kept: Tensors, tokens: int, first: int) -> list[Any]:
        """What the constants need to know about a part of the replay set.

        Args:
            kept: What was kept of its tokens.
            tokens: Tokens of the whole set.
            first: Number of its first token in the whole set.
        """
        return []

    def constants(self, summaries: Sequence[list[Any]], noise: Tensor) -> Tensors:
        """What holds for all tokens, from the summaries of all parts and the largest change."""
        return {"tolerance": 2.0 * torch.maximum(noise, noise.mean()) + LEAST_DIFFERENCE}

    def encode(self, kept: Tensors, constants: Tensors) -> Tensors:
        """Tensors of a shard, [t, *]."""
        return kept


class Losses(Target):
    """Nothing of each token: label fitting needs only the texts."""

    field, kind, constants_file, wants_parts = "losses only", "", "", False

    def keep(self, states: Sequence[Tensor], logits: Tensor | None) -> Tensors:
        """Nothing."""
        return {}

    def change(self, alone: Tensors, padded: Tensors) -> Tensor:
        """None."""
        return torch.zeros(1)


class Regions(Target):
    """On which side of its bands each element of a state lies, 2 bits.

    Args:
        layers: Layers, ascending.
        depth: Number of layers of the model; the state of the last one is the one after the final norm.
        rules: Rule of the bands of each layer.
    """

    kind, constants_file, shard_bytes = "regions", "bands.safetensors", 1 / PER_BYTE

    def __init__(self, layers: Sequence[int], depth: int, rules: Sequence[BandRule]) -> None:
        self.layers = tuple(layers)
        self._rules = tuple(rules)
        last = self.layers == (depth,)
        many = f"regions of layers {', '.join(map(str, layers))} of {depth}"
        self.field = "regions of the last layer" if last else many
        self.fields = {"bands": "; last layer: ".join(dict.fromkeys(map(str, rules)))}

    def keep(self, states: Sequence[Tensor], logits: Tensor | None) -> Tensors:
        """States, of several layers [..., t, l, d]."""
        return {"state": _together(states)}

    def change(self, alone: Tensors, padded: Tensors) -> Tensor:
        """Difference of each element."""
        return _state_change(alone, padded)

    def summary(self, kept: Tensors, tokens: int, first: int) -> list[Any]:
        """What the rule of each layer needs."""
        share = QUANTILE_TOKENS / (tokens * len(self.layers))
        states = self._apart(kept["state"])
        return [rule.summary(state, share, first) for rule, state in zip(self._rules, states, strict=True)]

    def constants(self, summaries: Sequence[list[Any]], noise: Tensor) -> Tensors:
        """Bands, of several layers [l, d]."""
        by_layer = zip(self._rules, zip(*summaries, strict=True), self._apart(noise), strict=True)
        made = [rule.bands(parts, change) for rule, parts, change in by_layer]
        columns = zip(*made, strict=True)
        return {name: _together(column) for name, column in zip(Bands._fields, columns, strict=True)}

    def encode(self, kept: Tensors, constants: Tensors) -> Tensors:
        """Packed regions."""
        return {"codes": pack(regions(kept["state"], constants["lower"], constants["upper"]))}

    def _apart(self, stacked: Tensor) -> Sequence[Tensor]:
        return (stacked,) if len(self.layers) == 1 else stacked.unbind(-2)


class States(Target):
    """The state of each token, in bfloat16."""

    kind, shard_bytes = "states", 2.0

    def __init__(self, depth: int) -> None:
        self.layers = (depth,)
        self.field = "states of the last layer"

    def keep(self, states: Sequence[Tensor], logits: Tensor | None) -> Tensors:
        """The state as it is."""
        return {"state": states[0]}

    def change(self, alone: Tensors, padded: Tensors) -> Tensor:
        """Difference of each element."""
        return _state_change(alone, padded)

    def encode(self, kept: Tensors, constants: Tensors) -> Tensors:
        """The state in bfloat16."""
        return {"state": kept["state"].to(STATE_DTYPE)}


class Likeliest(Target):
    """The likeliest tokens of each distribution, and the mass of the rest.

    Args:
        top_k: Number of tokens.
        temperature: What the logits are divided by.
    """

    kind, wants_logits = "logits", True

    def __init__(self, top_k: int, temperature: float) -> None:
        self._top_k, self._temperature = top_k, temperature
        self.field = f"top {top_k} logits at temperature {temperature:g}"

    def keep(self, states: Sequence[Tensor], logits: Tensor | None) -> Tensors:
        """Ids, log-probabilities and the rest."""
        if logits is None:
            raise RuntimeError("the likeliest tokens are kept from logits")
        return top_logits(logits, self._top_k, self._temperature)._asdict()

    def constants(self, summaries: Sequence[list[Any]], noise: Tensor) -> Tensors:
        """Largest divergence that rounding alone makes."""
        return {"tolerance": (2.0 * noise).clamp(min=LEAST_DIVERGENCE)}

    def change(self, alone: Tensors, padded: Tensors) -> Tensor:
        """Divergence of each token."""
        return _between(TopLogits(**alone), TopLogits(**padded))


class Live(Target):
    """Targets that are not stored, since the base model itself is at hand in training; bands are.

    Args:
        target: What is taken from the base model.
    """

    kind = ""

    def __init__(self, target: Target) -> None:
        self._target = target
        self.field = f"{target.field}, live"
        self.fields, self.layers, self.wants_logits = target.fields, target.layers, target.wants_logits
        self.constants_file = target.constants_file
        self.wants_parts = bool(target.fields)

    def keep(self, states: Sequence[Tensor], logits: Tensor | None) -> Tensors:
        """As the target does."""
        return self._target.keep(states, logits)

    def change(self, alone: Tensors, padded: Tensors) -> Tensor:
        """As the target does."""
        return self._target.change(alone, padded)

    def summary(self, kept: Tensors, tokens: int, first: int) -> list[Any]:
        """As the target does."""
        return self._target.summary(kept, tokens, first)

    def constants(self, summaries: Sequence[list[Any]], noise: Tensor) -> Tensors:
        """As the target does."""
        return self._target.constants(summaries, noise)


def _state_change(alone: Tensors, padded: Tensors) -> Tensor:
    return (padded["state"].float() - alone["state"].float()).abs()


def _between(base: TopLogits, other: TopLogits) -> Tensor:
    """Divergence of each token, [n, 1], on the tokens that both keep; all others count as one."""
    ids, order = other.ids.sort(dim=-1)
    place = torch.searchsorted(ids, base.ids.contiguous()).clamp(max=ids.shape[-1] - 1)
    both = ids.gather(-1, place) == base.ids
    log_p, log_q = base.log_probs, other.log_probs.gather(-1, order.gather(-1, place))
    kept = torch.where(both, log_p.exp() * (log_p - log_q), 0.0).sum(dim=-1)
    rest_p = 1 - torch.where(both, log_p.exp(), 0.0).sum(dim=-1)
    rest_q = 1 - torch.where(both, log_q.exp(), 0.0).sum(dim=-1)
    least = torch.finfo(rest_p.dtype).eps
    rest = rest_p * (rest_p.clamp(min=least) / rest_q.clamp(min=least)).log()
    return (kept + rest).abs().unsqueeze(-1)


def _together(layers: Sequence[Tensor]) -> Tensor:
    """One layer as it is, several along a dimension before the last."""
    if len(layers) == 1:
        return layers[0]
    wide = torch.float32 if len({layer.dtype for layer in layers}) > 1 else layers[0].dtype
    return torch.stack([layer.to(wide) for layer in layers], dim=-2)
