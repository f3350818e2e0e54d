"""A training that diverges says so at that step, before the optimizer moves."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gere._log import logger
from gere.errors import NonFiniteStateError

FIX = "Lower the learning rate, or set max_grad_norm; with fp16, train in bf16. Resume from an earlier checkpoint."


class _Seen(NamedTuple):
    """Whether a loss was finite, on its way to main memory; rows are those of a replay loss."""

    finite: Tensor
    arrived: torch.cuda.Event | None
    rows: Sequence[int] | None


class FiniteLosses:
    """Looks whether the losses of a step are finite, without waiting for the device.

    Args:
        model: The model that is trained.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._seen: list[_Seen] = []
        self._warned = False

    def see(self, loss: Tensor, rows: Sequence[int] | None = None) -> None:
        """Take note of a loss of this step: of replay rows, or of the task."""
        finite = loss.detach().isfinite().all()
        arrived = None
        if finite.is_cuda:
            finite = torch.empty((), dtype=torch.bool, pin_memory=True).copy_(finite, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        self._seen.append(_Seen(finite, arrived, rows))

    def check(self, step: int) -> None:
        """Look at what has arrived, before the optimizer moves; what has not is looked at in a later step.

        Raises:
            NonFiniteStateError: If a replay loss is NaN or infinite, or a task loss whose gradient is, too.
        """
        arrived = [seen.arrived is None or seen.arrived.query() for seen in self._seen]
        done = list(compress(self._seen, arrived))
        self._seen = [seen for seen, here in zip(self._seen, arrived, strict=True) if not here]
        for seen in done:
            if bool(seen.finite):
                continue
            if seen.rows is not None:
                raise _diverged(f"replay rows {list(seen.rows)}, on which the base model gave finite values", step)
            # A mean over rows without any label is NaN, and has a gradient of zeros that harms nothing.
            if not all(bool(gradient.isfinite().all()) for gradient in self._gradients()):
                raise _diverged("the task rows", step)
            if not self._warned:
                self._warned = True
                logger.warning("The task loss of step %d is NaN or infinite; its gradient is finite.", step)

    def _gradients(self) -> list[Tensor]:
        return [tensor.grad for tensor in self._model.parameters() if tensor.grad is not None]


def _diverged(what: str, step: int) -> NonFiniteStateError:
    return NonFiniteStateError(
        "The training diverges: a loss is NaN or infinite.",
        where=f"step {step}, {what}",
        expected="finite losses",
        found="NaN or infinity",
        fix=FIX,
    )
