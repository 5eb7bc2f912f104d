"""The page: one HTML file that needs no network, with drawings, tables, samples and settings in it."""

from base64 import b64encode
from dataclasses import dataclass, field
from functools import cache
from hashlib import sha256
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from spin_reg import metrics
from spin_reg.redact import redacted
from spin_reg.report import figures, groups, names, sheets
from spin_reg.report.figures import NARROW, SMALL, WIDE, Figure
from spin_reg.report.gather import Run
from spin_reg.report.ink import variables
from spin_reg.report.story import Story
from spin_reg.report.svg import number, visible

HERE = Path(__file__).parent
FEW = 3  # prompts whose answers are shown for each group of a sweep
PROSE = {
    "quality": "How far iterates are from the data they should learn, and what they forget. A ring marks the best mean.",
    "drift": "How far the policy walks from where it began, and what becomes of its answers: their length, how often "
    "they run into the limit, and whether they still vary.",
    "game": "Each iterate against the opponent it was trained against. Over iterations an accuracy toward one half says "
    "that nothing is left to tell apart.",
    "others": "What was measured beyond that.",
}


@dataclass(frozen=True)
class Section:
    """A part of the page; drawings are as wide as a small figure, `large` ones in two sizes."""

    key: str
    title: str
    prose: tuple[str, ...] = ()
    large: tuple[tuple[Markup, Markup], ...] = ()
    small: tuple[Markup, ...] = ()
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
        title=_title(story),
        lead=_lead(story),
        facts=_facts(story),
        key=[(ink, group.label) for group, ink in story.drawn] if story.alone is None else [],
        sections=found,
        style=Markup(_style(story)),
        script=Markup(script),
        script_hash=b64encode(sha256(script.encode()).digest()).decode(),
        marks=[Markup(_mark(story, i)) for i in range(len(story.groups))],
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
    from spin_reg.report.charts import marker
    from spin_reg.report.svg import tag

    ink = story.inks[i]
    line = tag("path", d="M0 6H26", fill="none", stroke=ink.colour, stroke_width=1.8, stroke_dasharray=ink.dash)
    return tag("svg", line, marker(ink, 13, 6, 3.2), width=26, height=12, viewBox="0 0 26 12", aria_hidden="true")


def _title(story: Story) -> str:
    run = story.alone
    if run is not None:
        return visible(run.root.name)
    choices = list(dict.fromkeys(group.regularizer for group in story.groups))
    return visible(", ".join(choices) + f": {len(story.runs)} runs")


def _facts(story: Story) -> list[tuple[str, str]]:
    """Name and value of what a reader asks first."""

    def of(*keys: str) -> str:
        found = [str(group.settings[key]) for group in story.groups for key in keys if group.settings.get(key)]
        return ", ".join(dict.fromkeys(visible(one.rstrip("/").rpartition("/")[2]) for one in found))

    def counted(split: str) -> str:
        found = sorted({run.counts[split] for run in story.runs if split in run.counts})
        return " – ".join(f"{one:,}".replace(",", " ") for one in dict.fromkeys((found[0], found[-1]))) if found else ""

    seeds = {run.seed for run in story.runs}
    last = max((k for run in story.runs for k in run.iterates), default=0)
    rows = [
        ("model", of("model.name_or_path") or of("model._choice")),
        ("data", of("dataset.path") or of("dataset._choice")),
        ("training prompts", counted("train")),
        ("held-out prompts", counted("heldout")),
        ("iterates", f"{last} and the base" if last else "the base"),
        ("seeds" if len(seeds) > 1 else "seed", str(len(seeds)) if len(seeds) > 1 else str(*seeds)),
    ]
    return [(key, words) for key, words in rows if words]


def _lead(story: Story) -> list[str]:
    """What came out, in sentences made of the numbers alone."""
    metric, title = story.metric, names.name(story.metric).title
    run = story.alone
    if run is not None:
        verdict = groups.verdict(run, metric)
        begin = [f"{run.state[0].upper()}{run.state[1:]}."] if run.state.partition(":")[0] != "finished" else []
        if verdict is None:
            return [*begin, "Fewer than two iterates have been evaluated, so there is nothing to compare yet."]
        base, best, last = (number(one) for one in (verdict.base, verdict.best, verdict.last))
        if verdict.best_at == 0:
            words = f"By {title} no iterate is better than the base ({base}); the last one, {verdict.last_at}, has {last}."
        elif verdict.best_at == verdict.last_at:
            words = f"{title} went from {base} at the base to {best} at the last iterate, {verdict.last_at}, the best."
        else:
            words = (
                f"{title} went from {base} at the base to {best} at iterate {verdict.best_at}, the best, and stands at "
                f"{last} at the last, {verdict.last_at}."
            )
        return [*begin, words, *([f"Stopped {run.stopped}."] if run.stopped else [])]
    bests = [(group, groups.over(made, lambda v: v.best)) for group, made in zip(story.groups, story.judged, strict=True)]
    known = [(group, best) for group, best in bests if best is not None]
    base = groups.stat([v.base for made in story.judged for v in made.values()])
    if not known or base is None:
        return ["Fewer than two iterates have been evaluated, so there is nothing to compare yet."]
    good = sorted(known, key=lambda one: metrics.badness(metric, one[1].mean))
    told = [f"{group.label} {number(s.mean)}" + ("" if s.sd is None else f" ± {number(s.sd)}") for group, s in good]
    few = ", ".join(told[:4]) + (f" and {len(told) - 4} more" if len(told) > 4 else "")
    return [f"By {title}, at the best iterate of each run: {few}. The base has {number(base.mean)}."]


