"""Base decay: what the weights have moved fades back towards the base weights while training goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from gere.blend.base import BaseWeights
from gere.blend.schedule import pulls
from gere.cache.fingerprint import base_tensors
from gere.errors import UnsupportedModelError
from gere.model.adapters import base_module

LORA_B = ("lora_B", "lora_embedding_B")
LORA_A = ("lora_A", "lora_embedding_A")


class BaseDecay:
    """The pulls of one training.

    After a pull by d, the weights are theta + d (theta_base - theta). It needs no gradient and leaves the state of the
    optimizer alone. L2-SP (arXiv 1802.01483) pulls in each step and through the gradient, sequential averaging
    (arXiv 2501.05559) between the tasks of a sequence.

    Args:
        decay: c of `gere_config.base_decay`.
        steps: Optimizer steps of the training.
        model: The model without its distributed wrapper.
        find: Finds the base weights on disk; called if weights are trained that have their base there.
        seed: Seed of the rounding of 16-bit weights.

    Raises:
        UnsupportedModelError: If weights are trained that have no base, such as those of an adapter that is not LoRA.
        CacheMissingError: If the base weights are nowhere.
    """

    def __init__(self, decay: float, steps: int, model: nn.Module, find: Callable[[], BaseWeights], seed: int) -> None:
        self._pulls = pulls(decay, steps)
        self._trained = list(_trained(model))
        self._base = BaseWeights({})
        if any(weight.base for weight in self._trained):
            self._base = find()
        self._seed = seed

    @torch.no_grad()
    def after(self, step: int) -> None:
        """Pull, if a pull follows this step."""
        part = self._pulls.get(step, 0.0)
        if not part:
            return
        for number, weight in enumerate(self._trained):
            # The same on every process, and in a resumed training.
            generator = torch.Generator(weight.tensor.device).manual_seed(hash((self._seed, step, number)))
            pull(weight.tensor, weight.target(self._base), part, generator)


class DecayCallback(TrainerCallback):
    """Lets base decay follow the events of a trainer.

    Args:
        begin: Called before the first step, when the anchor is there.
    """

    def __init__(self, begin: Callable[[], BaseDecay]) -> None:
        self._begin = begin
        self._decay: BaseDecay | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Find the base weights, and plan the pulls."""
        self._decay = self._begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Pull, if a pull follows this step."""
        if self._decay is not None:
            self._decay.after(state.global_step)


class TrainedWeight(NamedTuple):
    """A weight that is trained, and what it goes back to.

    Attributes:
        tensor: The weight.
        base: Name of its base tensor on disk; empty if there is none.
        kept: Base tensor in the model itself, as PEFT keeps it beside a module that is trained whole; `None` for one
            on disk, and for LoRA, whose B goes to 0.
    """

    tensor: Tensor
    base: str
    kept: Tensor | None

    def target(self, weights: BaseWeights) -> Tensor | None:
        """Return the base tensor; `None` for zeros."""
        return weights.read(self.base) if self.base else self.kept


def _trained(model: nn.Module) -> Iterator[TrainedWeight]:
    """Find the trained weights of a model, and the base of each.

    Of LoRA, B alone goes back: the product fades as the weights of full training do, and A, whose start is random, has
    no base to go to.
    """
    names = {id(tensor): name for name, tensor in base_tensors(model).items()}
    causal = base_module(model)
    for full_name, tensor in causal.named_parameters():
        parts = full_name.split(".")
        if not tensor.requires_grad or set(parts) & {*LORA_A}:
            continue
        if id(tensor) in names:
            yield TrainedWeight(tensor, names[id(tensor)], None)
        elif set(parts) & {*LORA_B}:
            yield TrainedWeight(tensor, "", None)
        elif "modules_to_save" in parts:
            place = parts.index("modules_to_save")
            original = ".".join([*parts[:place], "original_module", *parts[place + 2 :]])
            yield TrainedWeight(tensor, "", causal.get_parameter(original))
        else:
            raise UnsupportedModelError(
                "base_decay does not know the base of a weight that is trained.",
                where=full_name,
                expected="weights of the model, LoRA, or modules_to_save",
                found="another kind of adapter",
                fix="Train with LoRA or in full, or leave gere_config.base_decay out.",
            )


def pull(weight: Tensor, target: Tensor | None, part: float, generator: torch.Generator) -> None:
    """Take a weight a part of the way to its target, in place.

    Args:
        weight: The weight, of any shape.
        target: Where it goes, with as many rows or fewer: rows that were added later have no base and stay. `None`
            for 0.
        part: Share of the way, d.
        generator: Rounds weights of bfloat16.
    """
    moving = weight
    if target is not None and weight.ndim:
        moving = weight[: len(target)]
    now = moving.float()
    if target is None:
        new = now * (1 - part)
    else:
        # The target first takes the precision of the weight: an untouched weight must not move.
        new = now + part * (target.to(weight).float() - now)
    moving.copy_(rounded(new, generator) if weight.dtype == torch.bfloat16 else new)


def rounded(values: Tensor, generator: torch.Generator) -> Tensor:
    """Round float32 values to bfloat16 up or down by chance, so that they are right on average.

    A pull is often smaller than half a step of bfloat16. Rounded to the nearest value, it would not be there at all.
    """
    bits = values.view(torch.int32)
    noise = torch.randint(0, 1 << 16, values.shape, generator=generator, device=values.device, dtype=torch.int32)
    return ((bits + noise) & ~0xFFFF).view(torch.float32).to(torch.bfloat16)
