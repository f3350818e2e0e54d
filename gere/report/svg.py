"""Plots as inline SVG: lines over steps, and points. Colours come from the page's style, by class."""

from __future__ import annotations

import html
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from gere.report.axes import Axis, axis_of

WIDTH, HEIGHT = 440, 280
LEFT, RIGHT, TOP, BOTTOM = 66, 12, 10, 42
COLOURS = 8
MOST_POINTS = 400
MARKED = 25


class Line(NamedTuple):
    """A curve, or a single point.

    Attributes:
        label: What it shows, seen when it is pointed at.
        group: Number of its colour.
        points: Finite x and y, in the order of x.
    """

    label: str
    group: int
    points: Sequence[tuple[float, float]]


class Point(NamedTuple):
    """A point of a plot of points.

    Attributes:
        label: What it shows, seen when it is pointed at.
        group: Number of its colour.
        x: Place across, finite.
        y: Place up, finite.
        kind: `run` (small), `mean` (large) or `before` (hollow).
        half: Half the length of its bar across, and of that up; NaN for none.
    """

    label: str
    group: int
    x: float
    y: float
    kind: str
    half: tuple[float, float] = (math.nan, math.nan)


def line_plot(title: str, x_name: str, y_name: str, lines: Sequence[Line], marks: Sequence[float] = ()) -> str:
    """Curves over a common axis.

    Args:
        title: Read out in place of the picture.
        x_name: What lies across, with its unit.
        y_name: What lies up, with its unit.
        lines: At least one point in all.
        marks: Places across at which a thin line is drawn.
    """
    thin = [line._replace(points=thinned(line.points)) for line in lines if line.points]
    places = [point for line in thin for point in line.points]
    x, y = axis_of([place[0] for place in places]), axis_of([place[1] for place in places], wide=True)
    parts = [
        f'<path class="mark" d="M{_x(x, mark)} {TOP}V{HEIGHT - BOTTOM}"/>' for mark in marks if x.low < mark < x.high
    ]
    for line in thin:
        parts += _curve(line, x, y)
    return _frame(title, x_name, y_name, x, y, parts)


def point_plot(title: str, x_name: str, y_name: str, points: Sequence[Point]) -> str:
    """Points over two axes; bars are drawn first and means last, which so are on top.

    The points keep a third of the plot at least. A bar that is longer is cut at the edge and has no cap there.

    Args:
        title: Read out in place of the picture.
        x_name: What lies across, with its unit.
        y_name: What lies up, with its unit.
        points: At least one.
    """
    x = axis_of(reach([point.x for point in points], [point.half[0] for point in points]))
    y = axis_of(reach([point.y for point in points], [point.half[1] for point in points]))
    parts = [bar for point in points for bar in _bars(point, x, y)]
    for point in sorted(points, key=lambda point: point.kind == "mean"):
        name, radius = _class(point.group), 6 if point.kind == "mean" else 4
        place = f'cx="{_x(x, point.x)}" cy="{_y(y, point.y)}" r="{radius}"'
        parts.append(f'<circle class="{name} {point.kind}" {place}>{_title(point.label)}</circle>')
    return _frame(title, x_name, y_name, x, y, parts)


def reach(values: Sequence[float], halves: Sequence[float]) -> list[float]:
    """Values and the ends of their bars, as far as these lie no farther beyond all values than those lie apart.

    Args:
        values: Finite numbers, at least one.
        halves: Half the length of the bar of each, NaN for none.
    """
    low, high = min(values), max(values)
    room = high - low or math.inf
    ends = [value + way * half for value, half in zip(values, halves, strict=True) for way in (-1, 1)]
    return [*values, *(min(max(end, low - room), high + room) for end in ends if math.isfinite(end))]


def _bars(point: Point, x: Axis, y: Axis) -> Iterator[str]:
    """A bar across and one up, each with a cap at both ends, as far as they lie in the plot."""
    across, up = _x(x, point.x), _y(y, point.y)
    for value, half, axis, flat in ((point.x, point.half[0], x, True), (point.y, point.half[1], y, False)):
        if not math.isfinite(half):
            continue
        ends = [min(max(end, axis.low), axis.high) for end in (value - half, value + half)]
        places = [_x(axis, end) if flat else _y(axis, end) for end in ends]
        path = f"M{places[0]} {up}H{places[1]}" if flat else f"M{across} {places[0]}V{places[1]}"
        for end, place in zip(ends, places, strict=True):
            cap = f"M{place} {up}m0 -4v8" if flat else f"M{across} {place}m-4 0h8"
            path += cap if axis.low < end < axis.high else ""
        yield f'<path class="{_class(point.group)} bar" d="{path}"/>'


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Means of as many neighbours as leave no more than `MOST_POINTS` points."""
    size = math.ceil(len(points) / MOST_POINTS)
    parts = [points[start : start + size] for start in range(0, len(points), max(size, 1))]
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts]


def _curve(line: Line, x: Axis, y: Axis) -> Iterator[str]:
    name, places = _class(line.group), [(_x(x, across), _y(y, up)) for across, up in line.points]
    path = "L".join(f"{across} {up}" for across, up in places)
    yield f'<g class="{name}">{_title(line.label)}<path class="line" d="M{path}"/>'
    if len(places) <= MARKED:
        yield from (f'<circle class="dot" cx="{across}" cy="{up}" r="2.5"/>' for across, up in places)
    yield "</g>"


def _frame(title: str, x_name: str, y_name: str, x: Axis, y: Axis, parts: Sequence[str]) -> str:
    """A plot with its axes, its ticks and their names."""
    grid = [f'<path class="grid" d="M{LEFT} {_y(y, tick)}H{WIDTH - RIGHT}"/>' for tick in y.ticks()]
    texts = [_text(_x(x, tick), HEIGHT - BOTTOM + 16, f"{tick:,.6g}", "middle") for tick in x.ticks()]
    texts += [_text(LEFT - 6, f"{float(_y(y, tick)) + 4:.1f}", f"{tick:.6g}", "end") for tick in y.ticks()]
    texts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, x_name, "middle"))
    middle = (TOP + HEIGHT - BOTTOM) / 2
    texts.append(_text(0, 0, y_name, "middle", {"transform": f"translate(12 {middle:g}) rotate(-90)"}))
    axes = f'<path class="axis" d="M{LEFT} {TOP}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}"/>'
    body = "".join([*grid, axes, *texts, *parts])
    return f'<svg role="img" viewBox="0 0 {WIDTH} {HEIGHT}">{_title(title)}{body}</svg>'


def _text(x: object, y: object, text: str, anchor: str, more: Mapping[str, str] | None = None) -> str:
    extra = "".join(f' {key}="{value}"' for key, value in (more or {}).items())
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}"{extra}>{html.escape(text)}</text>'


def _title(text: str) -> str:
    return f"<title>{html.escape(text)}</title>"


def _class(group: int) -> str:
    """Colour, and past the last colour dashes too."""
    return f"c{group % COLOURS}" + (" dashed" if group // COLOURS % 2 else "")


def _x(axis: Axis, value: float) -> str:
    return f"{LEFT + axis.place(value) * (WIDTH - LEFT - RIGHT):.1f}"


def _y(axis: Axis, value: float) -> str:
    return f"{HEIGHT - BOTTOM - axis.place(value) * (HEIGHT - TOP - BOTTOM):.1f}"
