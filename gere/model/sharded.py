"""Weights that are spread over processes, by DeepSpeed ZeRO-3 or FSDP2: their true shape, and the whole of one."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


def is_sharded(model: nn.Module) -> bool:
    """Whether a process holds only a part of some weights, so that all must call the model together."""
    return any(isinstance(weight, DTensor) or hasattr(weight, "ds_shape") for weight in model.parameters())


def class_name(model: nn.Module) -> str:
    """Class of a model by name; FSDP2 puts a class of its own before it."""
    return next(cls.__name__ for cls in type(model).__mro__ if not issubclass(cls, FSDPModule))


def whole_shape(weight: Any) -> tuple[int, ...]:
    """Shape of a weight over all processes."""
    return tuple(getattr(weight, "ds_shape", weight.shape))


def whole(weight: Any) -> Tensor:
    """All of a weight, in main memory. Every process must ask for the same weights in the same order.

    Args:
        weight: A parameter or buffer.
    """
    if hasattr(weight, "full_tensor"):
        on_mesh = weight.detach().to(weight.device_mesh.device_type)  # an offloaded one is in main memory
        return on_mesh.full_tensor().cpu()
    # DeepSpeed keeps small weights whole and would not gather them again for a forward pass.
    if getattr(getattr(weight, "ds_status", None), "name", "AVAILABLE") != "AVAILABLE":
        import deepspeed

        with deepspeed.zero.GatheredParameters([weight]):
            return weight.detach().cpu().clone()
    return weight.detach().cpu()