def _sections(story: Story, beside: Path) -> list[Section | None]:
    training, longest = figures.training(story)
    averaged = f" Each point is the mean of up to {longest} steps." if longest > 1 else " Every step is drawn, unsmoothed."
    strengths, stability, crossplays = figures.strengths(story), figures.stability(story), figures.crossplays(story)
    mentioned = {*names.QUALITY, *names.DRIFT, *names.GAME, *names.REPEATED, story.metric}
    others = [metric for metric in story.measured if metric not in mentioned]
    return [
        _overview(story),
        _drawn(
            "strength",
            "Strength and stability",
            [*strengths, *([stability] if stability else [])],
            "What more of the base in the reference brings, where runs differ in alpha alone: hollow marks are each run’s "
            "best iterate, filled ones its last; alpha 0 is SPIN."
            if strengths
            else "",
            "The calmest way to a good value is the lower left corner."
            if stability and metrics.HEALTHY[story.metric] is metrics.Healthy.low
            else "",
        ),
        _drawn("quality", "Quality", figures.curves(story, _but(names.QUALITY, story)), PROSE["quality"]),
        _drawn("drift", "Drift and length", figures.curves(story, names.DRIFT), PROSE["drift"]),
        _drawn("game", "The game", figures.curves(story, names.GAME), PROSE["game"]),
        _drawn(
            "crossplay",
            "Cross-play",
            crossplays,
            "Discriminator fᵢ is what the iteration that made iterate i learned; each cell says how often it tells a real "
            "answer from one of iterate j. ½ is paper. Right of the line answers are as new as the discriminator or "
            "newer: an old one that wins there again says that the policy forgets, or goes in circles.",
        ),
        _drawn(
            "training",
            "Training",
            training,
            "Loss, margin and accuracy on the training pairs, before each step; every iteration is drawn as wide as any."
            + (" Means over seeds." if story.seeded else "")
            + averaged,
        ),
        _drawn("others", "Other metrics", figures.curves(story, others), PROSE["others"]),
        _tabled("benchmarks", "Benchmarks", sheets.benchmarks(story)),
        _samples(story),
        _folded("numbers", "Every number", "All metrics by iterate", sheets.everything(story)),
        _provenance(story, beside),
    ]


def _but(wanted: tuple[str, ...], story: Story) -> list[str]:
    return [metric for metric in wanted if metric != story.metric]


def _overview(story: Story) -> Section | None:
    main = figures.curves(story, [story.metric])
    sheet = sheets.iterates(story) if story.alone else sheets.comparison(story)
    if not main and sheet is None:
        return None
    prose = (
        f"A ring marks the best iterate of each curve; {story.spread}. Vertical axes show the range of the values and "
        "need not begin at zero.",
        "The best of several iterates is picked on the held-out prompts it is judged by, so it looks a little better "
        "than it is.",
    )
    large = tuple((Markup(one.draw(WIDE)), Markup(one.draw(NARROW))) for one in main)
    return Section("overview", "Overview", prose, large=large, sheets=() if sheet is None else (sheet,))


def _drawn(key: str, title: str, made: list[Figure], *prose: str) -> Section | None:
    small = tuple(Markup(one.draw(SMALL)) for one in made)
    return Section(key, title, tuple(one for one in prose if one), small=small) if made else None


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
        few = made if story.alone else made[:FEW]
        if few:
            more = f"{group.label}, seed {run.seed}" + ("" if len(few) == len(made) else f", {len(few)} of {len(made)}")
            shown.append((i, more, few))
    prose = ["The first held-out prompts, never trained on: the real answer, and what each iterate answered, one draw each."]
    if not story.alone:
        prose.append("Each run’s own page has all that were kept.")
    return Section("samples", "Samples", tuple(prose), samples=tuple(shown)) if shown else None


def samples(run: Run) -> list[Sample]:
    """The kept answers by prompt, in the order of the iterates."""
    rows = sorted(enumerate(run.samples), key=lambda one: (_place(run, one[0]), one[1]["iterate"]))
    made = []
    for _, some in groupby(rows, key=lambda one: _place(run, one[0])):
        found = [row for _, row in some]
        answers = tuple(
            ("base" if r["iterate"] == 0 else str(r["iterate"]), visible(r["generated"]), r["finish_reason"] != "stop")
            for r in found
        )
        made.append(Sample(visible(found[0]["prompt"]), visible(found[0]["real"]), answers))
    return made


def _place(run: Run, at: int) -> int:
    """The how many-th prompt of its iterate a row is: two prompts may read the same."""
    row = run.samples[at]
    return sum(1 for other in run.samples[:at] if other["iterate"] == row["iterate"])


def _provenance(story: Story, beside: Path) -> Section:
    shared, differ = sheets.settings(story)
    run = story.alone
    made = [sheets.plan(run)] if run else [sheets.listing(story, beside)]
    terms = [("Provenance", sheets.provenance(story.runs))]
    terms += [("Settings that differ", differ)] if differ else []
    terms += [("Settings" if run else "Settings that all runs share", shared)]
    return Section("settings", "Plan, provenance, settings", sheets=tuple(made), terms=tuple(terms))
