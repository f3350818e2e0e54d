"""The trained weights of a model, and the base tensor of each: the two ends of the line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gere.blend.base import BaseWeights, rows_with_base
from gere.blend.pairs import between
from gere.cache.fingerprint import base_tensors
from gere.errors import UnsupportedModelError
from gere.model.adapters import base_module

LORA_A = {"lora_A", "lora_embedding_A"}
LORA_B = {"lora_B", "lora_embedding_B"}


class TrainedWeight(NamedTuple):
    """A weight that is trained, and where its base is.

    Attributes:
        tensor: The weight.
        on_disk: Name of its base tensor on disk; empty if it is not there.
        kept: Base tensor in the model itself, as PEFT keeps it beside a module that is trained whole. Without one, and
            without a name, the base is 0: that of B of LoRA.
    """

    tensor: Tensor
    on_disk: str = ""
    kept: Tensor | None = None


class TrainedWeights:
    """The trained weights of a model with their base tensors.

    Of LoRA, B alone has a base: the product with A then moves as the weights of full training do, and A, whose start
    is random, need not go anywhere. Rows that a weight got for added tokens have no base, and stay.

    Args:
        model: The model without its distributed wrapper.
        find: Finds the base weights on disk; called if weights are trained that have their base there.

    Raises:
        UnsupportedModelError: If weights are trained that have no base, such as those of an adapter that is not LoRA.
        CacheMissingError: If the base weights are nowhere.
    """

    def __init__(self, model: nn.Module, find: Callable[[], BaseWeights]) -> None:
        self._weights = list(_trained(model))
        self._on_disk = BaseWeights({})
        if any(weight.on_disk for weight in self._weights):
            self._on_disk = find()

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yield each weight with its base tensor, read one at a time; `None` stands for zeros."""
        for weight in self._weights:
            yield self._moving(weight), self._on_disk.read(weight.on_disk) if weight.on_disk else weight.kept

    def _moving(self, weight: TrainedWeight) -> Tensor:
        """Return the rows of a weight that have a base: all but those of added tokens."""
        rows = self._on_disk.rows.get(weight.on_disk)
        if weight.kept is not None and weight.kept.shape != weight.tensor.shape:
            rows = len(weight.kept)
        return weight.tensor if rows is None else weight.tensor[:rows]

    @property
    def adapter_is_new(self) -> bool:
        """Whether all weights that have their base at 0 are there still, as those of a new adapter of LoRA are."""
        return not any(weight.tensor.any() for weight in self._weights if not weight.on_disk and weight.kept is None)

    def copies(self) -> list[Tensor]:
        """Return copies of the weights as they are, in main memory."""
        return [self._moving(weight).detach().cpu().clone() for weight in self._weights]


def _trained(model: nn.Module) -> Iterator[TrainedWeight]:
    names = {id(tensor): name for name, tensor in base_tensors(model).items()}
    causal = base_module(model)
    saved = any("modules_to_save" in name.split(".") for name, _ in causal.named_parameters())
    rows = rows_with_base(model) if saved else {}
    for full_name, tensor in causal.named_parameters():
        parts = full_name.split(".")
        if not tensor.requires_grad or LORA_A & set(parts):
            continue
        if id(tensor) in names:
            yield TrainedWeight(tensor, names[id(tensor)])
        elif LORA_B & set(parts):
            yield TrainedWeight(tensor)
        elif "modules_to_save" in parts:
            place = parts.index("modules_to_save")
            original = ".".join([*parts[:place], "original_module", *parts[place + 2 :]])
            kept = causal.get_parameter(original)
            with_base = rows.get(names.get(id(kept), ""))
            yield TrainedWeight(tensor, kept=kept if with_base is None else kept[:with_base])
        else:
            raise UnsupportedModelError(
                "The base of a weight that is trained is not known, so that it cannot go back to it.",
                where=full_name,
                expected="weights of the model, LoRA, or modules_to_save",
                found="another kind of adapter",
                fix="Train with LoRA or in full, or leave base_decay, forgetting_budget and blend out.",
            )


@torch.no_grad()
def go_to(trained: TrainedWeights, tuned: list[Tensor], share: float) -> None:
    """Set the trained weights to a point of the line between their base and copies of their tuned end.

    Args:
        trained: The trained weights.
        tuned: The tuned end, as `TrainedWeights.copies` gave it.
        share: 0 for the base, 1 for the tuned end, bit for bit.
    """
    for (weight, base), end in zip(trained, tuned, strict=True):
        # The base first takes the precision of the weight: an untouched weight must not move.
        start = base.to(end.device, end.dtype) if base is not None else None
        weight.copy_(between(end, start, share))
