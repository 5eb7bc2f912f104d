"""The tables of a page: cells with what they are sorted by."""

import json
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from spin_reg import metrics, verbs
from spin_reg.console import COLUMNS
from spin_reg.report import charts, groups, names
from spin_reg.report.gather import Run
from spin_reg.report.groups import SEED, Group, Stat, Verdict
from spin_reg.report.story import Story
from spin_reg.report.svg import number, visible

PAGE = "report.html"


@dataclass(frozen=True)
class Cell:
    """`key`: what a column is sorted by, if not the words; `beside`: a spread; `drawing`: SVG; `link`: a relative
    address; `ink`: index of a group, whose mark stands before the words.
    """

    words: str = ""
    key: float | None = None
    beside: str = ""
    strong: bool = False
    drawing: str = ""
    link: str = ""
    ink: int | None = None

    @property
    def figure(self) -> bool:
        """Whether it is a number, which stands on the right."""
        return self.key is not None

    @property
    def long(self) -> bool:
        """Whether it is a phrase, which may take two lines."""
        return " " in self.words and len(self.words) > 20


@dataclass(frozen=True)
class Sheet:
    """A table; heads may hold a key, as the command names it, below the words."""

    caption: str
    heads: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]

    @property
    def figures(self) -> list[bool]:
        """Which columns are of numbers."""
        return [any(cell.figure for cell in column) for column in zip(*self.rows, strict=True)]


def value(found: float | None, spread: float | None = None, *, strong: bool = False) -> Cell:
    """A number and its spread; an empty cell of none."""
    if found is None:
        return Cell()
    return Cell(number(found), found, "" if spread is None else f"± {number(spread)}", strong)


def of(stat: Stat | None, *, strong: bool = False) -> Cell:
    return Cell() if stat is None else value(stat.mean, stat.sd, strong=strong)


def mark(i: int, group: Group) -> Cell:
    return Cell(group.label, ink=i)


def comparison(story: Story) -> Sheet | None:
    """A row a group: where it began, was best and ended, how steadily, and how far from the first one seed by seed."""
    if not any(story.judged) or story.alone is not None:
        return None
    first, of_first = story.groups[0], story.judged[0]
    rows = []
    bests = [groups.over(made, lambda v: v.best) for made in story.judged]
    good = [metrics.badness(story.metric, best.mean) for best in bests if best is not None]
    for i, (group, made, best) in enumerate(zip(story.groups, story.judged, bests, strict=True)):
        if best is None:
            continue
        rows.append(
            (
                mark(i, group),
                Cell(str(len(made)), len(made)),
                Cell(drawing=_spark(story, i)),
                of(groups.over(made, lambda v: v.base)),
                of(best, strong=metrics.badness(story.metric, best.mean) == min(good)),
                _at(made),
                of(groups.over(made, lambda v: v.last)),
                of(groups.over(made, lambda v: v.instability)),
                of(groups.over(made, lambda v: v.drawdown)),
                Cell("—", 0.0) if i == 0 else of(groups.paired(made, of_first, lambda v: v.best)),
            )
        )
    heads = ("", "seeds", "by iterate", "base", "best", "at iterate", "last", "instability", "drawdown")
    return Sheet(_caption(story), (*heads, f"best − {first.label}"), tuple(rows))


def _caption(story: Story) -> str:
    spread = " ± one standard deviation over seeds," if story.seeded else ""
    return (
        f"{names.name(story.metric).title} ({names.words(story.metric)}): means{spread} of what each run had at the "
        "base, at its own best iterate and at its last. Instability is the sum of all steps for the worse, drawdown "
        "the deepest fall. The last column is the difference of the best values, seed by seed, over the seeds that "
        "both have."
    )


def _spark(story: Story, i: int) -> str:
    group, ink = story.groups[i], story.inks[i]
    means = {k: found.mean for k, found in groups.curve(group, story.metric).items()}
    best = groups.best_of(group, story.metric)
    place = None if best is None else list(means).index(best)
    return charts.spark(list(means.values()), place, ink.colour, f"{group.label} by iterate")


