"""Find where the states of a causal language model come out: by what its head reads, in one forward pass."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from gere.errors import UnsupportedModelError
from gere.model.adapters import base_module, head_of
from gere.model.forward import as_base
from gere.model.states import Layout, StateReader, state_of

TRIAL_TOKENS = 64
# Modules that finish between the one whose output the head reads and the head itself are few: those around it.
REMEMBERED_OUTPUTS = 16
# A causal model gives the first half of a text the same states whatever follows: those of two rows of one batch differ
# by rounding at most, which is measured, too, and in single tokens that a mixture of experts sends elsewhere by it.
LEAST_MOVE, NOISE_FACTOR, MOST_MOVED = 1e-5, 10.0, 0.5


def find_layout(
    model: nn.Module,
    rows: Sequence[Sequence[int]],
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    *,
    whole: bool = False,
) -> Layout:
    """Call the base model on a text, and see what its head reads.

    Args:
        model: The model without its distributed wrapper.
        rows: Token ids of texts, one of two tokens at least.
        device: Where the model is.
        autocast: Makes the context in which training computes.
        whole: Only the model as a whole is called, since its weights are spread over processes.

    Raises:
        UnsupportedModelError: If the model cannot be called on text alone, sees the tokens that it is to predict, or
            has no state of each token that its head reads.
    """
    head: Any = head_of(model)
    ids = _trial(rows).to(device)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    watch = _Watch(model, head, ids)
    with as_base(model), autocast():
        with watch.watching():
            logits = _called(model, batch)
        module, state = watch.found()
        _require_causal(model, state)
        layout = Layout(module, module is head, watch.layers(), None)
        if not whole and _gives(head, state, logits) and _leaves_out(model, batch, layout):
            layout = layout._replace(head=head)
    return layout


def _trial(rows: Sequence[Sequence[int]]) -> Tensor:
    """Return one text three times, the second time with other tokens in its second half, [3, t]."""
    text = list(max(rows, key=len)[:TRIAL_TOKENS])
    known = sorted({token for row in rows for token in row})
    following = dict(zip(known, [*known[1:], known[0]], strict=True))
    kept = len(text) // 2
    changed = text[:kept] + [following[token] for token in text[kept:]]
    return torch.tensor([text, changed, text])


def _called(model: Any, batch: dict[str, Any]) -> Tensor:
    """Return the logits of a batch."""
    try:
        outputs = model(**batch)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a model raises that wants more than text
        found = f"{type(error).__name__}: {error}"
        what = "The model cannot be called on text alone, as replay does."
        raise _unsupported(model, what, "forward(input_ids, attention_mask, use_cache)", found) from error
    logits = getattr(outputs, "logits", None)
    if not isinstance(logits, Tensor) or logits.shape[:2] != batch["input_ids"].shape:
        found = f"{type(outputs).__name__} with {getattr(logits, 'shape', 'no logits')}"
        raise _unsupported(model, "The model gives no logits of each token.", "outputs.logits, [b, t, v]", found)
    return logits


class _Watch:
    """Sees which outputs of modules have a state for each token, and what the head reads."""

    def __init__(self, model: nn.Module, head: nn.Module, ids: Tensor) -> None:
        self._base = base_module(model)
        self._head = head
        self._shape = ids.shape
        self._last: deque[tuple[nn.Module, Tensor]] = deque(maxlen=REMEMBERED_OUTPUTS)
        self._finish: dict[nn.Module, int] = {}
        self._read: Tensor | None = None
        self._before: list[tuple[nn.Module, Tensor]] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch the forward pass inside the `with` block."""
        with ExitStack() as stack:
            for module in self._base.modules():
                stack.callback(module.register_forward_hook(self._finished).remove)
            stack.callback(self._head.register_forward_pre_hook(self._reads).remove)
            yield

    def found(self) -> tuple[nn.Module, Tensor]:
        """Return the last module before the head that gave what it reads, or else the head; and what it reads."""
        read = state_of(self._read, self._shape)
        if read is None:
            what = "The head of the model is not called on one state of each token."
            found = f"{type(self._read).__name__} {tuple(getattr(self._read, 'shape', ()))}"
            raise _unsupported(self._base, what, "a state [b, t, d] that the head reads", found)
        given = (module for module, output in reversed(self._before) if _same(output, read))
        return next(given, self._head), read

    def layers(self) -> list[nn.Module]:
        """Return the modules of the longest list that were called on each token; empty if there is none."""
        lists = [module for module in self._base.modules() if isinstance(module, nn.ModuleList)]
        # Some are skipped on text, such as the layers of Mllama that read images.
        called = [[module for module in modules if module in self._finish] for modules in lists]
        # Of lists side by side, as XLM has them, the one that finishes last gives the output of a layer.
        found = [(len(modules), self._finish[modules[-1]], place) for place, modules in enumerate(called) if modules]
        return called[max(found)[-1]] if found else []

    def _finished(self, module: nn.Module, inputs: Any, output: Any) -> None:
        state = state_of(output, self._shape)
        if state is not None:
            self._last.append((module, state))
            self._finish[module] = len(self._finish)

    def _reads(self, module: nn.Module, inputs: Any) -> None:
        if self._read is None:
            self._read, self._before = inputs[0], list(self._last)


def _same(output: Tensor, read: Tensor) -> bool:
    # By address first, since NaN is not equal to itself.
    alike = output.shape == read.shape and output.dtype == read.dtype
    return alike and (output.data_ptr() == read.data_ptr() or torch.equal(output, read))


def _gives(head: Any, state: Tensor, logits: Tensor) -> bool:
    """Return whether the logits are the output of the head unchanged: some models scale or cap them."""
    own = head(state)
    # Accelerate turns the logits to float32 under autocast.
    return own.shape == logits.shape and torch.equal(own.to(logits), logits)


def _leaves_out(model: Any, batch: dict[str, Any], layout: Layout) -> bool:
    """Return whether the model can leave out logits and still give the state of each token."""
    with StateReader(layout).reading(batch["input_ids"].shape) as reader:
        # OPT, BLOOM and others do not know the argument in transformers 4.
        try:
            model(**batch, logits_to_keep=1)
        except TypeError:
            return False
        # ModernBERT leaves the tokens out before the last module that its head reads from.
        return reader.has_state


def _require_causal(model: nn.Module, state: Tensor) -> None:
    """Refuse a model whose states of the first half of a text follow from the second."""
    kept = state.shape[1] // 2
    text, changed, again = state[:, :kept].float()
    size = text.square().mean().sqrt()
    noise = (again - text).square().mean(dim=-1).sqrt()
    moved = (changed - text).square().mean(dim=-1).sqrt() > LEAST_MOVE * size + NOISE_FACTOR * noise
    if moved.float().mean() > MOST_MOVED:
        raise UnsupportedModelError(
            "The model sees the tokens that follow: replay would train it to copy the token that it is to predict.",
            where=type(base_module(model)).__name__,
            expected="a causal model, whose state of a token does not depend on later tokens",
            found=f"{int(moved.sum())} of {kept} earlier states that move with later tokens",
            fix="Use a causal language model; an encoder such as BERT is one with config.is_decoder=True. Or set "
            'gere_config=GeReConfig(replay_strategy="none").',
        )


def _unsupported(model: nn.Module, what: str, expected: str, found: str | None) -> UnsupportedModelError:
    return UnsupportedModelError(
        what,
        where=type(base_module(model)).__name__,
        expected=expected,
        found=found,
        fix='Use a Hugging Face causal language model, or set gere_config=GeReConfig(replay_strategy="none").',
    )
