"""What the model is called on in training: the rows of each call, by optimizer step, and the gradient of a step."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from transformers import TrainerCallback

Row = tuple[int, ...]


class Call(NamedTuple):
    """One call of the decoder with gradients."""

    rows: list[Row]
    padded: int


class Watch(TrainerCallback):
    """Notes the calls of a trainer's model that train it, by optimizer step.

    A call of the anchor, of an evaluation or of a generation has no gradients and is not noted.
    """

    def __init__(self, trainer: Any, texts: list[str], max_length: int = 48) -> None:
        self.steps: list[list[Call]] = []
        self._now: list[Call] = []
        tokenizer = trainer.processing_class
        self.replay_set = {tuple(tokenizer(text)["input_ids"][:max_length]) for text in texts}
        model = trainer.model
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        inner.get_decoder().register_forward_pre_hook(self._called, with_kwargs=True)
        trainer.add_callback(self)

    def _called(self, module: Any, args: Any, kwargs: Any) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        if not torch.is_grad_enabled() or ids is None:
            return
        mask = kwargs.get("attention_mask")
        mask = torch.ones_like(ids) if mask is None or mask.dim() != 2 else mask
        rows = [tuple(row[real.bool()].tolist()) for row, real in zip(ids, mask, strict=True)]
        self._now.append(Call(rows, ids.numel()))

    def on_step_end(self, args, state, control, **kwargs):
        self.steps.append(self._now)
        self._now = []

    def rows(self, step: int) -> list[Row]:
        return [row for call in self.steps[step] for row in call.rows]

    def replay(self, step: int) -> list[Row]:
        return [row for row in self.rows(step) if row in self.replay_set]

    def task(self, step: int) -> list[Row]:
        return [row for row in self.rows(step) if row not in self.replay_set]

    @property
    def counts(self) -> list[tuple[int, int]]:
        """Task rows and replay rows of each step."""
        return [(len(self.task(step)), len(self.replay(step))) for step in range(len(self.steps))]


class Gradient(TrainerCallback):
    """Keeps the gradient of the last step, before the optimizer moves."""

    def __init__(self, trainer: Any) -> None:
        self.value = torch.zeros(0)
        trainer.add_callback(self)

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.value = torch.cat([p.grad.flatten().clone() for p in model.parameters() if p.grad is not None])


def train_logs(trainer: Any) -> list[dict]:
    return [log for log in trainer.state.log_history if "loss" in log]