def _at(made: dict[int, Verdict]) -> Cell:
    """The best iterate of each seed."""
    found = [verdict.best_at for verdict in made.values()]
    return Cell(", ".join("base" if k == 0 else str(k) for k in found), sum(found) / len(found))


def iterates(story: Story) -> Sheet | None:
    """Of a page about one run: a row an iterate, the main metrics, the best marked."""
    run = story.alone
    keys = [f"eval/{key}" for key in COLUMNS if f"eval/{key}" in story.measured]
    if run is None or not keys:
        return None
    best = {key: metrics.best(key, groups.of_run(run, key)) for key in keys}
    rows = [
        (
            Cell("base" if k == 0 else str(k), k),
            *(value(values.get(key), values.get(f"{key}_se"), strong=best[key] == k) for key in keys),
        )
        for k, values in run.iterates.items()
    ]
    caption = "Every iterate; ± one standard error over the held-out prompts, the best of a column in bold."
    return Sheet(caption, ("iterate", *(names.plain(key) for key in keys)), tuple(rows))


def everything(story: Story) -> Sheet | None:
    """A row a metric and group, a column an iterate."""
    ks = sorted({k for run in story.runs for k in run.iterates})
    if not ks:
        return None
    rows = []
    for metric in story.measured:
        for i, group in enumerate(story.groups):
            found = groups.curve(group, metric)
            best = groups.best_of(group, metric)
            cells = (
                value(found[k].mean, story.beside(group, metric, k, found[k]), strong=k == best)
                if k in found
                else Cell()
                for k in ks
            )
            if found:
                lead = () if story.alone else (mark(i, group),)
                rows.append((Cell(names.plain(metric)), *lead, *cells))
    heads = ("metric", *(() if story.alone else ("",)), *("base" if k == 0 else str(k) for k in ks))
    spread = "standard deviation over seeds" if story.seeded else "standard error over the held-out prompts"
    return Sheet(f"Means ± one {spread}; the best iterate of a row in bold.", heads, tuple(rows))


def benchmarks(story: Story) -> Sheet | None:
    """A row a task's metric and group, a column an iterate."""
    keys = list(dict.fromkeys(key for run in story.runs for v in run.benchmarks.values() for key in v))
    ks = sorted({k for run in story.runs for k in run.benchmarks})
    rows = []
    for key in (key for key in keys if not key.endswith("_se")):
        for i, group in enumerate(story.groups):
            by_k = {k: [r.benchmarks[k] for r in group.runs.values() if key in r.benchmarks.get(k, {})] for k in ks}
            cells = []
            for found in by_k.values():
                stat = groups.stat([one[key] for one in found])
                error = None if story.seeded or stat is None else found[0].get(f"{key}_se")
                cells.append(Cell() if stat is None else value(stat.mean, stat.sd if story.seeded else error))
            if any(by_k.values()):
                rows.append((Cell(names.plain(key)), *(() if story.alone else (mark(i, group),)), *cells))
    heads = ("benchmark", *(() if story.alone else ("",)), *("base" if k == 0 else str(k) for k in ks))
    return Sheet("Scores of lm-eval, as each task gives them.", heads, tuple(rows)) if rows else None


def plan(run: Run) -> Sheet:
    """A row an iteration: against what it played, with what, and how far it is."""
    rows = []
    for one in run.plan:
        set_ = [Cell(_number(one.settings.get(key))) for key in ("beta", "learning_rate", "epochs")]
        taken = "to do" if not one.made else "another run's" if one.seconds is None else _took(one.seconds)
        words = (Cell(one.answers), Cell(one.reference))
        rows.append((Cell(str(one.t), one.t), *words, *set_, Cell(str(one.steps or "")), Cell(taken)))
    heads = ("iteration", "answers from", "loss compares with", "beta", "learning rate", "epochs", "steps", "training")
    caption = (
        "π₀ is the base; iteration t makes iterate t + 1 out of iterate t. A product of powers is a geometric mixture, "
        "a mean or a sum an arithmetic one; of log-probs of whole answers."
    )
    return Sheet(caption, heads, tuple(rows))


