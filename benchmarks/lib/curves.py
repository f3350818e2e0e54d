"""Curves of task accuracy over general loss, the area under them, and tables of means over seeds."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.lib import timing

Run = Mapping[str, Any]


class Point(NamedTuple):
    """A setting, its seeds joined.

    Attributes:
        name: Strategy and weight.
        family: Strategy, with what its margin is divided by.
        weight: `w_strategy`.
        general: Mean held-out general loss.
        accuracy: Mean task accuracy.
        spread: Standard deviation of both over the seeds.
        task_loss: Mean task loss.
        seconds: Median seconds of the training.
        bytes: Size of the anchor.
        seeds: Number of seeds.
    """

    name: str
    family: str
    weight: str
    general: float
    accuracy: float
    spread: tuple[float, float]
    task_loss: float
    seconds: float
    bytes: int
    seeds: int


def points_of(runs: Iterable[Run], regime: str, insertion: bool) -> list[Point]:
    """Join the seeds of each setting, in the order in which settings come first; `none` belongs to both insertions."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        if run["regime"] == regime and (run["insertion"] == insertion or run["strategy"] == "none"):
            groups.setdefault(run["name"], []).append(run)
    return [_point(name, group) for name, group in groups.items()]


def _point(name: str, group: Sequence[Run]) -> Point:
    columns = {key: [run[key] for run in group] for key in ("general_loss", "accuracy", "task_loss", "seconds")}
    spread = [statistics.stdev(columns[key]) if len(group) > 1 else 0.0 for key in ("general_loss", "accuracy")]
    first = group[0]
    family = name if first["strategy"] in ("none", "ce") else name.rsplit(" ", 1)[0]
    return Point(
        name=name,
        family=family,
        weight=first["weight"],
        general=statistics.mean(columns["general_loss"]),
        accuracy=statistics.mean(columns["accuracy"]),
        spread=(spread[0], spread[1]),
        task_loss=statistics.mean(columns["task_loss"]),
        seconds=statistics.median(columns["seconds"]),
        bytes=first["bytes"],
        seeds=len(group),
    )


def best_accuracy(points: Sequence[Point], base: tuple[float, float], general: np.ndarray) -> np.ndarray:
    """Best accuracy that a curve gives for no more than some general losses.

    The untouched model is a point of every curve. Between its points a curve is straight, and beyond a point that is
    better in both nothing is gained.

    Args:
        points: Points of one strategy.
        base: General loss and accuracy of the untouched model.
        general: General losses, none below that of the base model.
    """
    reached = sorted({base, *((point.general, point.accuracy) for point in points)})
    front = [pair for i, pair in enumerate(reached) if all(pair[1] > other[1] for other in reached[:i])]
    losses, accuracies = zip(*front, strict=True)
    return np.interp(general, losses, accuracies)


def area(points: Sequence[Point], base: tuple[float, float], worst: float) -> float:
    """Mean of the best accuracy over general losses from that of the base model to `worst`."""
    general = np.linspace(base[0], worst, 2001)
    return float(best_accuracy(points, base, general).mean())


def is_number(weight: str) -> bool:
    """Tell whether a weight is a number that somebody set."""
    return weight not in ("dy", "auto")


def table(points: Sequence[Point], base: Mapping[str, float]) -> str:
    """Markdown table of all points."""
    rows = [
        ("base model", f"{base['accuracy']:.3f}", f"{base['task_loss']:.3f}", f"{base['general_loss']:.3f}", *[""] * 4)
    ]
    for p in points:
        accuracy, general = f"{p.accuracy:.3f}", f"{p.general:.3f}"
        if p.seeds > 1:
            accuracy, general = f"{accuracy} ± {p.spread[1]:.3f}", f"{general} ± {p.spread[0]:.3f}"
        lost, size = f"{p.general - base['general_loss']:+.3f}", f"{p.bytes / 1000:.0f}"
        rows.append((p.name, accuracy, f"{p.task_loss:.3f}", general, lost, f"{p.seconds:.0f}", size, str(p.seeds)))
    head = (
        "strategy, weight",
        "task accuracy",
        "task loss",
        "general loss",
        "forgetting",
        "seconds",
        "anchor, kB",
        "seeds",
    )
    return timing.table(head, rows)


def summary(points: Sequence[Point], base: Mapping[str, float]) -> str:
    """Markdown: the area of each strategy over its numbers, and where `auto` and `dy` lie against the best of them."""
    start = base["general_loss"], base["accuracy"]
    fitted = [point.general for point in points if point.family == "ce"]
    worst = fitted[0] if fitted else max(point.general for point in points)
    numbers = [point for point in points if is_number(point.weight) and point.family != "none"]
    areas = []
    for family in dict.fromkeys(point.family for point in numbers):
        own = [point for point in numbers if point.family == family]
        weights = "-" if family == "ce" else ", ".join(point.weight for point in own)
        areas.append((family, weights, f"{area(own, start, worst):.4f}"))
    free = []
    for p in (point for point in points if not is_number(point.weight)):
        best = float(best_accuracy(numbers, start, np.array([max(p.general, start[0])]))[0])
        free.append((p.name, f"{p.general:.3f}", f"{p.accuracy:.4f}", f"{best:.4f}", f"{p.accuracy - best:+.4f}"))
    head = ("without a number", "general loss", "accuracy", "best of all curves there", "difference")
    return timing.table(("strategy", "weights", "area"), areas) + "\n" + timing.table(head, free)


def plot(points: Sequence[Point], base: Mapping[str, float], title: str, path: Path) -> None:
    """Draw the curves as SVG: fixed weights joined in their order, weights without a number as stars."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "gere"
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7.2, 4.6), layout="constrained")
    for number, family in enumerate(dict.fromkeys(point.family for point in points if point.family != "none")):
        own = [point for point in points if point.family == family]
        fixed = sorted((p for p in own if is_number(p.weight)), key=lambda p: float(p.weight))
        colour = f"C{number}"
        axes.plot([p.general for p in fixed], [p.accuracy for p in fixed], "o-", color=colour, label=family, ms=4)
        for point in own:
            label = point.weight if family != "ce" else ""
            axes.annotate(
                label, (point.general, point.accuracy), fontsize=7, xytext=(3, 3), textcoords="offset points"
            )
            if not is_number(point.weight):
                axes.plot(point.general, point.accuracy, "*", color=colour, ms=11)
    untouched = f"{base['general_loss']:.3f} and {base['accuracy']:.3f} before"
    axes.set(xlabel=f"held-out general loss (nats; {untouched})", ylabel="task accuracy", title=title)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
