"""The pictures of a report: inline SVG by matplotlib in the colours of the page.

If matplotlib is not installed, a `MissingPackageError` is raised as soon as there is something to draw.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from gere.errors import MissingPackageError
from gere.metrics import Interval, interval
from gere.report.figures import LOSS, Group, ability, figures, untouched
from gere.report.runs import GENERAL, Run

Place = tuple[float, float]
Measure = Callable[[Mapping[str, float]], float]

# Larger values overflow where an axis adds its margins.
LARGEST = 1e300
MOST_POINTS, MARKED = 400, 25
LOGARITHMIC_FROM = 1e3
UNITS = {"general/loss": "nats a token", "gere/task_loss": "nats a token", "gere/ce": "nats a token"}
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
SIZE = (6.1, 3.9)  # inches, of 72 units of the SVG each


class Picture(NamedTuple):
    """A picture, empty if there is nothing to draw, under a title that no other picture has, above a note.

    No text of a run is in the SVG: the page takes it unescaped.
    """

    title: str
    svg: str
    note: str = ""


def curves(prefix: str, runs: Sequence[Run], labels: Sequence[str], colours: Mapping[str, int]) -> list[Picture]:
    """Draw the curves of all runs for each key of the logs with this prefix, the general loss first."""
    keys = {key for run in runs for key in run.curves if key.startswith(prefix)}
    ordered = sorted(keys, key=lambda key: (key != GENERAL + LOSS, key))
    return [_curve(key, runs, labels, colours) for key in ordered]


def _curve(key: str, runs: Sequence[Run], labels: Sequence[str], colours: Mapping[str, int]) -> Picture:
    lines, left = [], []
    for run, label in zip(runs, labels, strict=True):
        found = sorted(run.curves.get(key, {}).items())
        points = [(x, y) for x, y in found if abs(y) < LARGEST]
        if points:
            lines.append((colours[run.name], _thinned(points)))
        if len(points) < len(found):
            left.append(f"{label} ({len(found) - len(points)})")
    title, svg, note = f"{key} over optimizer steps", "", ""
    if lines:
        # Dotted lines where tasks end say nothing if the runs differ in that.
        ends = {tuple(run.ends) for run in runs}
        marks = ends.pop() if len(ends) == 1 else ()
        svg = _svg(title, partial(_draw_lines, lines=lines, marks=marks, unit=UNITS.get(key, "")))
    if left:
        note = f"Values that are not finite are left out: {', '.join(left)}."
    return Picture(title, svg, note)


def _thinned(points: Sequence[Place]) -> list[Place]:
    """Average as many neighbours as leave no more than `MOST_POINTS` points."""
    size = math.ceil(len(points) / MOST_POINTS)
    thinned = []
    for start in range(0, len(points), size):
        xs, ys = zip(*points[start : start + size], strict=True)
        thinned.append((sum(xs) / len(xs), sum(ys) / len(ys)))
    return thinned


def _draw_lines(axes: Any, lines: Sequence[tuple[int, Sequence[Place]]], marks: Sequence[float], unit: str) -> None:
    heights = [y for _, points in lines for _, y in points]
    if min(heights) > 0 and max(heights) / min(heights) > LOGARITHMIC_FROM:
        axes.set_yscale("log")
        axes.minorticks_off()
    for number, points in lines:
        # Past the last colour, colours start again with dashes, as in the legend of the page.
        dashes = "--" if number // len(COLOURS) % 2 else "-"
        marker = "o" if len(points) <= MARKED else ""
        colour = COLOURS[number % len(COLOURS)]
        axes.plot(*zip(*points, strict=True), color=colour, linestyle=dashes, marker=marker, markersize=4)
    low, high = axes.get_xlim()
    for mark in marks:
        if low < mark < high:
            axes.axvline(mark, color=FAINT, linestyle=":", linewidth=1)
    axes.locator_params(axis="x", integer=True, nbins=6)
    axes.xaxis.set_major_formatter("{x:,.6g}")
    axes.set(xlabel="optimizer steps", ylabel=unit)


def trade_offs(groups: Sequence[Group], colours: Mapping[str, int]) -> Iterator[Picture]:
    """Draw AP over general accuracy and over general loss, as far as runs at their end have them."""
    for about, x_name, measure in (
        ("general accuracy", "general accuracy (right is better)", ability),
        ("general loss", "general loss, nats a token (left is better)", _loss),
    ):
        found = {}
        for held in groups:
            before, after = _places(held, measure)
            if after:
                found[colours[held.name]] = (before, after)
        if found:
            title = f"AP over {about}"
            yield Picture(title, _svg(title, partial(_draw_trade_off, found=found, x_name=x_name)))


def _loss(values: Mapping[str, float]) -> float:
    return values.get(LOSS, math.nan)


def _places(held: Group, measure: Measure) -> tuple[list[Place], list[Place]]:
    """Place the models of a name before training, each once, and after it; the latter only if all runs have values."""
    after = [(measure(run.general_now), figures(run)["AP"]) for run in held.runs]
    before = dict.fromkeys((measure(run.general_before), untouched(run)["AP"]) for run in held.runs)
    if not all(map(_drawable, after)):
        after = []
    return list(filter(_drawable, before)), after


def _drawable(place: Place) -> bool:
    return all(abs(value) < LARGEST for value in place)


def _draw_trade_off(axes: Any, found: Mapping[int, tuple[list[Place], list[Place]]], x_name: str) -> None:
    means = [[interval(values) for values in zip(*after, strict=True)] for _, after in found.values()]
    for (number, (before, after)), (x, y) in zip(found.items(), means, strict=True):
        colour = COLOURS[number % len(COLOURS)]
        for at in before:
            axes.plot(*at, "o", color=colour, markerfacecolor="none", markeredgewidth=1.5)
        # A single run is its own mean, without an interval. Bars lie below all points, means above them.
        if len(after) > 1:
            for at in after:
                axes.plot(*at, "o", color=colour, alpha=0.5)
            axes.errorbar(x.mean, y.mean, y.half, x.half, fmt="none", color=colour, capsize=4, zorder=1.9)
        axes.plot(x.mean, y.mean, "o", color=colour, markeredgecolor=BACK, markersize=11, zorder=3)
    every = [place for before, after in found.values() for place in (*before, *after)]
    axes.set_xlim(*_limits([across for across, _ in every], [x for x, _ in means]))
    axes.set_ylim(*_limits([up for _, up in every], [y for _, y in means]))
    axes.set(xlabel=x_name, ylabel="AP (up is better)")


def _limits(values: Sequence[float], means: Sequence[Interval]) -> Place:
    """Compute both ends of an axis; a bar that would leave the points less than a third of it is cut at its edge."""
    low, high = min(values), max(values)
    room = high - low or math.inf  # points in one place take any bar
    first, last = low, high
    for mean in means:
        if math.isfinite(mean.half):
            first = min(first, max(mean.mean - mean.half, low - room))
            last = max(last, min(mean.mean + mean.half, high + room))
    margin = 0.05 * (last - first) or 0.1 * abs(last) or 1.0
    return first - margin, last + margin


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