def _took(seconds: float) -> str:
    return (
        f"{seconds:.1f} s"
        if seconds < 60
        else f"{seconds / 60:.1f} min"
        if seconds < 3600
        else f"{seconds / 3600:.1f} h"
    )


def _number(found: Any) -> str:
    return "" if found is None else f"{found:g}" if isinstance(found, float) else str(found)


def listing(story: Story, beside: Path) -> Sheet:
    """A row a run, with its own page where it has one. `beside`: the folder that addresses are relative to."""
    rows = []
    for i, group in enumerate(story.groups):
        for seed, run in group.runs.items():
            page = run.root / PAGE
            link = quote(os.path.relpath(page, beside)) if page.is_file() else ""
            name = Cell(run.root.name, link=link)
            began = Cell(str(run.record["created"])[:16].replace("T", " "))
            rows.append((name, mark(i, group), Cell(str(seed), seed), Cell(run.state), began))
    return Sheet("The runs behind this page.", ("run", "", "seed", "state", "began (UTC)"), tuple(rows))


def settings(story: Story) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """What all runs share, as (key, value); and what differs, with all its values."""
    keys = list(dict.fromkeys(key for group in story.groups for key in group.settings))
    shared: list[tuple[str, str]] = []
    differ: list[tuple[str, str]] = []
    for key in (key for key in keys if key != SEED):
        found = list(dict.fromkeys(_json(group.settings[key]) for group in story.groups if key in group.settings))
        everywhere = all(key in group.settings for group in story.groups)
        (shared if len(found) == 1 and everywhere else differ).append((key, visible(", ".join(found))))
    seeds = sorted({seed for group in story.groups for seed in group.runs})
    (shared if len(seeds) == 1 else differ).append((SEED, ", ".join(map(str, seeds))))
    return shared, differ


def _json(found: Any) -> str:
    if isinstance(found, list) and len({json.dumps(one) for one in found}) == 1:
        found = found[0]
    return found if isinstance(found, str) else json.dumps(found, ensure_ascii=False)


def provenance(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """Commands, versions, machines and sources, each said once."""

    def once(found: Sequence[str]) -> list[str]:
        return list(dict.fromkeys(found))

    def told(run: Run) -> str:
        program, *words = run.record.get("command") or ["spin-reg"]
        name = Path(program).name
        verb = [] if words and words[0] in verbs.TABLE else ["train"]  # older records do not have it
        return shlex.join(["spin-reg" if name == "__main__.py" else name, *verb, *_kept(words)])

    machines = [_machine(run.record) for run in runs]
    versions = [", ".join(f"{k} {v}" for k, v in run.record["versions"].items()) for run in runs]
    sources = [f"{kind}: {visible(words)}" for run in runs for kind, words in _sources(run.record)]
    rows = [("command", once([visible(told(run)) for run in runs])), ("versions", once(versions))]
    rows += [("machine", once(machines)), ("sources", once(sources))]
    return [(key, "\n".join(found)) for key, found in rows if any(found)]


def _kept(words: Sequence[str]) -> list[str]:
    """A command without what the program adds for itself."""
    return [word for word in words if not word.startswith("hydra.sweep.dir=")]


def _machine(record: Any) -> str:
    machine = record.get("machine", {})
    return (
        f"{machine.get('platform', 'unknown')}, {machine.get('cpus', '?')} CPUs, threads: {record.get('threads', '?')}"
    )


def _sources(record: Any) -> list[tuple[str, str]]:
    found = []
    for kind, source in record["sources"].items():
        sums = [str(one) for one in source.get("sha256", []) if one] if isinstance(source, dict) else []
        commit = source.get("commit") if isinstance(source, dict) else None
        words = [*([f"commit {commit}"] if commit else []), *(f"sha256 {s[:16]}…" if len(s) == 64 else s for s in sums)]
        if words:
            found.append((kind, ", ".join(words)))
    return found
