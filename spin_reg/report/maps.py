"""Drawings that are no curves over iterates: strength, stability against quality, and who tells whom apart."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from spin_reg.report.charts import (
    HALO,
    SIZE,
    Frame,
    Head,
    Look,
    Point,
    Series,
    bar,
    drawing,
    end_labels,
    framed,
    line,
    marker,
    rule,
    spread_of,
    x_axis,
)
from spin_reg.report.gather import SUBSCRIPTS
from spin_reg.report.groups import Stat
from spin_reg.report.ink import Ink
from spin_reg.report.svg import Attributes, decimals, extent, number, path, tag, text, ticks, wide

Cell = tuple[int, int]


def strength(best: Series, last: Series, head: Head, look: Look, base: float) -> str:
    """A metric of the best and of the last iterate against alpha: 0 is SPIN, 1 keeps the base as the reference."""
    low, high = extent([*spread_of([best, last]), base])
    frame = framed(look, (-0.04, 1.04), (low, high), right=44)
    x_axis(frame, [(a, number(a, 2)) for a in (0.0, 0.25, 0.5, 0.75, 1.0)], "alpha, the weight of the base")
    rule(frame, base, "base")
    for one, hollow in ((last, False), (best, True)):
        frame.parts.extend([bar(frame, one.ink, p) for p in one.points])
        frame.parts.append(line(frame, [(p.x, p.y) for p in one.points], one.ink, 1.4))
        frame.parts.extend([marker(one.ink, frame.x(p.x), frame.y(p.y), 3.4, hollow=hollow) for p in one.points])
    frame.parts.extend(end_labels(frame, [(one.label, one.ink, one.points[-1]) for one in (best, last)]))
    if look.hits:
        places = [(p, f"alpha {number(p.x, 2)}\n{one.label}  {p.note}") for one in (best, last) for p in one.points]
        frame.parts.extend([spot(frame, p, tip) for p, tip in places])
    return drawing(head, look, frame.parts)


def spot(frame: Frame, point: Point, tip: str) -> str:
    """A place around a point that answers a pointer."""
    return tag("circle", class_="hit", data_tip=tip, cx=frame.x(point.x), cy=frame.y(point.y), r=11, fill="transparent")


def stability(
    clouds: Sequence[tuple[str, Ink, Sequence[Point], Point]], head: Head, look: Look, words: str, base: float
) -> str:
    """One small point a run (x: instability, y: quality), one large a group: its means over seeds."""
    every = [p for _, _, some, mean in clouds for p in (*some, mean)]
    xs = extent([0.0, *(p.x for p in every)])
    frame = framed(look, xs, extent([*(p.y for p in every), base]), right=12)
    marks = ticks(max(0.0, xs[0]), xs[1])
    x_axis(frame, [(v, number(v, decimals(marks))) for v in marks], words)
    rule(frame, base, "base")
    for _, ink, some, mean in clouds:
        for p in some:
            arm = path([(frame.x(p.x), frame.y(p.y)), (frame.x(mean.x), frame.y(mean.y))])
            frame.parts.append(tag("path", d=arm, stroke=ink.colour, stroke_width=0.8, stroke_opacity=0.45))
            frame.parts.append(marker(ink, frame.x(p.x), frame.y(p.y), 2.1, hollow=True))
    means = [(frame.x(mean.x), frame.y(mean.y)) for *_, mean in clouds]
    taken = [(x - 6, y - 6, x + 6, y + 6) for x, y in means]
    for (_, ink, _, _), (x, y) in zip(clouds, means, strict=True):
        frame.parts.append(marker(ink, x, y, 4.6))
    for (label, ink, _, _), at in zip(clouds, means, strict=True):
        left, top, _, bottom = box = beside(at, wide(label, 12), frame.box, taken)
        taken.append(box)
        look_of: Attributes = {"font_size": 12, "font_weight": 550, "fill": ink.colour, **HALO}
        frame.parts.append(text(label, left, (top + bottom) / 2 + 4, **look_of))
    if look.hits:
        for label, _, some, mean in clouds:
            frame.parts.extend([spot(frame, p, f"{label}\n{p.note}") for p in (mean, *some)])
    return drawing(head, look, frame.parts)


Box = tuple[float, float, float, float]


def beside(at: tuple[float, float], width: float, frame: Box, taken: Sequence[Box]) -> Box:
    """A place for a name near a point that touches as little as may be of what is there, inside the frame if it can."""
    x, y = at
    places = [(x + 9, y - 7), (x - 9 - width, y - 7), (x - width / 2, y - 22), (x - width / 2, y + 8)]
    places += [(x + 7, y - 19), (x + 7, y + 5), (x - 7 - width, y - 19), (x - 7 - width, y + 5)]
    boxes = [(left, top, left + width, top + 14) for left, top in places]

    def cost(box: Box) -> float:
        outside = box[0] < frame[0] or box[1] < frame[1] or box[2] > frame[2] or box[3] > frame[3]
        return sum(_shared(box, other) for other in taken) + 500.0 * outside

    return min(boxes, key=cost)


def _shared(one: Box, other: Box) -> float:
    """The area that two boxes share."""
    across, down = min(one[2], other[2]) - max(one[0], other[0]), min(one[3], other[3]) - max(one[1], other[1])
    return max(0.0, across) * max(0.0, down)


def crossplay(cells: Mapping[Cell, Stat], head: Head, look: Look) -> str:
    """Accuracies A[i, j] as a map: 1/2 is paper, above it one hue, below it another; the number stands in each cell."""
    rows, columns = sorted({i for i, _ in cells}), range(max(j for _, j in cells) + 1)
    side = 40.0 if len(columns) <= 8 else 30.0
    left, top = 46.0, 74.0
    look = replace(look, width=max(300.0, left + side * len(columns) + 4), height=top + side * len(rows) + 8)
    label: Attributes = {"text_anchor": "middle", "font_size": SIZE, "fill": "var(--soft)"}
    parts = [text("answers of iterate", left, top - 24, font_size=SIZE, fill="var(--soft)")]
    parts += [text("base" if j == 0 else str(j), left + side * (j + 0.5), top - 7, **label) for j in columns]
    for row, i in enumerate(rows):
        y = top + side * row
        parts.append(
            text(
                "f" + str(i).translate(SUBSCRIPTS),
                left - 10,
                y + side / 2 + 4,
                text_anchor="end",
                font_size=SIZE,
                fill="var(--soft)",
            )
        )
        for j in columns:
            if (i, j) in cells:
                parts.append(_cell(cells[i, j], (i, j), left + side * j, y, side, hits=look.hits))
    edge = [
        (left + side * min(i, len(columns)), top + side * (row + end)) for row, i in enumerate(rows) for end in (0, 1)
    ]
    parts.append(tag("path", d=path(edge), fill="none", stroke="var(--ink)", stroke_width=1.4))
    return drawing(head, look, parts)


def _cell(found: Stat, at: Cell, x: float, y: float, side: float, *, hits: bool) -> str:
    strong = min(1.0, abs(found.mean - 0.5) * 2)
    inside: Attributes = {"x": x + 1, "y": y + 1, "width": side - 2, "height": side - 2, "rx": 2}
    back = tag("rect", fill="var(--wash)", **inside)
    hue = "var(--high)" if found.mean >= 0.5 else "var(--low)"
    wash = tag("rect", fill=hue, fill_opacity=round(0.75 * strong, 3), **inside)
    words = text(
        f"{found.mean:.2f}", x + side / 2, y + side / 2 + 4, text_anchor="middle", font_size=SIZE, fill="var(--ink)"
    )
    spread = "" if found.sd is None else f" ± {found.sd:.3f} over {found.n} seeds"
    tip = f"discriminator f{at[0]}, answers of iterate {at[1]}\naccuracy {found.mean:.3f}{spread}"
    return back + wash + words + (tag("rect", class_="hit", data_tip=tip, fill="transparent", **inside) if hits else "")
