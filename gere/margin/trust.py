"""Whether the kernels may be used on a GPU: each device is asked once, and a failure is logged once."""

from __future__ import annotations

import logging
from functools import cache, cached_property
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from gere.cache.codec import pack, regions
from gere.losses import margin_sums
from gere.margin.operands import Operands, Outcome

logger = logging.getLogger("gere")

KERNELS = "gere.margin.kernels"
TOTAL_ERROR = 1e-5  # of a sum in float32 whose order differs
SHAPES = ((2, 5, 13), (2, 40, 160))  # odd, and more than one tile that loads whole words


def kernels_on(device: torch.device, dtype: torch.dtype) -> Any:
    """The kernels for states of `dtype` on `device`; `None` if they do not work there."""
    kernels = _on(str(device))
    return kernels if kernels.work_for(dtype) else None


@cache
def _on(device: str) -> CheckedKernels:
    return CheckedKernels(torch.device(device))


class CheckedKernels:
    """The kernels of a device, used from the first success of their check to the first failure.

    Args:
        device: Where they shall run.
        module: Name of the module that has them.
    """

    def __init__(self, device: torch.device, module: str = KERNELS) -> None:
        self._device = device
        self._module = module
        self._known: dict[torch.dtype, bool] = {}

    @cached_property
    def _kernels(self) -> Any:
        return import_module(self._module)

    def work_for(self, dtype: torch.dtype) -> bool:
        """Whether sums and gradients equal those of the plain version; asked once of each type of state."""
        if dtype not in self._known:
            self._known[dtype] = all(self._known.values()) and self._check(dtype)
        return self._known[dtype]

    def sums(self, own: Operands, keep: bool) -> Outcome:
        """As `gere.margin.kernels.sums`."""
        return self._kernels.sums(own, keep)

    def expand(self, signs: Tensor, grad_total: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
        """As `gere.margin.kernels.expand`."""
        return self._kernels.expand(signs, grad_total, dim, dtype)

    def _check(self, dtype: torch.dtype) -> bool:
        try:
            wrong = [shape for shape in SHAPES if not self._agree(shape, dtype)]
            reason = f"it differs from the plain version for a {dtype} state of shape {wrong[0]}" if wrong else ""
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a compiler fails in many ways, and none of them is worth a run
            reason = f"{type(error).__name__}: {error}"
        if reason:
            what = "The fused margin does not work on %s, the plain version takes its place, with more memory: %s"
            logger.warning(what, self._device, reason)
        return not reason

    def _agree(self, shape: tuple[int, int, int], dtype: torch.dtype) -> bool:
        own = _small_case(shape, dtype, self._device)
        grad = torch.tensor([0.5, -3.0], device=self._device)
        done = self._kernels.sums(own, True)
        gradient = self._kernels.expand(done.signs, grad, shape[-1], dtype)
        total, violated, expected = _plain(own, grad)
        close = torch.allclose(done.total, total, rtol=TOTAL_ERROR, equal_nan=True)
        return close and torch.equal(done.violated, violated) and torch.equal(gradient, expected)


def _small_case(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> Operands:
    """A state with all regions, padding, NaN and infinities, the same in each process."""
    b, t, d = shape
    generator = torch.Generator().manual_seed(0)
    base, state, bands = (torch.randn(size, generator=generator) for size in (shape, shape, (2, d)))
    lower, upper = -bands[0].abs(), bands[1].abs()
    mask = torch.arange(t) < torch.tensor([[t], [t // 2]])
    state[0, 0, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    state[1, -1] = torch.nan
    region = regions(base, lower, upper)
    region[0, 0, :3] = 0
    parts = (state.to(dtype), pack(region), lower, upper, torch.full((d,), 1e-3), mask)
    return Operands(*(part.to(device) for part in parts))


def _plain(own: Operands, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Total, violations and gradient of the plain version; a checkpoint around it does not see its tensors."""
    from gere.cache.codec import unpack

    quiet = torch.autograd.graph.saved_tensors_hooks(lambda kept: kept, lambda kept: kept)
    with torch.inference_mode(False), torch.enable_grad(), quiet:
        state = own.state.clone().requires_grad_()
        region = unpack(own.codes, state.shape[-1])
        sums = margin_sums(state, region, own.lower, own.upper, own.mask, own.tolerance)
        (gradient,) = torch.autograd.grad(sums.total, state, grad)
    return sums.total.detach(), sums.violated, gradient
