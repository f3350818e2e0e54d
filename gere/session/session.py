"""What one training holds from its first event on: the anchor, the objective, and the sums for the log."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from gere.cache import Anchor
from gere.cache.base_model import BaseModel
from gere.losses.objective import ReplayObjective
from gere.losses.strategy import Strategy, Tensors
from gere.losses.weighting import RowWeight, make_weight
from gere.model.batching import pad_rows, to_device
from gere.model.forward import see
from gere.model.states import StateReader
from gere.replay.batch import RowCounts
from gere.session.anchor import ReadyModel, find_anchor
from gere.session.checkpoint import WEIGHT_FILE, read_weight
from gere.session.finite import FiniteLosses
from gere.session.heldout import HeldOut
from gere.session.meters import Meters
from gere.session.plan import ReplayPlan
from gere.session.step import MicroStep, StepShare


@dataclass(frozen=True)
class ReplaySession:
    """Replay of one training.

    Attributes:
        plan: Settings and replay set.
        anchor: The anchor.
        built: Whether it was built for this training.
        tuned: Whether the model had been trained before.
        heldout: Measures what is left of general ability; `None` if there are no held-out texts.
        strategy: What is kept of the base model, and how far a row is from that.
        base: The base model, which gives the targets of a live strategy.
        weight: Weight of the distance.
        objective: Loss of replay rows.
        model: The model without its distributed wrapper.
        reader: Reads its states.
        device: Where it is.
        every_rank_calls: Whether each rank has to call the wrapped model for each batch of replay rows, dummy rows
            included: with ZeRO and FSDP2. With DDP one call of the wrapper in each micro-step is enough.
        meters: Sums for the log.
        finite: Looks whether the losses are finite.
    """

    plan: ReplayPlan
    anchor: Anchor
    built: bool
    tuned: bool
    heldout: HeldOut | None
    strategy: Strategy
    base: BaseModel
    weight: RowWeight
    objective: ReplayObjective
    model: nn.Module
    reader: StateReader
    device: torch.device
    every_rank_calls: bool
    meters: Meters
    finite: FiniteLosses

    def micro_step(self, rows: RowCounts, replay: Sequence[int]) -> MicroStep:
        """What this rank runs in a micro-step: its replay rows, or a dummy row where other ranks wait for its call."""
        waits = rows.all_replay and (self.every_rank_calls or not rows.all_task)
        if waits and not replay:
            return MicroStep([int(self.plan.lengths.argmin())], rows)
        return MicroStep(replay, rows)

    def task_part(self, loss: Tensor, rows: int, share: StepShare) -> Tensor:
        """Weigh the parent's loss of a micro-batch; a dummy row (`rows` is 0) counts nothing."""
        if not rows:
            # All labels of a dummy row are -100, for which a mean over tokens is NaN.
            return torch.nan_to_num(loss, 0.0, 0.0, 0.0) * 0.0
        self.finite.see(loss)
        self.meters.add_task(loss * share.logged_factor(rows))
        return loss * share.task_factor(rows)

    def replay_part(self, model: nn.Module, step: MicroStep, share: StepShare) -> Tensor:
        """Weighed sum of the losses of the replay rows of a micro-step; dummy rows count nothing.

        Args:
            model: The wrapped model, as the trainer calls it.
            step: The micro-step, with at least one replay row.
            share: How the parts of the step add up.
        """
        batch = {name: to_device(part, self.device) for name, part in self._tokens(step.replay).items()}
        # DDP waits for one call of its wrapper in each backward pass. Where the parent calls it on task rows, replay
        # rows go through the model inside: their gradients meet those of the task rows before they are exchanged.
        called = self.model
        if self.every_rank_calls or not step.rows.all_task:
            called = model
        seen = see(called, self.reader, batch["input_ids"], batch["attention_mask"])
        base_ce = to_device(self.anchor.base_ce[list(step.replay)], self.device)
        loss, sums = self.objective(seen, base_ce, self._targets(step.replay, seen.ids, seen.mask))
        if not step.rows.replay:
            return loss * 0.0
        self.finite.see(loss, step.replay)
        self.meters.add_replay(sums)
        self.weight.observe(sums.unrelated, sums.calibrated)
        return loss * share.replay_factor

    def _tokens(self, rows: Sequence[int]) -> Tensors:
        return pad_rows([self.plan.replay.rows[row] for row in rows], self.plan.replay.pad_id)

    def _targets(self, rows: Sequence[int], ids: Tensor, mask: Tensor) -> Tensors:
        """What the strategy holds these rows to, [b, t, *]: from the anchor, or from the base model of today."""
        if not self.strategy.measures:
            return {}
        if self.strategy.live:
            return self.base.targets(ids, mask)
        stored = [self.anchor.targets(row) for row in rows]
        padded = {name: pad_sequence([row[name] for row in stored], batch_first=True) for name in stored[0]}
        return {name: to_device(values, self.device) for name, values in padded.items()}


def begin_session(
    plan: ReplayPlan,
    model: ReadyModel,
    *,
    checkpoint: Path | None,
    previous: ReplaySession | None,
    every_rank_calls: bool,
    progress: bool,
    claim: Callable[[str], None],
) -> ReplaySession:
    """Open or build the anchor, and put together what a training needs.

    Args:
        plan: Settings and replay set.
        model: The model that is about to be trained.
        checkpoint: The checkpoint that training resumes from.
        previous: Session of an earlier `train()` of this very model, whose weights have moved since. Its anchor and
            its weight are used again.
        every_rank_calls: As in `ReplaySession`.
        progress: Show a progress bar.
        claim: As in `find_anchor`.

    Raises:
        ConfigError: If a setting does not fit the model.
        CacheError: If the anchor is missing, damaged, or belongs to something else.
    """
    settings = plan.settings
    if previous is None:
        found = find_anchor(settings, model, plan.replay, checkpoint=checkpoint, progress=progress, claim=claim)
        anchor, strategy, base, built, tuned = found
        weight = make_weight(settings.w_strategy, strategy)
        if checkpoint is not None:
            weight.load_state_dict(read_weight(checkpoint), checkpoint / WEIGHT_FILE)
    else:
        anchor, strategy, base, weight = previous.anchor, previous.strategy, previous.base, previous.weight
        built, tuned = False, True
        claim(anchor.key)
    heldout = None
    if plan.replay.heldout:
        heldout = HeldOut(plan.replay, anchor.heldout_ce, model, settings.config.anchor_batch_tokens)
    distance_name = ""
    if strategy.measures:
        distance_name = settings.config.replay_strategy
    constants = {name: values.to(model.device) for name, values in anchor.constants.items()}
    return ReplaySession(
        plan=plan,
        anchor=anchor,
        built=built,
        tuned=tuned,
        heldout=heldout,
        strategy=strategy,
        base=base,
        weight=weight,
        objective=ReplayObjective(strategy, constants, weight),
        model=model.inner,
        reader=StateReader(model.inner, strategy.layers),
        device=model.device,
        every_rank_calls=every_rank_calls,
        meters=Meters(distance_name, model.device, resumed=checkpoint is not None),
        finite=FiniteLosses(model.inner),
    )
