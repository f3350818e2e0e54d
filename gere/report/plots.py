"""The pictures of a report: inline SVG by matplotlib in the colours of the page.

If matplotlib is not installed, a `MissingPackageError` is raised as soon as there is something to draw.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import math
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

from gere.errors import MissingPackageError
from gere.metrics import interval
from gere.report.figures import Group, figures, untouched
from gere.report.runs import GENERAL, INTERVAL

Place = tuple[float, float]

# Larger values overflow where an axis adds its margins.
LARGEST = 1e300
MOST_POINTS, MARKED = 400, 25
LOGARITHMIC_FROM = 1e3
NATS = "nats a token"
# What a curve shows, and its unit.
CURVES = {
    "general/loss": ("Loss on held-out general texts. Lower is better.", NATS),
    "general/change": ("Held-out loss minus that of the base model. Above 0, general ability was lost.", NATS),
    "gere/task_loss": ("Loss of the task rows, as the plain trainer would log it.", NATS),
    "gere/ce": ("Cross-entropy of the replayed texts.", NATS),
    "gere/replay_change": (
        "Cross-entropy of the replayed texts minus that of the base model. They are trained on, so it looks too good.",
        NATS,
    ),
    "gere/tm": ("Mean distance of the states of replayed texts from their region in the base model. 0 is inside.", ""),
    "gere/kl": ("Mean divergence of the predictions on replayed texts from those of the base model.", NATS),
    "gere/l1": ("Mean absolute distance of the states of replayed texts from those of the base model.", ""),
    "gere/l2": ("Mean squared distance of the states of replayed texts from those of the base model.", ""),
    "gere/violations": ("Share of the state elements of replayed texts outside their region.", ""),
    "gere/weight": ("Mean weight of the distance in the loss, over the rows that have a distance.", ""),
    "gere/capped": ("Share of the rows with a distance whose weight is at its cap. Near 1, the model drifts far.", ""),
    "gere/unrelated": ("Mean distance to unrelated text, by which the weight is calibrated.", ""),
}
GENERAL_SET = ("Accuracy on this general task, or a measure of your own.", "")
# Each of these stands for a variable of style.css, which has the colours of light and of dark mode.
COLOURS = tuple(f"#00000{index}" for index in range(1, 9))
FAINT, RULE, BACK = "#000011", "#000012", "#000013"
VARIABLES = {FAINT: "faint", RULE: "rule", BACK: "back"} | {name: f"c{index}" for index, name in enumerate(COLOURS)}
SETTINGS = {
    **dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "text.color", "xtick.color", "ytick.color"), FAINT),
    **dict.fromkeys(("axes.facecolor", "figure.facecolor", "savefig.facecolor"), "none"),
    **dict.fromkeys(("axes.spines.right", "axes.spines.top"), False),
    **{"axes.axisbelow": True, "axes.grid": True, "axes.grid.axis": "y", "grid.color": RULE},
    **{"font.sans-serif": ["DejaVu Sans"], "font.size": 11, "svg.fonttype": "none", "svg.hashsalt": "gere"},
}
# A group has a colour, and for eyes and printers without colour a marker and dashes, in units of the line's width. The
# outline of each marker is for the legend of the page.
MARKERS = {
    "o": "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0Z",
    "s": "M-3.5-3.5h7v7h-7Z",
    "^": "M0-5L4.5 3.5h-9Z",
    "D": "M0-5L5 0L0 5L-5 0Z",
}
DASHES = ((), (5, 2), (1.2, 1.5), (7, 2, 1.2, 2))
SIZE = (5.6, 3.7)  # inches, of 72 units of the SVG each


class Style(NamedTuple):
    """How a group is drawn, apart from the first 16 others even without colour."""

    colour: int
    marker: str
    dashes: tuple[float, ...]


class Picture(NamedTuple):
    """A picture, empty if there is nothing to draw, under a title that no other picture has, above its notes.

    No text of a run is in the SVG: the page takes it unescaped.
    """

    title: str
    svg: str
    notes: Sequence[str] = ()


def style_of(number: int) -> Style:
    """Choose the style of a group."""
    markers = list(MARKERS)
    turn = number // len(markers)
    return Style(number % len(COLOURS), markers[number % len(markers)], DASHES[(number + turn) % len(DASHES)])


def curves(prefix: str, groups: Sequence[Group]) -> list[Picture]:
    """Draw the curves of all runs for each key of the logs with this prefix, the known ones first."""
    keys = {key for held in groups for run in held.runs for key in run.curves if key.startswith(prefix)}
    known = [key for key in CURVES if key in keys]
    ordered = known + sorted(keys - {*known, GENERAL + INTERVAL})
    return [_curve(key, groups) for key in ordered]


def _curve(key: str, groups: Sequence[Group]) -> Picture:
    lines, left, ends = [], [], set()
    for number, held in enumerate(groups):
        for run in held.runs:
            ends.add(tuple(run.ends))
            found = sorted(run.curves.get(key, {}).items())
            points = [(x, y) for x, y in found if abs(y) < LARGEST]
            if points:
                lines.append((style_of(number), _thinned(points)))
            if len(points) < len(found):
                left.append(f"{run.label} ({len(found) - len(points)})")
    meaning, unit = CURVES.get(key, GENERAL_SET if key.startswith(GENERAL) else ("", ""))
    title, svg, notes = f"{key} over optimizer steps", "", [meaning]
    if lines:
        # Dotted lines where tasks end say nothing if the runs differ in that.
        marks = ends.pop() if len(ends) == 1 else ()
        svg = _svg(title, partial(_draw_lines, lines=lines, marks=marks, unit=unit))
    if left:
        notes.append(f"Values that are not finite are left out: {', '.join(left)}.")
    return Picture(title, svg, notes)


def _thinned(points: Sequence[Place]) -> list[Place]:
    """Average as many neighbours as leave no more than `MOST_POINTS` points."""
    size = math.ceil(len(points) / MOST_POINTS)
    thinned = []
    for start in range(0, len(points), size):
        xs, ys = zip(*points[start : start + size], strict=True)
        thinned.append((sum(xs) / len(xs), sum(ys) / len(ys)))
    return thinned


def _draw_lines(axes: Any, lines: Sequence[tuple[Style, Sequence[Place]]], marks: Sequence[float], unit: str) -> None:
    heights = [y for _, points in lines for _, y in points]
    if min(heights) > 0 and max(heights) / min(heights) > LOGARITHMIC_FROM:
        axes.set_yscale("log")
        axes.minorticks_off()
    for style, points in lines:
        # Of a long curve only a few points are marked, so that its dashes stay visible.
        every = max(1, len(points) // MARKED * 3)
        axes.plot(
            *zip(*points, strict=True),
            color=COLOURS[style.colour],
            linestyle=(0, style.dashes or None),
            marker=style.marker,
            markersize=4.5,
            markevery=every,
        )
    low, high = axes.get_xlim()
    for mark in marks:
        if low < mark < high:
            axes.axvline(mark, color=FAINT, linestyle=":", linewidth=1)
    axes.locator_params(axis="x", integer=True, nbins=6)
    axes.xaxis.set_major_formatter("{x:,.6g}")
    axes.set(xlabel="optimizer steps", ylabel=unit)


def trade_offs(groups: Sequence[Group]) -> Iterator[Picture]:
    """Draw AP over general accuracy and over general loss, as far as runs at their end have them."""
    for about, x_name in (
        ("general accuracy", "general accuracy (right is better)"),
        ("general loss", "general loss, nats a token (left is better)"),
    ):
        found = []
        for number, held in enumerate(groups):
            after = [(row[about], row["AP"]) for row in map(figures, held.done)]
            before = dict.fromkeys((row[about], row["AP"]) for row in map(untouched, held.done))
            # A mean over some of the seeds would stand beside means over all of them.
            if after and all(map(_drawable, after)):
                found.append((style_of(number), list(filter(_drawable, before)), after))
        if found:
            title = f"AP over {about}"
            yield Picture(title, _svg(title, partial(_draw_trade_off, found=found, x_name=x_name)))


def _drawable(place: Place) -> bool:
    return all(abs(value) < LARGEST for value in place)


def _draw_trade_off(axes: Any, found: Sequence[tuple[Style, list[Place], list[Place]]], x_name: str) -> None:
    for style, before, after in found:
        look = {"color": COLOURS[style.colour], "marker": style.marker, "linestyle": "none"}
        for place in before:
            axes.plot(*place, **look, markerfacecolor="none", markeredgewidth=1.5)
        axes.plot(*zip(*after, strict=True), **look, alpha=0.5)
    # The axes fit the points. A bar that is much longer is cut at the edge of the plot.
    axes.margins(0.2)
    axes.set(xlim=axes.get_xlim(), ylim=axes.get_ylim())
    for style, _, after in found:
        x, y = map(interval, zip(*after, strict=True))
        colour = COLOURS[style.colour]
        # A single run is its own mean, without an interval. Bars lie below all points, means above them.
        if len(after) > 1:
            axes.errorbar(x.mean, y.mean, y.half, x.half, fmt="none", color=colour, capsize=4, zorder=1.9)
        axes.plot(x.mean, y.mean, style.marker, color=colour, markeredgecolor=BACK, markersize=11, zorder=3)
    axes.set(xlabel=x_name, ylabel="AP (up is better)")


def _svg(title: str, draw: Callable[[Any], None]) -> str:
    """Return inline SVG of the axes that `draw` fills."""
    matplotlib, style, figures = map(_module, ("matplotlib", "matplotlib.style", "matplotlib.figure"))
    # The default style first: what a user has set for matplotlib would change the bytes of the page.
    with style.context("default"), matplotlib.rc_context(SETTINGS):
        # `pyplot` would keep the figure, and choose a backend for the whole process.
        figure = figures.Figure(figsize=SIZE, layout="constrained")
        draw(figure.add_subplot())
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = stream.getvalue()
    # Every SVG has the same ids, and all of them stand in one page: a clip path would be that of another picture.
    own = hashlib.sha256(title.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>p{own}-", svg[svg.index("<svg") :].strip())
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, f"var(--{variable})")
    return svg


def _module(name: str) -> Any:
    """Import a module of matplotlib, which takes a while and is not needed for a page without pictures."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingPackageError(
            "The report has a picture to draw, and the package for it cannot be imported.",
            where="gere.report",
            expected="package matplotlib, 3.8 or later",
            found=error,
            fix='pip install "gere[report]"',
        ) from error
