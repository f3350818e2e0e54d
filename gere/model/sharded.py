"""Read weights that DeepSpeed ZeRO-3 or FSDP2 spread over processes."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


def is_sharded(model: nn.Module) -> bool:
    """Return whether a process holds only a part of some weights, so that all must call the model together."""
    return any(isinstance(weight, DTensor) or hasattr(weight, "ds_shape") for weight in model.parameters())


def class_name(model: nn.Module) -> str:
    """Return the name of a model's class."""
    # FSDP2 replaces the class by one that inherits from FSDPModule and from it.
    return next(cls.__name__ for cls in type(model).__mro__ if not issubclass(cls, FSDPModule))


def whole_shape(weight: Any) -> tuple[int, ...]:
    """Return the shape of a weight over all processes."""
    return tuple(getattr(weight, "ds_shape", weight.shape))


def whole(weight: Any) -> Tensor:
    """Gather a parameter or buffer in main memory; every process must ask for the same ones in the same order."""
    if hasattr(weight, "full_tensor"):
        # An offloaded weight is in main memory, where NCCL cannot gather it.
        return weight.detach().to(weight.device_mesh.device_type).full_tensor().cpu()
    # DeepSpeed keeps small weights whole and would not gather them again for a forward pass.
    if getattr(getattr(weight, "ds_status", None), "name", "AVAILABLE") != "AVAILABLE":
        import deepspeed

        with deepspeed.zero.GatheredParameters([weight]):
            return weight.detach().cpu().clone()
    return weight.detach().cpu()
