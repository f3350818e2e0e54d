"""After training: the point on the line between base and tuned weights that fits the budget."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from gere._log import logger
from gere.blend import BaseDecay, BaseWeights, TrainedWeights, go_to, grid, largest_within
from gere.config import DECAY, GeReConfig
from gere.errors import ConfigError, UnsupportedModelError
from gere.evaluation.general import GeneralChange
from gere.session.checkpoint import read_decay

SHARES = grid(11)
SHARE, NOT_MOVED = "gere/share", "gere/not_moved"


class Decay(NamedTuple):
    """Base decay of a training: c, and why `"auto"` is 0 if it is."""

    c: float
    why_off: str


def decay_of(config: GeReConfig, model: nn.Module, *, tuned: bool, spread: bool, checkpoint: Path | None) -> Decay:
    """Decide the base decay of a training with replay.

    Args:
        config: The settings.
        model: The model without its distributed wrapper, before the first step.
        tuned: Whether it has been trained since it was the base model.
        spread: Whether a process holds only a part of the weights.
        checkpoint: The checkpoint that training resumes from; it goes on as it began.
    """
    if not isinstance(config.base_decay, str):
        return Decay(config.base_decay, "")
    if spread:
        return Decay(0.0, "the weights are spread over the processes")
    if checkpoint is not None:
        return Decay(read_decay(checkpoint), "")
    try:
        trained = TrainedWeights(model, lambda: BaseWeights({}))
    except UnsupportedModelError:
        return Decay(0.0, "the adapter is not LoRA")
    if tuned or not trained.adapter_is_new:
        return Decay(0.0, "what this model learned in earlier trainings would fade, too")
    return Decay(DECAY, "")


class TrainedLine(NamedTuple):
    """What one training holds of the line.

    Attributes:
        trained: The trained weights and their base.
        decay: Pulls towards the base while training goes on.
    """

    trained: TrainedWeights
    decay: BaseDecay


def chooses(config: GeReConfig) -> bool:
    """Return whether a point of the line is chosen after training."""
    return config.forgetting_budget is not None or config.blend is not None


def require_measures(config: GeReConfig, *, heldout: bool, evaluation: bool) -> None:
    """Refuse a choice that nothing decides.

    Args:
        config: The settings.
        heldout: Whether there are two held-out texts or more, so that there is an interval.
        evaluation: Whether there is an `eval_dataset`.

    Raises:
        ConfigError: If a budget has no held-out texts, or the best point no evaluation.
    """
    problems = (
        (config.forgetting_budget is not None and not heldout, "forgetting_budget", "two held-out texts or more",
         "Give 20 texts or more to replay, or heldout_dataset; it does not work with replay_strategy \"none\"."),
        (config.blend is not None and not evaluation, "blend", "an eval_dataset of the trainer",
         "Pass eval_dataset, or set forgetting_budget alone."),
    )  # fmt: skip
    for wrong, name, expected, fix in problems:
        if wrong:
            raise ConfigError(
                "A point of the line between base and tuned weights is to be chosen, and nothing decides it.",
                where=f"gere_config.{name}",
                expected=expected,
                found="none",
                fix=fix,
            )


def move_back(
    trained: TrainedWeights,
    budget: float | None,
    measure: Callable[[], GeneralChange],
    evaluate: Callable[[], float] | None,
) -> float:
    """Move the weights back towards their base, as little as is needed.

    Args:
        trained: The trained weights, at their tuned end.
        budget: Largest general change, with its interval; `None` for any.
        measure: Measures the general change of the weights as they are.
        evaluate: Gives the evaluation loss of the weights as they are. Of the points within the budget, the one with
            the least is taken. `None` takes the farthest.

    Returns:
        The share a of base + a (tuned - base) that the weights are at now.
    """
    tuned = trained.copies()

    def at(share: float) -> GeneralChange:
        go_to(trained, tuned, share)
        return measure()

    share = 1.0
    if budget is not None:
        share, _ = largest_within(at, budget, SHARES)
    if evaluate is not None:
        losses = {}
        for place in [share, *(other for other in SHARES if other < share)]:
            go_to(trained, tuned, place)
            losses[place] = evaluate()
        finite = [(loss, place) for place, loss in losses.items() if math.isfinite(loss)]
        if finite:
            share = min(finite)[1]
        else:
            logger.warning("No evaluation loss is finite, so that the best point of the line is not known.")
    go_to(trained, tuned, share)
    return share


def evaluation_loss(trainer: Any) -> float:
    """Evaluation loss of a trainer's model as it is: the mean over its evaluation sets; nothing is logged."""
    names: list[Any] = [None]
    if isinstance(trainer.eval_dataset, dict):
        names = [*trainer.eval_dataset]
    losses = []
    for name in names:
        loader = trainer.get_eval_dataloader(name)
        metrics = trainer.evaluation_loop(loader, "Line", prediction_loss_only=True).metrics
        losses.append(metrics.get("eval_loss", math.nan))
    # TRL collects metrics for the next log of an evaluation, which this is not.
    getattr(trainer, "_metrics", {}).get("eval", {}).clear()
    return sum(losses) / len(losses)
