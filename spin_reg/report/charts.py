"""Drawings of curves over the iterates, of training, and the small ones inside tables: values in, SVG out."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from spin_reg.report.ink import Ink
from spin_reg.report.svg import Attributes, Scale, coordinate, decimals, extent, number, path, tag, text, ticks, wide

SIZE = 11  # of tick labels, pixels
HALO: Attributes = {
    "paint_order": "stroke",
    "stroke": "var(--paper)",
    "stroke_width": 3.0,
    "stroke_linejoin": "round",
}  # of words


@dataclass(frozen=True)
class Point:
    """A value at x; `low` and `high`: its spread, None where none is known; `note`: what a reader may ask it."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Series:
    """A curve and how it is drawn; `ring`: the x of the point to mark as the best."""

    label: str
    ink: Ink
    points: tuple[Point, ...]
    ring: float | None = None


@dataclass(frozen=True)
class Head:
    """What stands over a drawing. `about`: the same in a sentence for those who cannot see it."""

    title: str
    words: str
    about: str


@dataclass(frozen=True)
class Look:
    """Size in pixels; `labels`: names at the ends of curves; `hits`: places that answer a pointer; `band`: the spread
    as an area, else as a bar at each point; `margin`: paper around, of a file that stands alone.
    """

    width: float = 340
    height: float = 232
    labels: bool = False
    hits: bool = True
    band: bool = True
    margin: float = 0


@dataclass(frozen=True)
class Frame:
    """Where a drawing's values are."""

    x: Scale
    y: Scale
    parts: list[str] = field(default_factory=list)

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Left, top, right, bottom."""
        return self.x.start, self.y.end, self.x.end, self.y.start


def drawing(head: Head, look: Look, parts: Sequence[str]) -> str:
    """The svg element around a drawing, with its title and its description."""
    title = text(head.title, 0, 13, font_size=13.5, font_weight=600, fill="var(--ink)")
    below = text(head.words, 0, 29, font_size=SIZE, fill="var(--soft)")
    width, height, margin = look.width + 2 * look.margin, look.height + 2 * look.margin, look.margin
    size: Attributes = {"width": width, "height": height}
    return tag(
        "svg",
        tag("title", _escaped(head.title)),
        tag("desc", _escaped(head.about)),
        title,
        below,
        *parts,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=" ".join(coordinate(at) for at in (-margin, -margin, width, height)),
        role="img",
        aria_label=f"{head.title}. {head.about}",
        font_family="var(--sans)",
        **size,
    )


def _escaped(words: str) -> str:
    inner = text(words, 0, 0)
    return inner[inner.index(">") + 1 : inner.rindex("<")]


def framed(
    look: Look, xs: tuple[float, float], ys: tuple[float, float], *, right: float = 8, under: float = 38
) -> Frame:
    """Horizontal hairlines at round values with their numbers on the left."""
    marks = ticks(*ys)
    places = decimals(marks)
    left = max(wide(number(v, places), SIZE) for v in marks) + 8
    x = Scale(*xs, left, look.width - right)
    y = Scale(*ys, look.height - under, 46)
    frame = Frame(x, y)
    for mark in marks:
        at = y(mark)
        frame.parts.append(tag("line", x1=left, x2=x.end, y1=at, y2=at, stroke="var(--rule)"))
        label = text(number(mark, places), left - 7, at + 3.8, text_anchor="end", font_size=SIZE, fill="var(--soft)")
        frame.parts.append(label)
    return frame


def x_axis(frame: Frame, at: Sequence[tuple[float, str]], words: str) -> None:
    """Labels below, and what they are."""
    left, _, right, bottom = frame.box
    look: Attributes = {"text_anchor": "middle", "font_size": SIZE, "fill": "var(--soft)"}
    for value, label in at:
        frame.parts.append(text(label, frame.x(value), bottom + 16, **look))
    frame.parts.append(text(words, (left + right) / 2, bottom + 32, **look))


def rule(frame: Frame, value: float, words: str) -> None:
    """A dashed line across at a value to compare with, if it is in range."""
    left, top, right, bottom = frame.box
    at = frame.y(value)
    if top <= at <= bottom:
        line = tag("line", x1=left, x2=right, y1=at, y2=at, stroke="var(--axis)", stroke_dasharray="1.5 3")
        look: Attributes = {"text_anchor": "end", "font_size": 10, "fill": "var(--soft)", **HALO}
        frame.parts.append(line + (text(words, right, at - 4, **look) if words else ""))


def marker(ink: Ink, x: float, y: float, size: float = 2.9, *, hollow: bool = False) -> str:
    """A regularizer's own shape: colour is not the only thing that tells curves apart."""
    fill = "var(--paper)" if hollow else ink.colour
    look: Attributes = {"fill": fill, "stroke": ink.colour, "stroke_width": 1.4}
    if ink.marker == "circle":
        return tag("circle", cx=x, cy=y, r=size, **look)
    r = size * {"square": 0.92, "diamond": 1.3, "up": 1.25, "down": 1.25}[ink.marker]
    corners = {
        "square": [(-r, -r), (r, -r), (r, r), (-r, r)],
        "diamond": [(0, -r), (r, 0), (0, r), (-r, 0)],
        "up": [(0, -r), (r, r * 0.8), (-r, r * 0.8)],
        "down": [(0, r), (r, -r * 0.8), (-r, -r * 0.8)],
    }[ink.marker]
    return tag("path", d=path([(x + a, y + b) for a, b in corners], close=True), **look)


