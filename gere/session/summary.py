"""What is said of a replay: a line at the start of a training, an answer at its end, and facts at any time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gere.cache import Anchor
from gere.evaluation.general import CHANGE, INTERVAL, LOSS
from gere.session.plan import ReplayPlan, ReplaySettings
from gere.session.session import ReplaySession

# Nats a token, about a tenth of the perplexity. What is lost beyond that is called forgotten.
KEPT = 0.1
GENERAL, ERROR = "general/", "_se"
Log = Mapping[str, Any]


class StepPlan(NamedTuple):
    """How a training goes.

    Attributes:
        rows: Rows of an optimizer step that the trainer collects, over all ranks and accumulation steps.
        replay: Replay rows of a step; 0 for no batch insertion.
        added: Whether replay rows come on top of those rows.
        steps: Optimizer steps of the training.
        plain_steps: Optimizer steps that the plain trainer would take.
    """

    rows: int
    replay: int
    added: bool
    steps: int
    plain_steps: int


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
    """

    active: bool
    folder: Path
    rows_per_step: int
    texts: int | None
    heldout: int | None
    anchor: Anchor | None
    weight: float | None
    history: Sequence[Log]

    def summary(self) -> str:
        """Say what the task gained and what was forgotten, as the end of a training does."""
        parts = [_task_sentence(self.history), _general_sentence(self.history, self.heldout or 0)]
        return "\n".join([" ".join(filter(None, parts)), *_abilities(self.history)])


def facts_of(
    settings: ReplaySettings,
    rows_per_step: int,
    plan: ReplayPlan | None,
    session: ReplaySession | None,
    history: Sequence[Log],
) -> ReplayFacts:
    """Put together what is known so far."""
    facts = ReplayFacts(settings.active, settings.folder, rows_per_step, None, None, None, None, history)
    if plan is not None:
        facts = facts._replace(texts=len(plan.replay.rows), heldout=len(plan.replay.heldout))
    if session is not None:
        facts = facts._replace(anchor=session.anchor, weight=session.weight.level)
    return facts


def opening(session: ReplaySession, plan: StepPlan) -> str:
    """Say what a training begins with."""
    replay = session.plan.replay
    done = "built" if session.built else "opened"
    line = f"gere: anchor {session.anchor.key} {done} in {session.anchor.folder.parent}; "
    line += f"{len(replay.rows)} texts are replayed, {len(replay.heldout)} are held out; {_rows(plan)}; "
    line += f"{plan.steps} steps"
    if plan.steps != plan.plain_steps:
        line += f" ({plan.plain_steps} without replay)"
    return line + "."


def append_to_card(card: Path, facts: ReplayFacts) -> None:
    """Add to a model card what was kept and how."""
    text = f"\n## General ability\n\nTrained with replay of general texts, by gere.\n\n{facts.summary()}\n"
    with card.open("a", encoding="utf-8") as lines:
        lines.write(text)


def _rows(plan: StepPlan) -> str:
    if not plan.replay:
        return "the replayed texts are shuffled into each epoch"
    if plan.added:
        return f"{plan.replay} replay rows are added to the {plan.rows} rows of each step"
    share = 100 * plan.replay / plan.rows
    return f"{plan.replay} of {plan.rows} rows in each step are replay rows ({share:.3g} %)"


def _ends(history: Sequence[Log], name: str) -> tuple[float, float] | None:
    """First and last value of a key of the log; `None` if it is not there."""
    values = [log[name] for log in history if name in log]
    return (values[0], values[-1]) if values else None


def _task_sentence(history: Sequence[Log]) -> str:
    ends = _ends(history, "gere/task_loss")
    if ends is None:
        return ""
    return f"Task loss {ends[0]:.3f} -> {ends[1]:.3f}."


def _general_sentence(history: Sequence[Log], texts: int) -> str:
    measured = [log for log in history if CHANGE in log]
    if not measured:
        return (
            "What was forgotten is not known, since no texts were held out: set gere_config.heldout_dataset, or give "
            "10 texts or more to replay."
        )
    loss, change = measured[-1][LOSS], measured[-1][CHANGE]
    size = f"{change:+.3f}"
    if INTERVAL in measured[-1]:
        size += f" ± {measured[-1][INTERVAL]:.3f}"
    on = f"{texts} texts" if texts else "texts"
    found = f"general loss {loss - change:.3f} -> {loss:.3f}, {size} nats on {on} that were never replayed."
    if change <= KEPT:
        return f"Kept: {found}"
    tries = "Try a lower learning rate, fewer epochs, or more replay rows in each step (num_interpolate_per_batch)."
    return f"Forgot: {found} {tries}"


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
