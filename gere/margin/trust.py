"""Whether the kernels may be used on a GPU: each device is asked once, and a failure is logged once."""

from __future__ import annotations

import logging
from functools import cache, cached_property
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from gere.cache.codec import pack, regions
from gere.margin import plain
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
    """The kernels of a device, until they fail.

    Args:
        device: Where they shall run.
        module: Name of the module that has them.
    """

    def __init__(self, device: torch.device, module: str = KERNELS) -> None:
        self._device = device
        self._module = module
        self._checked: set[torch.dtype] = set()
        self._failed = False

    @cached_property
    def _kernels(self) -> Any:
        return import_module(self._module)

    def work_for(self, dtype: torch.dtype) -> bool:
        """Whether sums and gradients equal those of the plain version; asked once of each type of state."""
        if not self._failed and dtype not in self._checked:
            self._checked.add(dtype)
            self._check(dtype)
        return not self._failed

    def sums(self, own: Operands, keep: bool) -> Outcome:
        """As `gere.margin.kernels.sums`."""
        return self._or_plain("sums", own, keep)

    def expand(self, signs: Tensor, grad_total: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
        """As `gere.margin.kernels.expand`."""
        return self._or_plain("expand", signs, grad_total, dim, dtype)

    def _or_plain(self, name: str, *arguments: Any) -> Any:
        """A kernel is compiled anew for operands of another kind, which may fail although the check did not."""
        if not self._failed:
            try:
                return getattr(self._kernels, name)(*arguments)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # a compiler fails in many ways, and none of them is worth a run
                self._fail(f"{type(error).__name__}: {error}")
        return getattr(plain, name)(*arguments)

    def _fail(self, reason: str) -> None:
        self._failed = True
        what = "The fused margin does not work on %s, the plain version takes its place, with more memory: %s"
        logger.warning(what, self._device, reason)

    def _check(self, dtype: torch.dtype) -> None:
        for shape in SHAPES:
            own = small_case(shape, dtype, self._device)
            grad = torch.tensor([0.5, -3.0], device=self._device)
            done, wanted = self.sums(own, True), plain.sums(own, True)
            if self._failed or done.signs is None or wanted.signs is None:
                return
            gradient = self.expand(done.signs, grad, shape[-1], dtype)
            equal = torch.equal(gradient, plain.expand(wanted.signs, grad, shape[-1], dtype))
            equal = equal and torch.equal(done.violated, wanted.violated)
            if not equal or not torch.allclose(done.total, wanted.total, rtol=TOTAL_ERROR):
                return self._fail(f"it differs from the plain version for a {dtype} state of shape {shape}")


def small_case(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> Operands:
    """Two rows with all regions, padding, NaN and infinities that are no violation, the same in each process."""
    _, t, d = shape
    generator = torch.Generator().manual_seed(0)
    base, state, bands = (torch.randn(size, generator=generator) for size in (shape, shape, (2, d)))
    lower, upper = -bands[0].abs(), bands[1].abs()
    mask = torch.arange(t) < torch.tensor([[t], [t // 2]])
    state[0, 0, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    state[1, -1] = torch.nan
    region = regions(base, lower, upper)
    region[0, 0, :3] = torch.tensor([0, 1, -1])
    parts = (state.to(dtype), pack(region), lower, upper, torch.full((d,), 1e-3), mask)
    return Operands(*(part.to(device) for part in parts))