def bar(frame: Frame, ink: Ink, point: Point) -> str:
    """The spread of one point as an upright line."""
    if point.low is None or point.high is None:
        return ""
    x = frame.x(point.x)
    look: Attributes = {"stroke": ink.colour, "stroke_width": 1.2, "stroke_opacity": 0.55}
    return tag("line", x1=x, x2=x, y1=frame.y(point.low), y2=frame.y(point.high), **look)


def area(frame: Frame, one: Series, beside: int) -> str:
    """The spread of a curve as an area, point to point where it is known; the fainter the more there are."""
    made = []
    for before, after in pairwise(one.points):
        if None not in (before.low, before.high, after.low, after.high):
            some = [(p.x, p.low) for p in (before, after)] + [(p.x, p.high) for p in (after, before)]
            made.append(path([(frame.x(x), frame.y(y or 0.0)) for x, y in some], close=True))
    return (
        tag("path", d="".join(made), fill=one.ink.colour, fill_opacity=round(min(0.14, 0.4 / beside), 3))
        if made
        else ""
    )


def line(frame: Frame, points: Sequence[tuple[float, float]], ink: Ink, width: float = 1.8) -> str:
    """A curve."""
    d = path([(frame.x(x), frame.y(y)) for x, y in points])
    look: Attributes = {"stroke_width": width, "stroke_dasharray": ink.dash, "stroke_linejoin": "round"}
    return tag("path", d=d, fill="none", stroke=ink.colour, **look)


def spread_of(series: Sequence[Series]) -> list[float]:
    """Every value that a drawing of these must hold."""
    found = [(p.y, p.low, p.high) for one in series for p in one.points]
    return [value for values in found for value in values if value is not None]


