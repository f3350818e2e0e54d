"""What is said of a replay: a line at the start of a training, an answer at its end, and facts at any time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from gere.cache import Anchor
from gere.config import DECAY
from gere.evaluation.general import CHANGE, INTERVAL, LOSS
from gere.session.line import NOT_MOVED, SHARE, Decay
from gere.session.plan import ReplayPlan, ReplaySettings
from gere.session.session import ReplaySession

# Nats, about a tenth of the perplexity. What is lost beyond that is called forgotten.
KEPT = 0.1
GENERAL, ERROR = "general/", "_se"
DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
Log = Mapping[str, Any]


class StepPlan(NamedTuple):
    """How a training goes.

    Attributes:
        rows: Rows of an optimizer step that the trainer collects, over all ranks and accumulation steps.
        replay: Replay rows of a step; 0 for no batch insertion.
        added: Whether replay rows come on top of those rows.
        steps: Optimizer steps of the training.
        plain_steps: Optimizer steps that the plain trainer would take.
        decay: Base decay.
    """

    rows: int
    replay: int
    added: bool
    steps: int
    plain_steps: int
    decay: Decay


class ReplayFacts(NamedTuple):
    """What is known of the replay of a trainer.

    Attributes:
        active: Whether there is replay.
        folder: Cache folder.
        rows_per_step: Replay rows in each optimizer step over all ranks; 0 for no batch insertion.
        texts: Texts of the replay set; `None` until the first data loader is made.
        heldout: Texts that are measured and never replayed; `None` until the first data loader is made.
        anchor: The anchor, with its `key` and `folder`; `None` until training begins.
        weight: Weight of the distance before its cap; `None` until training begins, and where each row has its own.
        history: Log of the training so far.
        advice: What to change if the training forgot.
    """

    active: bool
    folder: Path
    rows_per_step: int
    texts: int | None
    heldout: int | None
    anchor: Anchor | None
    weight: float | None
    history: Sequence[Log]
    advice: str

    def summary(self) -> str:
        """Say what the task gained and what was forgotten, as the end of a training does."""
        sentences = [
            _task_sentence(self.history),
            _share_sentence(self.history),
            _general_sentence(self.history, self.heldout, self.advice) if self.active else "",
        ]
        return "\n".join([" ".join(filter(None, sentences)), *_abilities(self.history)])


def facts_of(
    settings: ReplaySettings,
    rows_per_step: int,
    plan: ReplayPlan | None,
    session: ReplaySession | None,
    history: Sequence[Log],
    advice: str,
) -> ReplayFacts:
    """Put together what is known so far."""
    facts = ReplayFacts(settings.active, settings.folder, rows_per_step, None, None, None, None, history, advice)
    if plan is not None:
        facts = facts._replace(texts=len(plan.replay.rows), heldout=len(plan.replay.heldout))
    if session is not None:
        facts = facts._replace(anchor=session.anchor, weight=session.weight.level)
    return facts


def opening(session: ReplaySession, plan: StepPlan) -> str:
    """Say what a training begins with."""
    replay, replay_strategy = session.plan.replay, session.plan.settings.config.replay_strategy
    done = "built" if session.built else "opened"
    parts = [
        f"gere: anchor {session.anchor.key} {done} in {session.anchor.folder.parent}",
        f"{_rows(plan)}, from {len(replay.rows)} texts",
        f"{len(replay.heldout)} texts are held out",
    ]
    if plan.decay.c:
        parts.append(f"base decay {plan.decay.c:g}")
    elif plan.decay.why_off:
        parts.append(f"no base decay, since {plan.decay.why_off}")
    steps = f"{plan.steps} steps"
    if plan.steps != plan.plain_steps:
        steps += f" ({plan.plain_steps} without replay)"
    lines = ["; ".join([*parts, steps]) + "."]
    dropout = _dropout(session.model)
    if dropout and session.strategy.measures:
        values = ", ".join(f"{value:g}" for value in dropout)
        lines.append(f"gere: gere/{replay_strategy} starts above 0, since dropout {values} is active.")
    return "\n".join(lines)


def _dropout(model: nn.Module) -> list[float]:
    """Return the shares that the model drops while it is trained, each once, ascending."""
    found: set[float] = set()
    for name, module in model.named_modules():
        # A new adapter adds nothing, whatever it drops.
        if "lora_" in name:
            continue
        if isinstance(module, DROPOUT):
            found.add(float(module.p))
        found |= {value for field, value in vars(module).items() if "dropout" in field and isinstance(value, float)}
    return sorted(found - {0.0})


def append_to_card(card: Path, facts: ReplayFacts) -> None:
    """Add to a model card what was kept and how."""
    text = f"\n## General ability\n\nTrained with replay of general texts, by gere.\n\n{facts.summary()}\n"
    with card.open("a", encoding="utf-8") as lines:
        lines.write(text)


def _rows(plan: StepPlan) -> str:
    if not plan.replay:
        return "replay rows are shuffled into each epoch"
    are = "is a replay row" if plan.replay == 1 else "are replay rows"
    if plan.added:
        return f"{plan.replay} beside the {plan.rows} rows of each step {are}"
    return f"{plan.replay} of {plan.rows} rows in each step {are} ({100 * plan.replay / plan.rows:.3g} %)"


def advice_of(trainer: Any, replay: int, rows: int, decay: Decay) -> str:
    """Say what to change in a training that forgot, by its own numbers.

    Args:
        trainer: The trainer.
        replay: Replay rows of a step.
        rows: Rows of a step.
        decay: Base decay of the training.
    """
    tries = [f"a lower learning_rate than {trainer.args.learning_rate:g}"]
    if not decay.c and not decay.why_off:
        tries.insert(0, f"gere_config.base_decay={DECAY}")
    if trainer.state.epoch and trainer.state.epoch > 1:
        tries.append(f"fewer than {trainer.state.epoch:.2g} epochs")
    if 2 * replay < rows:
        tries.append(f"more replay rows than {replay} of {rows} (num_interpolate_per_batch)")
    return f"Try {', or '.join(tries)}."


def _ends(history: Sequence[Log], name: str) -> tuple[float, float] | None:
    """First and last value of a key of the log; `None` if it is not there."""
    values = [log[name] for log in history if name in log]
    return (values[0], values[-1]) if values else None


def _task_sentence(history: Sequence[Log]) -> str:
    ends = _ends(history, "gere/task_loss")
    if ends is None:
        return ""
    # The first value of the log is a mean over `logging_steps` steps, in which much is learned.
    first = _ends(history, "gere/first_task_loss") or ends
    return f"Task loss {first[0]:.3f} in the first step, {ends[1]:.3f} at the end."


def _share_sentence(history: Sequence[Log]) -> str:
    if any(NOT_MOVED in log for log in history):
        command = "gere blend OUTPUT_DIR --base BASE --texts FILE --budget NUMBER --out FOLDER"
        return f"The weights were not moved back, since no process has all of them. This can: `{command}`."
    shares = _ends(history, SHARE)
    if shares is None:
        return ""
    if shares[1] == 1:
        return "The weights were not moved back."
    return f"The weights were moved back to {shares[1]:.2f} of the way from the base model."


def _general_sentence(history: Sequence[Log], texts: int | None, advice: str) -> str:
    measured = [log for log in history if CHANGE in log]
    if not measured and texts:
        return "What was forgotten has not been measured yet."
    if not measured:
        return (
            "What was forgotten is not known, since no texts were held out: set gere_config.heldout_dataset, or give "
            "10 texts or more to replay."
        )
    loss, change = measured[-1][LOSS], measured[-1][CHANGE]
    if not math.isfinite(change):
        return f"Broken: the general loss is {loss}. The model gives no finite numbers any more."
    half = measured[-1].get(INTERVAL, math.nan)
    low, high = change - half, change + half
    on = f"{texts} texts" if texts else "texts"
    found = f"general loss {loss - change:.3f} -> {loss:.3f}, {change:+.3f} nats"
    if math.isnan(half):
        low = high = change
    else:
        found += f" (95 % interval {low:+.3f} to {high:+.3f})"
    found += f" on {on} that were never replayed."
    if high <= KEPT:
        return f"Kept: {found}"
    if low > 0 and change > KEPT:
        return f"Forgot: {found} {advice}"
    return f"Unclear: {found} More held-out texts (gere_config.replay_heldout) make the interval smaller."


def _abilities(history: Sequence[Log]) -> list[str]:
    """Lines of a table: each ability before and after."""
    logged = dict.fromkeys(name for log in history for name in log)
    names = [name for name in logged if name.startswith(GENERAL) and f"{name}{ERROR}" in logged]
    lines = []
    for name in names:
        before, after = _ends(history, name)  # type: ignore[misc]  # it is there
        error = _ends(history, f"{name}{ERROR}")[1]  # type: ignore[index]
        lines.append(f"  {name.removeprefix(GENERAL):<20} {before:.3f} -> {after:.3f} ± {error:.3f}")
    if lines:
        lines.insert(0, f"  {'ability':<20} before -> after, standard error")
    return lines
