"""Runs that differ in nothing but the seed, and what is said of them together. Pure arithmetic over values."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from statistics import fmean, stdev
from typing import Any

from spin_reg import metrics
from spin_reg.fingerprint import canonical
from spin_reg.groups import contents, experiment
from spin_reg.report.gather import Run

SEED, CHOICE, ALPHA = "seed", "regularizer._choice", "regularizer.alpha"
Settings = Mapping[str, Any]


def kind(settings: Mapping[str, Any]) -> str:
    """The regularizer's name; of a loss without an opponent, the loss's."""
    return str(settings.get(CHOICE) or settings["loss.name"])


@dataclass(frozen=True)
class Group:
    """Runs by seed, and what sets them apart from the other groups on the page."""

    label: str
    runs: Mapping[int, Run]

    @property
    def settings(self) -> Settings:
        return next(iter(self.runs.values())).settings

    @property
    def regularizer(self) -> str:
        return kind(self.settings)

    @property
    def alpha(self) -> float | None:
        """The weight of the base in the reference, where it is one number for all iterations; SPIN is alpha 0."""
        if self.regularizer == "none":
            return 0.0
        found = self.settings.get(ALPHA)
        return float(found[0]) if isinstance(found, list) and len(set(found)) == 1 else None


@dataclass(frozen=True)
class Stat:
    """A mean over seeds. `sd`: the sample standard deviation (n - 1 below the root); None of a single value."""

    mean: float
    sd: float | None
    n: int


def stat(values: Sequence[float]) -> Stat | None:
    """Mean and spread; None of nothing."""
    if not values:
        return None
    return Stat(fmean(values), stdev(values) if len(values) > 1 else None, len(values))


def group(runs: Sequence[Run]) -> tuple[list[Group], list[Run]]:
    """The runs by all settings but the seed, SPIN first and strengths in order; and the runs that repeat another one
    (same settings, same seed): they are no further seed, so they are left out. Of equals the longest stays.
    """
    found: dict[str, dict[int, Run]] = {}
    repeats: list[Run] = []
    for run in sorted(runs, key=lambda run: (-len(run.iterates), run.root.name)):
        seeds = found.setdefault(canonical(experiment(run.settings, contents(run.record))), {})
        if run.seed in seeds:
            repeats.append(run)
        else:
            seeds[run.seed] = run
    made = [dict(sorted(seeds.items())) for seeds in found.values()]
    labels = label([_made_of(next(iter(seeds.values()))) for seeds in made])
    groups = [Group(words, seeds) for words, seeds in zip(labels, made, strict=True)]
    return sorted(groups, key=_place), repeats


def _made_of(run: Run) -> Settings:
    """The settings, and the contents of what they name: the same path may hold other data in another run."""
    return {**run.settings, **contents(run.record)}


def _place(group: Group) -> tuple[bool, str, float, str]:
    return group.regularizer != "none", group.regularizer, group.alpha if group.alpha is not None else -1.0, group.label


def _key(settings: Settings, *without: str) -> str:
    return canonical({key: value for key, value in settings.items() if key not in without})


def label(settings: Sequence[Settings]) -> list[str]:
    """Short names that differ where settings do: the regularizer, its alpha, then every other setting that varies."""
    made = []
    for mine in settings:
        same = [other for other in settings if kind(other) == kind(mine)]
        words = [kind(mine) + (f" {_short(mine[ALPHA])}" if ALPHA in mine else "")]
        for key in mine:
            beside = same if key.startswith("regularizer.") else settings
            if key not in (SEED, CHOICE, ALPHA) and len({canonical(other.get(key)) for other in beside}) > 1:
                words.append(f"{_called(key, settings)} {_short(mine[key])}")
        made.append(", ".join(words))
    return made


def _called(key: str, settings: Sequence[Settings]) -> str:
    """As little of a key's end as no other key has; `alpha` and `seed` alone are the regularizer's and the run's."""
    parts = key.removesuffix("._choice").removesuffix(".name").split(".")
    every = {other.removesuffix("._choice").removesuffix(".name") for some in settings for other in some}
    for n in range(1, len(parts)):
        tail = ".".join(parts[-n:])
        if tail not in ("alpha", "seed") and sum(f".{other}".endswith(f".{tail}") for other in every) == 1:
            return tail
    return ".".join(parts)


def _short(value: Any) -> str:
    if isinstance(value, list) and len({canonical(part) for part in value}) == 1:
        return _short(value[0])
    if isinstance(value, list):
        return "/".join(_short(part) for part in value)
    return f"{value:g}" if isinstance(value, float) else "null" if value is None else str(value)


def of_run(run: Run, metric: str) -> dict[int, float]:
    """A metric by iterate."""
    return {k: values[metric] for k, values in run.iterates.items() if metric in values}


