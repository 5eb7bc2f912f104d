"""The page: one HTML file that needs no network, with drawings, tables, samples and settings in it."""

from base64 import b64encode
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from spin_reg.redact import redacted
from spin_reg.report import figures, names, sheets, words
from spin_reg.report.charts import marker
from spin_reg.report.figures import NARROW, SMALL, WIDE, Figure
from spin_reg.report.gather import Run
from spin_reg.report.ink import variables
from spin_reg.report.story import Story
from spin_reg.report.svg import tag, visible

HERE = Path(__file__).parent
FEW, MANY = 3, 16  # prompts whose answers are shown for each group of a sweep, and of one run


@dataclass(frozen=True)
class Section:
    """A part of the page; drawings are as wide as a small figure, `large` ones in two sizes."""

    key: str
    title: str
    prose: tuple[str, ...] = ()
    large: tuple[tuple[str, str], ...] = ()
    small: tuple[str, ...] = ()
    sheets: tuple[Any, ...] = ()
    folded: tuple[tuple[str, Any], ...] = ()
    samples: tuple[Any, ...] = ()
    terms: tuple[tuple[str, list[tuple[str, str]]], ...] = field(default=())


@dataclass(frozen=True)
class Sample:
    """A held-out prompt with its real answer and those of the iterates: (who, words, was cut off)."""

    prompt: str
    real: str
    answers: tuple[tuple[str, str, bool], ...]


def page(story: Story, beside: Path) -> str:
    """The HTML text; `beside` is the folder it will lie in."""
    found = [section for section in _sections(story, beside) if section is not None]
    script = (HERE / "page.js").read_text(encoding="utf-8")
    made = _template().render(
        title=words.title(story),
        over=words.over(story),
        lead=words.lead(story),
        facts=words.facts(story),
        key=[(ink, group.label) for group, ink in story.drawn] if story.alone is None else [],
        sections=found,
        style=_style(story),
        script=script,
        script_hash=b64encode(sha256(script.encode()).digest()).decode(),
        marks=[_mark(story, i) for i in range(len(story.groups))],
        unread=story.unread,
        repeats=[run.root.name for run in story.repeats],
    )
    return redacted(made)


@cache
def _template() -> Any:
    loader = FileSystemLoader(HERE)
    kept = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return kept.get_template("page.html.j2")


def _style(story: Story) -> str:
    """The style sheet, with the values of the variables in front."""

    def block(dark: bool) -> str:
        return "".join(f"--{key}:{value};" for key, value in variables(story.inks, dark=dark).items())

    sheet = (HERE / "page.css").read_text(encoding="utf-8")
    light = f":root{{color-scheme:light dark;{block(False)}}}"
    dark = f"@media screen and (prefers-color-scheme:dark){{:root{{{block(True)}}}}}"
    return light + dark + sheet


def _mark(story: Story, i: int) -> str:
    """A group's marker on a piece of its line."""
    ink = story.inks[i]
    line = tag("path", d="M0 6H26", fill="none", stroke=ink.colour, stroke_width=1.8, stroke_dasharray=ink.dash)
    return tag("svg", line, marker(ink, 13, 6, 3.2), width=26, height=12, viewBox="0 0 26 12", aria_hidden="true")


def _sections(story: Story, beside: Path) -> list[Section | None]:
    training, longest = figures.training(story)
    strengths, stability = figures.strengths(story), figures.stability(story)
    compared = ([words.STRENGTH] if strengths else []) + ([words.stability(story.metric)] if stability else [])
    mentioned = {*names.QUALITY, *names.DRIFT, *names.GAME, *names.REPEATED, story.metric}
    others = [metric for metric in story.measured if metric not in mentioned]
    return [
        _overview(story),
        _drawn("strength", "Strength and stability", [*strengths, *stability], *compared),
        _drawn("quality", "Quality", figures.curves(story, _but(names.QUALITY, story)), words.QUALITY),
        _drawn("drift", "Drift and length", figures.curves(story, _but(names.DRIFT, story)), words.DRIFT),
        _drawn("game", "The game", figures.curves(story, names.GAME), words.GAME),
        _drawn("crossplay", "Cross-play", figures.crossplays(story), words.CROSSPLAY),
        _drawn("training", "Training", training, words.training(longest, seeded=story.seeded)),
        _drawn("others", "Other metrics", figures.curves(story, others), words.OTHERS),
        _tabled("benchmarks", "Benchmarks", sheets.benchmarks(story)),
        _samples(story),
        _folded("numbers", "Every number", "All metrics by iterate", sheets.everything(story)),
        _provenance(story, beside),
    ]


def _but(wanted: Sequence[str], story: Story) -> list[str]:
    """These metrics without the one that the overview has."""
    return [metric for metric in wanted if metric != story.metric]


def _overview(story: Story) -> Section | None:
    main = figures.curves(story, [story.metric])
    sheet = sheets.iterates(story) if story.alone else sheets.comparison(story)
    if not main and sheet is None:
        return None
    prose = (f"A ring marks the best iterate of each curve; {story.spread}. {words.AXES[0]}", words.AXES[1])
    large = tuple((one.draw(WIDE), one.draw(NARROW)) for one in main)
    return Section("overview", "Overview", prose, large=large, sheets=() if sheet is None else (sheet,))


def _drawn(key: str, title: str, made: list[Figure], *prose: str) -> Section | None:
    small = tuple(one.draw(SMALL) for one in made)
    return Section(key, title, prose, small=small) if made else None


def _tabled(key: str, title: str, sheet: Any) -> Section | None:
    return None if sheet is None else Section(key, title, sheets=(sheet,))


def _folded(key: str, title: str, summary: str, sheet: Any) -> Section | None:
    return None if sheet is None else Section(key, title, folded=((summary, sheet),))


def _samples(story: Story) -> Section | None:
    """For each group the answers of its first seed to the first held-out prompts."""
    shown = []
    for i, group in enumerate(story.groups):
        run = next(iter(group.runs.values()))
        made = samples(run)
        few = made[: MANY if story.alone else FEW]
        if few:
            shown.append((i, f"{group.label}, seed {run.seed}, {len(few)} of {len(made)}", few))
    prose = (words.SAMPLES, "All that were kept are in each run’s iterate-KK/evaluate/samples.json.")
    return Section("samples", "Samples", prose, samples=tuple(shown)) if shown else None


def samples(run: Run) -> list[Sample]:
    """The kept answers by prompt, in the order of the iterates."""
    counts: Counter[int] = Counter()
    by_prompt: dict[int, list[Any]] = {}
    for row in run.samples:  # two prompts may read the same: the n-th of an iterate is the n-th of any
        by_prompt.setdefault(counts[row["iterate"]], []).append(row)
        counts[row["iterate"]] += 1
    made = []
    for found in by_prompt.values():
        answers = tuple(
            ("base" if r["iterate"] == 0 else str(r["iterate"]), visible(r["generated"]), r["finish_reason"] != "stop")
            for r in found
        )
        made.append(Sample(visible(found[0]["prompt"]), visible(found[0]["real"]), answers))
    return made


def _provenance(story: Story, beside: Path) -> Section:
    shared, differ = sheets.settings(story)
    run = story.alone
    made = [sheets.plan(run)] if run else [sheets.listing(story, beside)]
    terms = [("Provenance", sheets.provenance(story.runs))]
    terms += [("Settings that differ", differ)] if differ else []
    terms += [("Settings" if run else "Settings that all runs share", shared)]
    return Section("settings", "Plan, provenance, settings", sheets=tuple(made), terms=tuple(terms))
