"""What a run with replay holds between the trainer's events: settings, replay set, anchor, sums for the log."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gere.anchoring import (
    AnchorWish,
    ReadyModel,
    base_model,
    find_anchor,
    loaded_key,
    read_key,
    target_of,
    texts_of_anchor,
    write_key,
)
from gere.cache import Anchor, Live
from gere.cache.plan import shortest_row
from gere.collator import MixedCollator, RowCounts
from gere.config import GeReConfig, parse_replay_per_batch, parse_weight, require
from gere.distances import make_distance
from gere.errors import ReplaySetError
from gere.meters import Meters
from gere.objective import ReplayObjective, StepShare
from gere.passes import ReplayPass
from gere.ranks import ALONE, Ranks
from gere.replay import ReplaySet, load_replay_set
from gere.sampler import added_rows
from gere.states import StateReader
from gere.weight_file import read_weight, write_weight
from gere.weights import RowWeight, make_weight
from gere.writing import anchored_texts, base_texts

logger = logging.getLogger("gere")


class ReplayRun:
    """Replay of one trainer.

    Args:
        saving_dir: Cache folder.
        reuse: Open an anchor that is there.
        replay_per_batch: Replay rows in each optimizer step, 0 or `None` for no batch insertion.
        w_strategy: Weight of the distance.
        config: All other settings.

    Attributes:
        active: Whether there is replay at all.
        adding: Whether replay rows are added to the user's batches, and do not replace rows in them.
        anchor: The anchor, from the first training step on.
        checkpoint: The checkpoint that training resumes from.
        share: Rows of the optimizer step at hand.
        meters: Sums for the log.
    """

    def __init__(
        self,
        saving_dir: str | Path,
        reuse: bool,
        replay_per_batch: int | None,
        w_strategy: float | str,
        config: GeReConfig | None,
    ) -> None:
        require(isinstance(saving_dir, (str, Path)), "gere_hidden_state_saving_dir", "a path", saving_dir)
        require(isinstance(reuse, bool), "reuse_gere_hidden_state", "True or False", reuse)
        require(isinstance(config, GeReConfig | None), "gere_config", "GeReConfig(...)", config)
        self.folder = Path(saving_dir)
        self.reuse = reuse
        self.replay_per_batch = parse_replay_per_batch(replay_per_batch)
        self.w_strategy = parse_weight(w_strategy)
        self.config = config or GeReConfig()
        self.active = self.config.replay_strategy != "none"
        self.adding = False
        self.anchor: Anchor | None = None
        self.checkpoint: Path | None = None
        self.share = StepShare(1, 0, 1, None)
        self.meters = Meters()
        self._weight: RowWeight | None = None
        self._replay_set: ReplaySet | None = None
        self._lengths: np.ndarray | None = None
        self._collator: MixedCollator | None = None
        self._objective: ReplayObjective | None = None
        self._pass: ReplayPass | None = None

    def replay_set(
        self, tokenizer: Any, ranks: Ranks = ALONE, model: nn.Module | None = None, *, progress: bool = False
    ) -> ReplaySet:
        """The replay set, read once, the same on every rank.

        Args:
            tokenizer: The user's tokenizer.
            ranks: The processes of the run; each must call this.
            model: The model without its distributed wrapper, which may be the source of the texts.
            progress: Show a progress bar.
        """
        if self._replay_set is None:
            own = None
            if self.config.samples_itself and model is not None:
                own = self._own_texts(model, tokenizer, ranks, progress)
            load = lambda: load_replay_set(self.config, tokenizer, self.folder, own)  # noqa: E731
            self._replay_set = ranks.first_here_first(load)
            fields = ranks.gather(self._replay_set.fields)
            ranks.together(lambda: _require_same_texts(fields))
        return self._replay_set

    def _own_texts(self, model: nn.Module, tokenizer: Any, ranks: Ranks, progress: bool) -> list[str]:
        """Texts of the base model: sampled while the model is its own base, later those of the anchor alone."""
        digest = texts_of_anchor(self._wish, model, ranks, resumed=self.checkpoint is not None)
        if digest is not None:
            return anchored_texts(digest, self.config, self.folder, ranks)
        return base_texts(model, tokenizer, self.config, self.folder, reuse=self.reuse, ranks=ranks, progress=progress)

    @property
    def replay_lengths(self) -> np.ndarray:
        """Tokens of each replay row, int64 [rows], by which the rows of a step are chosen; the set must be there."""
        if self._replay_set is None:
            raise RuntimeError("lengths are asked before the replay set is read")
        if self._lengths is None:
            self._lengths = np.array([len(row) for row in self._replay_set.rows])
        return self._lengths

    @property
    def _wish(self) -> AnchorWish:
        return AnchorWish(self.folder, self.reuse, self.config, self.checkpoint)

    def collator(self, task_collator: Any, tokenizer: Any, spare: Callable[[], Any] | None = None) -> MixedCollator:
        """Collator of mixed batches; it knows the anchor as soon as that is open."""
        replay = self.replay_set(tokenizer)
        self._collator = MixedCollator(task_collator, replay.rows, replay.pad_id, spare)
        self._collator.anchor = self.anchor
        return self._collator

    def add_from_now_on(self, why: str, *, tell: bool) -> None:
        """Add replay rows to the user's batches.

        Args:
            why: The reason.
            tell: Say so in the log of this process, once.
        """
        if tell and not self.adding:
            what = "Each optimizer step gets %d replay rows beside its task rows, and none is replaced, since %s."
            logger.warning(what, self.replay_per_batch, why)
        self.adding = True

    def add_rows(
        self, samples: Sequence[Any], *, step: int, seed: int, rows: int, accumulation: int, ranks: Ranks
    ) -> list[dict[str, Any]]:
        """Add the replay rows of an optimizer step to its micro-batches.

        Args:
            samples: Micro-batches of this rank.
            step: Optimizer steps before this one.
            seed: Seed of the order of replay rows.
            rows: Task rows of a micro-batch, as the trainer was told.
            accumulation: Micro-batches of a whole step; the last one of an epoch may be shorter.
            ranks: The processes of the run.
        """
        if self._collator is None:
            raise RuntimeError("replay rows are added before get_train_dataloader")
        plan = added_rows(
            len(self._collator.rows),
            -(-self.replay_per_batch * len(samples) // max(accumulation, len(samples))),
            seed=seed,
            start=step * self.replay_per_batch,
            micro_steps=len(samples),
            micro_batch_size=rows,
            world_size=ranks.count,
            lengths=self.replay_lengths,
            rows_per_step=self.replay_per_batch,
        )
        batches = []
        for sample, shares in zip(samples, plan, strict=True):
            own = shares[ranks.index]
            counts = RowCounts(rows, len(own), rows * ranks.count, sum(map(len, shares)))
            batches.append(self._collator.add(dict(sample), counts, own))
        return batches

    def layers_of(self, model: nn.Module) -> tuple[int, ...]:
        """Layers of the model whose states are held."""
        return target_of(self.config, model).layers

    def prepare(self, model: ReadyModel, tokenizer: Any, *, resumed: bool, progress: bool) -> None:
        """Open or build the anchor.

        A second `train()` of the same model keeps the anchor of the first, since the weights have moved.

        Args:
            model: The model that is about to be trained.
            tokenizer: The user's tokenizer.
            resumed: Whether the weights come from a checkpoint.
            progress: Show a progress bar.

        Raises:
            CacheError: If the anchor is missing, damaged, or belongs to something else.
        """
        replay = self.replay_set(tokenizer)
        if self.anchor is None or resumed or model.fresh:
            self.anchor = find_anchor(self._wish, model, replay, resumed=resumed, progress=progress)
            self._weight = None
        target = target_of(self.config, model.inner)
        distance = make_distance(self.config, self.w_strategy, self.anchor)
        if self._weight is None:
            self._weight = make_weight(self.w_strategy, distance)
            self._weight.load_state_dict(read_weight(self.checkpoint) if resumed else {})
        self.meters = Meters("" if self.config.replay_strategy == "ce" else self.config.replay_strategy)
        base = base_model(self.config, model, replay)
        self._objective = ReplayObjective(self._weight, distance, base.targets if isinstance(target, Live) else None)
        row = replay.rows[shortest_row(replay.rows)]
        head = model.ranks.together(lambda: base.head(row)) if model.joins else None
        if not all(model.ranks.gather(head is not None)):
            head = None
        self._pass = ReplayPass(model.inner, StateReader(model.inner, target.layers), head, model.autocast)
        if self._collator is not None:
            self._collator.anchor = self.anchor
            self._collator.spares_replay = not self._pass.joins

    def begin_step(self, rows: Sequence[RowCounts], ranks: int, divisor: int | None, own_mean: bool) -> None:
        """Note the rows of the optimizer step that follows.

        Args:
            rows: Rows of each micro-step.
            ranks: Number of ranks.
            divisor: As in `StepShare`.
            own_mean: Whether the parent's losses add up to a mean over the rows of this rank alone.
        """
        own, _, task_rows, replay_rows = (sum(counts) for counts in zip(*rows, strict=True))
        own_share = own * ranks / task_rows if own_mean and task_rows else 1.0
        self.share = StepShare(task_rows, replay_rows, ranks, divisor, own_share)
        if task_rows:
            self.meters.step()

    def task_part(self, loss: Tensor, rows: int) -> Tensor:
        """Weigh the parent's loss of a micro-batch; a spare row (`rows` is 0) counts nothing."""
        if not rows:
            return torch.nan_to_num(loss, 0.0, 0.0, 0.0) * 0.0  # a spare row may have nothing to learn
        self.meters.add({"task_loss": loss * self.share.logged_factor(rows)})
        return loss * self.share.task_factor(rows)

    def along(self, batch: Mapping[str, Tensor] | None) -> AbstractContextManager[None]:
        """Let the replay part of a micro-batch go along in the parent's call of the model, if it can."""
        return self._pass.along(batch) if self._pass is not None else nullcontext()

    def replay_part(self, model: nn.Module, batch: Mapping[str, Tensor], rows: int) -> Tensor:
        """Weighed sum of the replay losses of a micro-batch; a spare row (`rows` is 0) counts nothing."""
        if self._objective is None or self._pass is None:
            raise RuntimeError("a replay batch came before on_train_begin")
        loss, sums = self._objective(self._pass(model, batch), batch)
        if not rows:
            return loss * 0.0
        self.meters.add(sums)
        self._objective.weight.observe(sums)
        return loss * self.share.replay_factor

    def end_step(self, join: Callable[[Tensor], Tensor]) -> None:
        """Note the end of an optimizer step, on every rank; `join` is the mean of a vector over them."""
        if self._weight is not None:
            self._weight.end_step(self.share.replay_rows, join)

    def save_weight(self, folder: Path) -> None:
        """Write the state of the weight beside a saved model, if it has one."""
        state = self._weight.state_dict() if self._weight is not None else {}
        if state:
            write_weight(folder, state)

    def name_anchor(self, folder: Path, model: Any) -> None:
        """Write the key of the anchor beside a saved model; training without replay hands on what it was given."""
        key = self.anchor.key if self.anchor is not None else read_key(self.checkpoint) or loaded_key(model)
        if key is not None:
            write_key(folder, key)


def _require_same_texts(fields: Sequence[Mapping[str, str]]) -> None:
    """Refuse a replay set that differs between machines, whose files need not be the same."""
    for rank, other in enumerate(fields):
        names = [name for name in other if other[name] != fields[0].get(name)]
        if names:
            raise ReplaySetError(
                "The processes do not have the same replay set.",
                where=f"{', '.join(names)} of gere_config.replay_dataset",
                expected="the same texts and the same tokenizer on every machine",
                found=f"others on rank {rank} than on rank 0",
                fix="Copy the file of rank 0 to the other machines.",
            )