def curve(group: Group, metric: str) -> dict[int, Stat]:
    """Mean and spread over the seeds by iterate: over those that reached it."""
    curves = [of_run(run, metric) for run in group.runs.values()]
    by_iterate = {
        k: stat([values[k] for values in curves if k in values]) for k in sorted({k for c in curves for k in c})
    }
    return {k: found for k, found in by_iterate.items() if found is not None}


def training(group: Group, metric: str, most: int) -> tuple[dict[int, list[tuple[float, float]]], int]:
    """Points (iteration + share of its steps, mean over seeds) of each iteration, and how many steps in a row one point
    is the mean of: 1 while an iteration has no more than `most` steps.
    """
    values: dict[tuple[int, int], list[float]] = {}
    for run in group.runs.values():
        for step in run.steps:
            if metric in step.values:
                values.setdefault((step.iteration, step.step), []).append(step.values[metric])
    points: dict[int, list[tuple[float, float]]] = {}
    longest = 1
    for t, keys in groupby(sorted(values), key=lambda key: key[0]):
        steps = [step for _, step in keys]
        every = -(-len(steps) // most)
        longest = max(longest, every)
        for some in (steps[i : i + every] for i in range(0, len(steps), every)):
            mean = fmean(fmean(values[t, step]) for step in some)
            points.setdefault(t, []).append((t + fmean(some) / max(steps), mean))
    return points, longest


@dataclass(frozen=True)
class Verdict:
    """How one run went by one metric over its iterates. `best` is among all of them, the base too."""

    base: float
    best: float
    best_at: int
    last: float
    last_at: int
    instability: float
    drawdown: float


def verdict(run: Run, metric: str) -> Verdict | None:
    """None where the metric of the base, or of any other iterate, is not there."""
    values = of_run(run, metric)
    if 0 not in values or len(values) < 2:
        return None
    bad = [metrics.badness(metric, value) for value in values.values()]
    at = min(values, key=lambda k: metrics.badness(metric, values[k]))
    last = max(values)
    return Verdict(values[0], values[at], at, values[last], last, metrics.instability(bad), metrics.drawdown(bad))


def verdicts(group: Group, metric: str) -> dict[int, Verdict]:
    """By seed."""
    found = {seed: verdict(run, metric) for seed, run in group.runs.items()}
    return {seed: made for seed, made in found.items() if made is not None}


def over(made: Mapping[int, Verdict], field: Callable[[Verdict], float]) -> Stat | None:
    """Mean and spread over seeds of one number of the verdicts."""
    return stat([field(one) for one in made.values()])


def paired(mine: Mapping[int, Verdict], other: Mapping[int, Verdict], field: Callable[[Verdict], float]) -> Stat | None:
    """Mean and spread of the differences mine - other, seed by seed, over the seeds that both have."""
    return stat([field(mine[seed]) - field(other[seed]) for seed in mine if seed in other])


def shared(made: Sequence[Mapping[int, Verdict]]) -> list[Mapping[int, Verdict]]:
    """The verdicts of the seeds that all of them have, to compare like with like; all, if there are none."""
    common = set.intersection(*(set(one) for one in made))
    return [{seed: one[seed] for seed in one if seed in common or not common} for one in made]


def best_of(group: Group, metric: str) -> int | None:
    """The iterate whose mean over the seeds is best."""
    return metrics.best(metric, {k: found.mean for k, found in curve(group, metric).items()})


def main_metric(runs: Sequence[Run]) -> str:
    """What iterates are judged by unless one asks otherwise: KL(data to iterate) where the data are known."""
    known = "eval/kl_data"
    judged = [run for run in runs if run.iterates]
    return known if judged and all(known in run.iterates[min(run.iterates)] for run in judged) else "eval/heldout_nll"


def families(groups: Sequence[Group]) -> list[list[Group]]:
    """Groups of one regularizer that differ in alpha alone, SPIN with them as alpha 0, where there are two at least."""
    found: dict[str, list[Group]] = {}
    for one in groups:
        if one.alpha is not None and ALPHA in one.settings:
            found.setdefault(_key(one.settings, SEED, ALPHA), []).append(one)
    for family in found.values():
        rest = _game(family[0].settings)
        if family[0].settings.get("regularizer.history") == 1:
            family[:0] = [one for one in groups if one.regularizer == "none" and _game(one.settings) == rest][:1]
    return [family for family in found.values() if len({one.alpha for one in family}) > 1]


def _game(settings: Settings) -> str:
    """All but the regularizer and the seed."""
    return canonical({key: v for key, v in settings.items() if key != SEED and not key.startswith("regularizer.")})


def crossplay(group: Group) -> dict[tuple[int, int], Stat]:
    """A[i, j]: mean and spread over the seeds for which it is known."""
    cells = sorted({cell for run in group.runs.values() for cell in run.crossplay})
    known = {
        c: stat([run.crossplay[c]["accuracy"] for run in group.runs.values() if c in run.crossplay]) for c in cells
    }
    return {cell: found for cell, found in known.items() if found is not None}
