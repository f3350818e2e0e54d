"""Base decay: what the weights have moved fades back towards the base weights while training goes on."""

from __future__ import annotations

import torch
from torch import Tensor

from gere.blend.schedule import pulls
from gere.blend.trained import TrainedWeights


class BaseDecay:
    """The pulls of one training.

    After a pull by d, the weights are theta + d (theta_base - theta). It needs no gradient and leaves the state of the
    optimizer alone. L2-SP (arXiv 1802.01483) pulls in each step and through the gradient, sequential averaging
    (arXiv 2501.05559) between the tasks of a sequence.

    Args:
        decay: c of `gere_config.base_decay`.
        steps: Optimizer steps of the training.
        trained: The trained weights.
        seed: Seed of the rounding of 16-bit weights.
    """

    def __init__(self, decay: float, steps: int, trained: TrainedWeights, seed: int) -> None:
        self._pulls = pulls(decay, steps)
        self._trained = trained
        self._seed = seed

    @torch.no_grad()
    def after(self, step: int) -> None:
        """Pull, if a pull follows this step."""
        if step not in self._pulls:
            return
        for number, (weight, base) in enumerate(self._trained):
            # The same on every process, and in a resumed training.
            generator = torch.Generator(weight.device).manual_seed(hash((self._seed, step, number)))
            pull(weight, base, self._pulls[step], generator)


def pull(weight: Tensor, base: Tensor | None, part: float, generator: torch.Generator) -> None:
    """Take a weight a part d of the way to its base, in place.

    Args:
        weight: The weight, of any shape.
        base: Where it goes, of the same shape; `None` for zeros.
        part: d.
        generator: Rounds weights of bfloat16.
    """
    new = weight.float()
    if base is None:
        new = new * (1 - part)
    else:
        # The base first takes the precision of the weight: an untouched weight must not move.
        new = new + part * (base.to(weight).float() - new)
    weight.copy_(rounded(new, generator) if weight.dtype == torch.bfloat16 else new)


def rounded(values: Tensor, generator: torch.Generator) -> Tensor:
    """Round float32 values to bfloat16 up or down by chance, so that they are right on average.

    A pull is often smaller than half a step of bfloat16. Rounded to the nearest value, it would not be there at all.
    """
    bits = values.view(torch.int32)
    noise = torch.randint(0, 1 << 16, values.shape, generator=generator, device=values.device, dtype=torch.int32)
    return ((bits + noise) & ~0xFFFF).view(torch.float32).to(torch.bfloat16)
