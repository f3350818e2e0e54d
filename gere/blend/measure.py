"""Walk a model along the line from base to tuned weights, and measure it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gere.blend.choice import Point
from gere.blend.match import names_elsewhere
from gere.blend.pairs import Line
from gere.errors import BlendError
from gere.evaluation.examples import Example, example_losses
from gere.evaluation.general import change_of, text_losses


class Measured(NamedTuple):
    """What a line is measured on; empty for what is not.

    Attributes:
        texts: General texts that nobody trained on, as `text_losses` takes them.
        examples: Rows of the task.
        max_length: Tokens of a text or row that are read.
    """

    texts: Sequence[Any]
    examples: Sequence[Example]
    max_length: int


class Walk:
    """Measures shares of a line, each once.

    Args:
        line: The line.
        model: The tuned model in memory; its weights are overwritten.
        tokenizer: Its tokenizer.
        measured: What to measure on.

    Raises:
        BlendError: If tensors of the line are not in the model, or the losses at share 0 are not finite.
    """

    def __init__(self, line: Line, model: nn.Module, tokenizer: Any, measured: Measured) -> None:
        self._line, self._model, self._tokenizer, self._measured = line, model, tokenizer, measured
        self._points: dict[float, Point] = {}
        self._base: list[float] = []
        # The base first: every change is against it.
        self.at(0.0)

    def at(self, share: float) -> Point:
        """Measure a share."""
        if share not in self._points:
            set_share(self._model, self._line, share)
            self._points[share] = self._point(share)
        return self._points[share]

    def _point(self, share: float) -> Point:
        texts, examples, length = self._measured
        general, task = None, None
        if texts:
            losses = text_losses(self._model, self._tokenizer, texts, max_length=length)
            self._base = self._base or losses
            general = change_of(losses, self._base)
        if examples:
            found = example_losses(self._model, self._tokenizer, examples, max_length=length)
            task = math.fsum(found) / len(found)
        point = Point(share, general, task)
        if share == 0:
            require_finite(point)
        return point


def require_finite(point: Point) -> None:
    """Refuse a point with losses that are not finite."""
    losses = {"task": point.task_loss, "general": point.general.loss if point.general else None}
    bad = {name: loss for name, loss in losses.items() if loss is not None and not math.isfinite(loss)}
    if bad:
        raise BlendError(
            "A loss is not finite.",
            where=f"share {point.share:g}" + (", the base model" if point.share == 0 else ""),
            expected="a finite loss",
            found=", ".join(f"{name} loss {loss}" for name, loss in bad.items()),
            fix="Check the model and the texts, or measure with --dtype float32.",
        )


@torch.no_grad()
def set_share(model: nn.Module, line: Line, share: float) -> None:
    """Set the weights of a model to a share of the line, one tensor at a time.

    Args:
        model: The tuned model, or the base model with the tuned adapter on it.
        line: The line.
        share: From 0 to 1.

    Raises:
        BlendError: If the model has other tensors than the files.
    """
    if line.tuned.is_adapter:
        from peft import set_peft_model_state_dict

        set_peft_model_state_dict(model, {pair.name: line.at(pair, share) for pair in line.pairs})
        return
    tensors = model.state_dict(keep_vars=True)
    targets = {pair.name: _target(tensors, pair.name) for pair in line.pairs}
    covered = {tensor.data_ptr() for tensor in targets.values() if tensor is not None}
    lacking = [name for name, tensor in targets.items() if tensor is None]
    lacking += [name for name, tensor in model.named_parameters() if tensor.data_ptr() not in covered]
    if lacking:
        raise BlendError(
            "The model in memory has other tensors than its files, so that it cannot walk along the line.",
            where=line.tuned.name,
            expected="the same names",
            found=f"{', '.join(lacking[:3])}, on one side only",
            fix="Form single points with --share, and measure those.",
        )
    for pair in line.pairs:
        targets[pair.name].copy_(line.at(pair, share))  # type: ignore[union-attr]


def _target(tensors: Mapping[str, Tensor], name: str) -> Tensor | None:
    firsts = {other.split(".")[0] for other in tensors}
    return next((tensors[other] for other in names_elsewhere(name, firsts) if other in tensors), None)
