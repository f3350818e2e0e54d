"""Where the states of a causal language model come out, and how they are read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn

from gere.errors import UnsupportedModelError


class Layout(NamedTuple):
    """Where the states of a model come out; `gere.model.probe.find_layout` finds it.

    Attributes:
        state: The module that gives or reads the state that the head reads.
        is_read: Whether that module is the head: the model changes the state before it, as MiniCPM3 does.
        layers: The layers that text goes through, in their order; empty if the model has no list of them.
        head: The head, if the logits are its output unchanged and the model can leave them out; `None` otherwise.
    """

    state: nn.Module
    is_read: bool
    layers: Sequence[nn.Module]
    head: nn.Module | None

    @property
    def depth(self) -> int:
        """Number of layers; 1 if the model has no list of them, since it has a last one."""
        return len(self.layers) or 1


def state_of(output: Any, shape: Sequence[int]) -> Tensor | None:
    """Return the state in the output of a module, [b, t, d]; of several residual streams their mean.

    Args:
        output: What the module gave.
        shape: b and t.

    Returns:
        `None` if the output has no state for each token.
    """
    if isinstance(output, list | tuple) and output:
        output = output[0]
    elif not isinstance(output, Tensor):
        output = getattr(output, "last_hidden_state", None)
    if not isinstance(output, Tensor):
        return None
    if output.ndim == 4 and output.shape[1:3] == shape:  # Gemma 3n
        return output.mean(dim=0)
    if output.ndim == 4 and output.shape[:2] == shape:  # DeepSeek-V4
        return output.mean(dim=2)
    return output if output.ndim == 3 and output.shape[:2] == shape else None


def is_reentrant(model: nn.Module) -> bool:
    """Return whether a module of the model recomputes its activations by reentrant checkpointing."""
    for module in model.modules():
        function: Any = getattr(module, "_gradient_checkpointing_func", None)
        if function is None or not getattr(module, "gradient_checkpointing", False):
            continue
        # LLaMA-Factory wraps the `functools.partial` in which transformers puts the setting.
        while hasattr(function, "__wrapped__") and not hasattr(function, "keywords"):
            function = function.__wrapped__
        # A function that does not say counts as reentrant, as functions other than torch's own are.
        if getattr(function, "keywords", {}).get("use_reentrant", True):
            return True
    return False


class StateReader:
    """Reads hidden states by hooks, with their graph, while the wrapped model is called.

    Args:
        layout: Where the states come out.
        layers: Layers whose output is read, 1 for the first. The last one stands for the state that the head reads,
            after the final norm; that one is always read.
    """

    # A hook on a module before the head fires under PEFT, DDP, gradient checkpointing and fused heads. A hook on the
    # head does not: TRL and Liger never call it as a module, and it reads one token alone where logits are left out.
    # `output_hidden_states` would keep the states of all layers in memory.

    def __init__(self, layout: Layout, layers: Sequence[int] = ()) -> None:
        self._layout = layout
        self._asked = [0 if layer == layout.depth else layer for layer in layers]  # 0 stands for the last layer
        self._modules = {layer: layout.layers[layer - 1] for layer in filter(None, self._asked)}
        self._read: dict[int, Tensor] = {}

    @contextmanager
    def reading(self, shape: Sequence[int]) -> Iterator[StateReader]:
        """Capture the states of the forward pass on ids [b, t] inside the `with` block; they are gone after it."""
        last, keep = self._layout.state, partial(self._keep, shape, 0)
        handles = [last.register_forward_pre_hook(keep) if self._layout.is_read else last.register_forward_hook(keep)]
        for layer, module in self._modules.items():
            handles.append(module.register_forward_hook(partial(self._keep, shape, layer)))
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()
            self._read = {}

    @property
    def has_state(self) -> bool:
        """Whether the last forward pass gave a last-layer state of each token."""
        return 0 in self._read

    @property
    def state(self) -> Tensor:
        """The last-layer state of the last forward pass, shape [b, t, d]."""
        return self._state_of(0)

    @property
    def states(self) -> list[Tensor]:
        """The states of the layers that were asked for, in their order, each [b, t, d]."""
        return [self._state_of(layer) for layer in self._asked]

    def _state_of(self, layer: int) -> Tensor:
        if layer not in self._read:
            raise UnsupportedModelError(
                f"The model gave no state of layer {layer}." if layer else "The model gave no last-layer state.",
                where=type(self._modules.get(layer, self._layout.state)).__name__,
                expected="the forward pass to call this module",
                fix="Use a Hugging Face causal language model; nn.DataParallel is not supported.",
            )
        return self._read[layer]

    def _keep(self, shape: Sequence[int], layer: int, module: nn.Module, inputs: Any, *output: Any) -> None:
        state = state_of(output[0] if output else inputs, shape)
        if state is not None:
            self._read[layer] = state
