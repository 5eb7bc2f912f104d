"""Runs that differ only in the seed: which ones they are, and what their metrics say together."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from spin_reg import results, rundir
from spin_reg.results import Values
from spin_reg.stage import PLACES

SEED = "seed"


@dataclass(frozen=True)
class Run:
    """A run as its folder tells it.

    Attributes:
        settings: those that change results, as run.json has them: {dotted key: value}; the seed is one of them.
        metrics: of every iterate that was evaluated.
        contents: hashes of the model and of the data that they name; the same path may hold others in another run.
    """

    root: Path
    settings: Mapping[str, Any]
    metrics: Mapping[int, Values]
    contents: Mapping[str, str] = field(default_factory=dict)

    @property
    def seed(self) -> int:
        return int(self.settings[SEED])


@dataclass(frozen=True)
class Spread:
    """Mean, standard deviation (n - 1 in the denominator; None where n is 1) and number of values."""

    mean: float
    sd: float | None
    n: int


def read(root: Path) -> Run | None:
    """The run in this folder; None where there is none.

    Raises:
        DamagedError: its run.json is damaged.
    """
    saved = rundir.provenance(root)
    if saved is None:
        return None
    return Run(root, saved["settings"], results.evaluated(root, saved["iterations"]), contents(saved))


def contents(saved: Mapping[str, Any]) -> dict[str, str]:
    """What a run was made from, by its run.json: how the hashes of `model` and `data` begin, of those that have one."""
    sums = {role: saved.get("sources", {}).get(role, {}).get("sha256", []) for role in ("model", "data")}
    return {f"sources.{role}": " ".join(str(s)[:8] for s in of if s) for role, of in sums.items()}


def experiment(settings: Mapping[str, Any], of: Mapping[str, str]) -> dict[str, Any]:
    """What runs have in common that differ in the seed alone; of what lies somewhere the contents count."""
    named = {key for key, role in PLACES.items() if of.get(f"sources.{role}")}
    return {key: value for key, value in settings.items() if key != SEED and key not in named} | dict(of)


def grouped(runs: Iterable[Run]) -> list[tuple[Run, ...]]:
    """Runs that differ only in the seed, ordered by it; groups in the order of their first run.

    Of two runs with the same settings, seed and all, the one with more iterates judged counts, else the first.
    """
    found: dict[str, dict[int, Run]] = {}
    for run in runs:
        seeds = found.setdefault(json.dumps(experiment(run.settings, run.contents), sort_keys=True), {})
        if run.seed not in seeds or len(run.metrics) > len(seeds[run.seed].metrics):
            seeds[run.seed] = run
    return [tuple(seeds[seed] for seed in sorted(seeds)) for seeds in found.values()]


def differing(settings: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """The keys whose values are not the same everywhere, each with its value in every one (None where it has none)."""
    keys = dict.fromkeys(key for some in settings for key in some)
    columns = {key: [some.get(key) for some in settings] for key in keys}
    return {key: values for key, values in columns.items() if any(value != values[0] for value in values)}


def spread(values: Iterable[float]) -> Spread | None:
    """Mean and standard deviation of some numbers; None of none."""
    listed = list(values)
    if not listed:
        return None
    return Spread(fmean(listed), stdev(listed) if len(listed) > 1 else None, len(listed))


def by_seed(group: Sequence[Run], metric: str, k: int) -> dict[int, float]:
    """A metric of iterate k for every seed that has it."""
    return {run.seed: run.metrics[k][metric] for run in group if metric in run.metrics.get(k, {})}


def difference(one: Sequence[Run], other: Sequence[Run], metric: str, k: int) -> Spread | None:
    """`other` less `one` at iterate k, seed by seed, over the seeds that both have; None where they share none."""
    left, right = by_seed(one, metric, k), by_seed(other, metric, k)
    return spread(right[seed] - left[seed] for seed in sorted(left.keys() & right.keys()))