def by_iterate(series: Sequence[Series], head: Head, look: Look, level: tuple[float, str] | None = None) -> str:
    """Curves over the iterates, the best of each ringed, with names at their ends."""
    last = int(max(p.x for one in series for p in one.points))
    values = spread_of(series)
    low, high = extent(values)
    if level is not None and low - (high - low) * 0.4 <= level[0] <= high + (high - low) * 0.4:
        low, high = extent([*values, level[0]])  # a value near by that says how to read the curves
    right = max(wide(one.label, 12) for one in series) + 20 if look.labels else 10
    pad = 0.02 * max(1, last)
    frame = framed(look, (-pad, max(1, last) + pad), (low, high), right=right)
    every = max(1, -(-(last + 1) // (16 if look.width > 500 else 10)))
    x_axis(frame, [(k, "base" if k == 0 else str(k)) for k in range(0, last + 1, every)], "iterate")
    if level is not None:
        rule(frame, *level)
    for one in series:
        frame.parts.extend(
            [area(frame, one, len(series))] if look.band else [bar(frame, one.ink, p) for p in one.points]
        )
    for one in series:
        frame.parts.append(line(frame, [(p.x, p.y) for p in one.points], one.ink))
        for p in one.points:
            x, y = frame.x(p.x), frame.y(p.y)
            if p.x == one.ring:
                frame.parts.append(
                    tag("circle", cx=x, cy=y, r=6.2, fill="none", stroke=one.ink.colour, stroke_width=1.2)
                )
            frame.parts.append(marker(one.ink, x, y))
    if look.labels:
        frame.parts.extend(end_labels(frame, [(one.label, one.ink, one.points[-1]) for one in series]))
    if look.hits:
        frame.parts.extend(columns(frame, series, range(last + 1)))
    return drawing(head, look, frame.parts)


def end_labels(frame: Frame, ends: Sequence[tuple[str, Ink, Point]]) -> list[str]:
    """Names beside the last points, pushed apart where they would touch, with a thin line where they were."""
    _, top, right, bottom = frame.box
    wanted = sorted(((frame.y(p.y), frame.x(p.x), label, ink) for label, ink, p in ends), key=lambda one: one[0])
    made = []
    for (y, x, label, ink), at in zip(wanted, apart([y for y, *_ in wanted], 15, top, bottom), strict=True):
        if abs(at - y) > 3:
            thread = path([(x + 5, y), (right + 9, at)])
            made.append(tag("path", d=thread, fill="none", stroke=ink.colour, stroke_width=0.8, stroke_opacity=0.6))
        made.append(text(label, right + 12, at + 4, font_size=12, font_weight=550, fill=ink.colour, **HALO))
    return made


def apart(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Ascending places as near to those wanted as a gap allows, from `low` on; they pass `high` only if there are too
    many.
    """
    places: list[float] = []
    for place in wanted:
        places.append(max(place, places[-1] + gap if places else low))
    over = (places[-1] if places else low) - high
    if over > 0:
        limit = high
        for i in reversed(range(len(places))):
            places[i] = min(places[i], limit)
            limit = places[i] - gap
        lift = low - places[0]
        places = [place + max(0.0, lift) for place in places]
    return places


def columns(frame: Frame, series: Sequence[Series], xs: Sequence[int]) -> list[str]:
    """Upright places that answer a pointer with the values of all curves there."""
    left, top, right, bottom = frame.box
    half = (frame.x(1) - frame.x(0)) / 2
    made = []
    for k in xs:
        notes = [f"{one.label}  {p.note}" for one in series for p in one.points if p.x == k and p.note]
        start, end = max(left, frame.x(k) - half), min(right, frame.x(k) + half)
        tip = "\n".join(["base" if k == 0 else f"iterate {k}", *notes])
        look: Attributes = {"x": start, "y": top - 6, "width": end - start, "height": bottom - top + 6}
        made.append(tag("rect", class_="hit", data_tip=tip, fill="transparent", **look))
    return made


def training(
    curves: Sequence[tuple[str, Ink, dict[int, list[tuple[float, float]]]]],
    head: Head,
    look: Look,
    level: tuple[float, str] | None = None,
) -> str:
    """Curves over optimiser steps, one iteration beside the other; each iteration is as wide as any."""
    points = [p for _, _, parts in curves for part in parts.values() for p in part]
    iterations = max(t for _, _, parts in curves for t in parts) + 1
    low, high = extent([y for _, y in points])
    if level is not None and low - (high - low) * 0.4 <= level[0] <= high + (high - low) * 0.4:
        low, high = extent([*(y for _, y in points), level[0]])
    frame = framed(look, (0, iterations), (low, high))
    _, top, _, bottom = frame.box
    for t in range(iterations + 1):
        at = frame.x(t)
        frame.parts.append(tag("line", x1=at, x2=at, y1=top, y2=bottom, stroke="var(--rule)"))
    every = max(1, -(-iterations // 12))
    x_axis(frame, [(t + 0.5, str(t)) for t in range(0, iterations, every)], "iteration, each over its steps")
    if level is not None:
        rule(frame, *level)
    for _, ink, parts in curves:
        for some in parts.values():
            one = len(some) == 1
            x, y = some[0]
            frame.parts.append(marker(ink, frame.x(x), frame.y(y), 2) if one else line(frame, some, ink, 1.3))
    return drawing(head, look, frame.parts)


def spark(values: Sequence[float], best: int | None, colour: str, about: str) -> str:
    """A curve the size of a word."""
    if len(values) < 2:
        return ""
    x, y = Scale(0, len(values) - 1, 4, 78), Scale(*extent(values, 0.0), 19, 4)
    points = [(x(i), y(value)) for i, value in enumerate(values)]
    look: Attributes = {"fill": "none", "stroke": colour, "stroke_width": 1.4}
    parts = [tag("path", d=path(points), stroke_linejoin="round", **look)]
    if best is not None:
        parts.append(tag("circle", cx=points[best][0], cy=points[best][1], r=2.6, fill=colour))
    words: Attributes = {"viewBox": "0 0 82 23", "role": "img", "aria_label": about}
    return tag("svg", *parts, width=82, height=23, class_="spark", **words)
