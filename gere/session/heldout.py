"""Held-out texts: what the model still makes of texts that are never replayed, against the base model."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from gere.cache.base_model import BaseModel
from gere.cache.plan import LOSSES_ONLY
from gere.evaluation.general import GeneralChange, change_of, row_values
from gere.model.batching import batches_by_length
from gere.model.forward import as_trained
from gere.model.states import Layout
from gere.replay import ReplaySet
from gere.session.anchor import ReadyModel, worth_tokens


class HeldOut:
    """Measures the model in training on the held-out rows; the anchor has the losses of the base model.

    Args:
        replay: The replay set with its held-out rows, at least one.
        base_ce: Losses of the base model on them, float32 [h].
        model: The model as the trainer prepared it.
        layout: Where its states come out.
        batch_tokens: `gere_config.anchor_batch_tokens`. Batches are those of the build, so that an untouched model
            gives the very losses of the base model.
    """

    def __init__(
        self, replay: ReplaySet, base_ce: Tensor, model: ReadyModel, layout: Layout, batch_tokens: int
    ) -> None:
        self._rows = replay.heldout
        self._base_ce = base_ce.double().tolist()
        self._batches = list(batches_by_length(replay.heldout, worth_tokens(batch_tokens, model)))
        self._ranks = model.ranks
        self._model = BaseModel(
            model.inner,
            replay.pad_id,
            model.device,
            LOSSES_ONLY,
            layout,
            model.autocast,
            shown=as_trained,
        )
        self._measured: dict[int, GeneralChange] = {}

    def measure(self) -> GeneralChange:
        """Measure the model as it is now; each process must call this, does its share, and gets the same result."""
        self._measured.clear()  # by now the weights may be others
        return change_of(row_values(self._losses, self._rows, self._batches, self._ranks), self._base_ce)

    def measure_once(self, step: int) -> GeneralChange:
        """Measure once after an optimizer step, for all evaluation sets of it."""
        if step not in self._measured:
            self._measured = {step: self.measure()}
        return self._measured[step]

    def _losses(self, rows: Sequence[Sequence[int]]) -> list[float]:
        return self._model(rows).ce.float().double().tolist()
