"""Every figure of a page: which there are, what stands over them, and the same ones as files."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from spin_reg import durable
from spin_reg.errors import ConfigError
from spin_reg.redact import redacted
from spin_reg.report import charts, groups, maps, names
from spin_reg.report.charts import Head, Look, Point, Series
from spin_reg.report.groups import Group, Stat
from spin_reg.report.ink import PAPER, Ink, resolved
from spin_reg.report.names import Name
from spin_reg.report.story import Story, said
from spin_reg.report.svg import number

WIDE, NARROW, SMALL = Look(860, 400, labels=True), Look(350, 300), Look()
FILE = Look(560, 340, labels=True, hits=False, margin=16)
MOST = 60  # points of one iteration in a training curve
MARK = '<svg data-by="spin-reg" '


@dataclass(frozen=True)
class Figure:
    """A drawing under a name; `draw` is given a look, and the name is that of its file."""

    name: str
    draw: Callable[[Look], str]


def curves(story: Story, wanted: Sequence[str]) -> list[Figure]:
    """One figure for each of these metrics that any group has at two iterates or more."""
    return [figure for metric in wanted if (figure := curve(story, metric)) is not None]


def curve(story: Story, metric: str) -> Figure | None:
    series = story.series(metric)
    if not any(len(one.points) > 1 for one in series):
        return None
    head = Head(names.name(metric).title, names.words(metric), story.about(metric))

    def draw(look: Look) -> str:
        return charts.by_iterate(series, head, replace(look, band=story.seeded), story.level(metric))

    return Figure(names.plain(metric).replace("/", "-"), draw)


def training(story: Story) -> tuple[list[Figure], int]:
    """The training curves, and how many steps in a row one of their points is the mean of."""
    made, longest = [], 1
    for metric in names.TRAINING:
        found = [(group.label, ink, groups.training(group, metric, MOST)) for group, ink in story.drawn]
        lines = [(label, ink, parts) for label, ink, (parts, _) in found if parts]
        longest = max([longest, *(every for *_, (_, every) in found)])
        if lines:
            name = names.name(metric)
            made.append(Figure(f"train-{names.plain(metric)}", _trained(story, metric, name, lines)))
    return made, longest


def _trained(
    story: Story, metric: str, name: Name, lines: list[tuple[str, Ink, dict[int, list[tuple[float, float]]]]]
) -> Callable[[Look], str]:
    ends = [(label, list(parts.values())[-1][-1][1]) for label, _, parts in lines]
    about = f"{name.title} in training, by iteration and step. At the end: " + "; ".join(
        f"{label} {number(value)}" for label, value in ends
    )
    head = Head(name.title, f"{metric} · {name.unit}", about + ".")
    return lambda look: charts.training(lines, head, look, story.level(metric))


def strengths(story: Story) -> list[Figure]:
    """The metric against alpha, one figure a family of groups that differ in alpha alone."""
    made: list[Figure] = []
    for family in groups.families(story.groups):
        verdicts = groups.shared([groups.verdicts(one, story.metric) for one in family])
        best = [
            _at(one.alpha, groups.over(found, lambda v: v.best)) for one, found in zip(family, verdicts, strict=True)
        ]
        last = [
            _at(one.alpha, groups.over(found, lambda v: v.last)) for one, found in zip(family, verdicts, strict=True)
        ]
        base = groups.stat([v.base for found in verdicts for v in found.values()])
        if base is not None and len([p for p in best if p is not None]) > 1:
            name = "strength" if not made else f"strength-{len(made) + 1}"
            made.append(Figure(name, _strength(story, family, _known(best), _known(last), base.mean)))
    return made


def _known(points: Sequence[Point | None]) -> list[Point]:
    return [point for point in points if point is not None]


def _strength(
    story: Story, family: Sequence[Group], best: list[Point], last: list[Point], base: float
) -> Callable[[Look], str]:
    ink = replace(next(ink for group, ink in story.drawn if group is family[1]), dash=None)
    title = names.name(story.metric).title
    about = "; ".join(f"alpha {number(p.x, 2)}: best {p.note}, last {q.note}" for p, q in zip(best, last, strict=True))
    head = Head(f"{title} against strength", names.words(story.metric), about + ".")
    dashed = replace(ink, dash="2 3")
    lines = Series("best", dashed, tuple(best)), Series("last", ink, tuple(last))
    return lambda look: maps.strength(*lines, head, look, base)


def _at(x: float | None, stat: Stat | None) -> Point | None:
    if x is None or stat is None:
        return None
    low, high = (None, None) if stat.sd is None else (stat.mean - stat.sd, stat.mean + stat.sd)
    return Point(x, stat.mean, low, high, said(stat, stat.sd, seeds=True))


def stability(story: Story) -> list[Figure]:
    """Instability against quality, where there are two runs to compare."""
    clouds = []
    for (group, ink), verdicts in zip(story.drawn, story.judged, strict=True):
        across = groups.over(verdicts, lambda v: v.instability)
        quality = groups.over(verdicts, lambda v: v.best)
        if across is not None and quality is not None:
            few = [
                Point(v.instability, v.best, note=f"seed {seed}: {number(v.instability)}, best {number(v.best)}")
                for seed, v in verdicts.items()
            ]
            note = f"mean: instability {number(across.mean)}, best {number(quality.mean)}"
            clouds.append((group.label, ink, few, Point(across.mean, quality.mean, note=note)))
    bases = groups.stat([v.base for verdicts in story.judged for v in verdicts.values()])
    if len(story.runs) < 2 or not clouds or bases is None:
        return []
    title = names.name(story.metric).title
    about = "; ".join(f"{label}: {mean.note}" for label, _, _, mean in clouds)
    head = Head(f"{title}: best against instability", names.words(story.metric), about + ".")
    under = "instability: the sum of all steps for the worse"
    return [Figure("stability", lambda look: maps.stability(clouds, head, look, under, bases.mean))]


def crossplays(story: Story) -> list[Figure]:
    """One map a group that has a cross-play matrix."""
    made = []
    for i, group in enumerate(story.groups):
        cells = groups.crossplay(group)
        if len(cells) > 1:
            seeds = f", mean over {len(group.runs)} seeds" if len(group.runs) > 1 else ""
            about = "; ".join(f"f{i} on {j}: {found.mean:.2f}" for (i, j), found in cells.items())
            head = Head(group.label, f"accuracy of discriminator fᵢ{seeds}", about + ".")
            made.append(Figure(f"crossplay-{i}" if len(story.groups) > 1 else "crossplay", _played(cells, head)))
    return made


def _played(cells: dict[tuple[int, int], Stat], head: Head) -> Callable[[Look], str]:
    return lambda look: maps.crossplay(cells, head, look)


def every(story: Story) -> list[Figure]:
    """All figures, that of the judging metric first."""
    kept = [m for m in story.measured if m != story.metric]
    return [
        *curves(story, [story.metric, *kept]),
        *strengths(story),
        *stability(story),
        *crossplays(story),
        *training(story)[0],
    ]


def write(story: Story, folder: Path, *, png: bool) -> int:
    """The figures as SVG files on light paper, and as PNG of twice the size; how many. Of ours that are there from
    before and are not made any more none stays; other files are left alone.

    Raises:
        ConfigError: PNG is asked for and what draws it is not installed.
    """
    draw = _rasteriser() if png else None
    made = {figure.name: redacted(resolved(figure.draw(FILE), story.inks)) for figure in every(story)}
    if made:
        durable.make_folder(folder)
    for old in folder.glob("*.svg") if folder.is_dir() else []:
        if old.stem not in made and old.read_text(encoding="utf-8", errors="replace").startswith(MARK):
            durable.remove(old)
            durable.remove(old.with_suffix(".png"))
    with durable.disk_errors(folder):  # not flushed one by one: what a power cut spoils is drawn again
        for name, drawing in made.items():
            marked = MARK + drawing.removeprefix("<svg ")
            (folder / f"{name}.svg").write_bytes(marked.encode() + b"\n")
            if draw is not None:
                (folder / f"{name}.png").write_bytes(draw(marked))
            else:  # of an older state: it would not be what the SVG shows
                (folder / f"{name}.png").unlink(missing_ok=True)
    return len(made)


def _rasteriser() -> Callable[[str], bytes]:
    try:
        import resvg_py
    except ModuleNotFoundError as error:
        why, todo = (
            "PNG is drawn by resvg_py, which is not installed",
            "pip install 'spin-reg[figures]', or leave it out",
        )
        raise ConfigError("There is nothing to draw PNG with.", where="--png", why=why, todo=todo) from error
    return lambda drawing: resvg_py.svg_to_bytes(svg_string=drawing, zoom=2, background=PAPER["paper"][0])
