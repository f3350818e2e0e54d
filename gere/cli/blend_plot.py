"""The picture of a line from base to tuned weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gere.blend.choice import Point
from gere.cli.settings import output_errors
from gere.errors import MissingPackageError


def draw(points: Sequence[Point], chosen: float | None, path: Path) -> None:
    """Draw general change and task loss over shares; a dotted line at the chosen one."""
    shares = [point.share for point in points]
    curves: list[tuple[str, list[float], list[float] | None]] = []
    if points[0].general is not None:
        changes = [point.general for point in points if point.general is not None]
        curves.append(("general change (nats)", [one.change for one in changes], [one.interval for one in changes]))
    if points[0].task_loss is not None:
        losses = [point.task_loss for point in points if point.task_loss is not None]
        curves.append(("task loss (nats)", losses, None))
    figure = figure_class()(figsize=(5.6, 2.8 * len(curves)), layout="constrained")
    for axes, (label, values, bars) in zip(figure.subplots(len(curves), squeeze=False)[:, 0], curves, strict=True):
        axes.errorbar(shares, values, bars, marker="o", markersize=4, capsize=3)
        axes.set(xlabel="share of the way from base (0) to tuned (1)", ylabel=label)
        axes.grid(axis="y", alpha=0.3)
        if chosen is not None:
            axes.axvline(chosen, linestyle=":", color="black")
    with output_errors(path, "The plot", "--plot"):
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)


def figure_class() -> Any:
    """Import what draws a figure, without a window; a `MissingPackageError` if it is not there."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingPackageError(
            "The line is to be drawn, and the package for it cannot be imported.",
            where="--plot",
            expected="package matplotlib, 3.8 or later",
            found=error,
            fix='pip install "gere[report]"',
        ) from error
    return Figure
