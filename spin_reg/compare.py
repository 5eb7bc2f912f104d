"""`spin-reg compare`: two runs, or two sets of seeds, beside each other: settings, metrics, answers."""

import glob
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from spin_reg import groups, listing, manual, metrics, named, rundir, sheet, survey
from spin_reg.console import COLUMNS
from spin_reg.errors import ConfigError
from spin_reg.fingerprint import flatten
from spin_reg.groups import Run, Spread
from spin_reg.launch import CONFIG

SAMPLES = 3  # prompts
SETTING = re.compile(r"\s+([\w.]+)=(\S*)\s*$")
OWN = ("run_name", "outputs", "alpha")  # where a run lies, not how it was made; what regularizer.alpha says too


@dataclass(frozen=True)
class Row:
    """A metric of an iterate on both sides; `difference`: B - A, paired by seed."""

    metric: str
    iterate: int
    a: Spread | None
    b: Spread | None
    difference: Spread | None


def main(words: Sequence[str]) -> int:
    """The verb.

    Raises:
        ConfigError: a side is no run, or runs that differ in more than the seed. DamagedError: a run is damaged.
    """
    given = manual.parsed("compare", words)
    count = SAMPLES if given.samples is None else given.samples
    a, b = side(given.a), side(given.b)
    settings, rows = apart(a, b), compared(a, b, _names(a, b, given.metric or [], everything=given.all))
    whose, seed, answers = samples(a, b, given.iterate, given.by)
    if given.json:
        sheet.show_json(_json(a, b, settings, rows) | {"samples": {"iterates": whose, "seed": seed, "rows": answers}})
        return 0
    sheet.part("settings that differ" if settings else "the settings are the same")
    if settings:
        sheet.show("", ("setting", "A", "B"), [[key, *values] for key, values in settings.items()])
    sheet.part(f"metrics   A: {_seeds(a)}   B: {_seeds(b)}")
    sheet.show("", ("metric", "iterate", "A", "B", "B - A", "n"), [_cells(row) for row in rows], right=RIGHT)
    if count and answers:
        sheet.part(f"samples   A: iterate {whose[0]}, B: iterate {whose[1]}, seed {seed}")
        listed = [[row[key] for key in ("prompt", "real", "a", "b")] for row in answers[:count]]
        sheet.show("", ("prompt", "real", "A", "B"), listed)
    return 0


RIGHT = ("iterate", "A", "B", "B - A", "n")


def side(text: str) -> tuple[Run, ...]:
    """The runs that one side names, by seed: a place, and behind it settings that they have.

    Raises:
        ConfigError: there is none, or they differ in more than the seed. DamagedError: one is damaged.
    """
    wanted: dict[str, str] = {}
    while not Path(text).expanduser().exists() and (setting := SETTING.search(text)):
        wanted[setting[1]], text = setting[2], text[: setting.start()]
    place = Path(text).expanduser()
    places = [place] if place.exists() else [Path(path) for path in sorted(glob.glob(str(place)))]
    there = [run for path in places for root in survey.roots(path) if (run := groups.read(root)) is not None]
    found = [
        run for run in there if all(listing.means(listing.named(run.settings).get(k), v) for k, v in wanted.items())
    ]
    if there and not found:
        asked = " ".join(f"{key}={value}" for key, value in wanted.items())
        raise ConfigError("Which run?", where=text, why=f"none there has {asked}", todo="spin-reg ls lists them")
    sets = groups.grouped(found)
    if not sets:
        why = "no run.json lies there" if places else "it does not exist"
        raise ConfigError("Which run?", where=text, why=why, todo="give a run's folder; spin-reg ls lists them")
    if len(sets) > 1:
        names = groups.differing([listing.named(runs[0].settings) | dict(runs[0].contents) for runs in sets])
        keys = ", ".join(f"{key}: {_list(values)}" for key, values in names.items() if key != groups.SEED)
        key = next((key for key in names if key != groups.SEED and not key.startswith("sources.")), None)
        way = "by its folders" if key is None else f"as '{text} {key}={listing.said(names[key][0])}'"
        todo = f"a side is the same but for the seed: give one, {way}"
        raise ConfigError("One side of a comparison is several experiments.", where=text, why=keys, todo=todo)
    return sets[0]


def apart(a: Sequence[Run], b: Sequence[Run]) -> dict[str, tuple[str, str]]:
    """The settings that differ between the sides; where the runs of a side differ (the seed), all of its values."""
    whole = [[_config(run) | dict(run.contents) for run in runs] for runs in (a, b)]
    found = {}
    for key in groups.differing([some for runs in whole for some in runs]):
        left, right = (_list([some.get(key) for some in runs]) for runs in whole)
        if left != right:
            found[key] = (left, right)
    return found


def _config(run: Run) -> dict[str, Any]:
    """All settings of a run, by config.yaml; where that cannot be read, those of run.json."""
    path = run.root / CONFIG
    try:
        tree = yaml.load(path.read_bytes(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        return listing.named({key: value for key, value in flatten(tree).items() if key not in OWN})
    except (OSError, yaml.YAMLError, AttributeError, TypeError) as error:
        print(f"warning: {path}: {type(error).__name__}; run.json's settings are compared", file=sys.stderr)
        return listing.named(run.settings)


def _list(values: Sequence[Any]) -> str:
    return ", ".join(dict.fromkeys(listing.said(value) for value in values))


def _names(a: Sequence[Run], b: Sequence[Run], asked: Sequence[str], *, everything: bool) -> list[str]:
    """The metrics to be shown, of those that either side has.

    Raises:
        ConfigError: neither side has one that was asked for.
    """
    values = [some for run in (*a, *b) for some in run.metrics.values()]
    known = [name for name in dict.fromkeys(key for some in values for key in some) if not name.endswith("_se")]
    for name in asked:
        if f"eval/{name.removeprefix('eval/')}" not in known:
            todo = f"measured: {', '.join(name.removeprefix('eval/') for name in known) or 'nothing'}"
            raise ConfigError(f"There is no metric {name}.", where="--metric", why="neither side has it", todo=todo)
    shown = asked or (known if everything else COLUMNS)
    full = [f"eval/{name.removeprefix('eval/')}" for name in shown]
    return [name for name in full if name in known]


def compared(a: Sequence[Run], b: Sequence[Run], names: Sequence[str]) -> list[Row]:
    """These metrics of every iterate that either side has."""
    rows = []
    for name in names:
        for k in sorted({k for run in (*a, *b) for k, values in run.metrics.items() if name in values}):
            left, right = (groups.spread(groups.by_seed(runs, name, k).values()) for runs in (a, b))
            rows.append(Row(name, k, left, right, groups.difference(a, b, name, k)))
    return rows


def samples(
    a: Sequence[Run], b: Sequence[Run], name: str | None, by: str | None
) -> tuple[list[int], int | None, list[dict[str, str]]]:
    """Answers of both sides to the same prompts: of which iterates, of which seed (None: they share none), and they.

    Args:
        name: of the iterate on each side (see `named`), `best` by a metric; None: the newest that both have.
    """
    both = [run.seed for run in a if run.seed in {other.seed for other in b}]
    one, other = (next((run for run in runs if run.seed in both[:1]), runs[0]) for runs in (a, b))
    shared = sorted(one.metrics.keys() & other.metrics.keys())
    if name is None and not shared:
        return [], None, []
    whose = [shared[-1] if name is None else named.number(run.root, name, by)[0] for run in (one, other)]
    left, right = (_answers(run.root, k) for run, k in zip((one, other), whose, strict=True))
    rows = [
        {"prompt": prompt, "real": real, "a": left[prompt, real], "b": right[prompt, real]}
        for prompt, real in left
        if (prompt, real) in right
    ]
    return whose, next(iter(both), None), rows


def _answers(root: Path, k: int) -> Mapping[tuple[str, str], str]:
    content = rundir.read(root / f"iterate-{k:02d}/evaluate", "samples.json")
    rows = [] if content is None else json.loads(content)
    return {(row["prompt"], row["real"]): row["generated"] for row in rows}


def _seeds(runs: Sequence[Run]) -> str:
    many = f"seeds {_list([run.seed for run in runs])}" if len(runs) > 1 else f"seed {runs[0].seed}"
    return f"{runs[0].root.name} ({many})"


def _cells(row: Row) -> list[str]:
    star = ""
    if row.a and row.b and row.metric in metrics.HEALTHY:
        other = row.b.mean if row.difference is None else row.a.mean + row.difference.mean  # paired, where that can be
        a, b = (metrics.badness(row.metric, mean) for mean in (row.a.mean, other))
        star = "a" if a < b else "b" if b < a else ""
    return [
        row.metric.removeprefix("eval/"),
        "0 base" if row.iterate == 0 else str(row.iterate),
        _words(row.a) + "*" * (star == "a"),
        _words(row.b) + "*" * (star == "b"),
        _words(row.difference, sign="+"),
        "" if row.difference is None else str(row.difference.n),
    ]


def _words(found: Spread | None, sign: str = "") -> str:
    if found is None:
        return ""
    return (f"{found.mean:{sign}.4g}" if found.mean else "0") + ("" if found.sd is None else f" ± {found.sd:.2g}")


def _json(
    a: Sequence[Run], b: Sequence[Run], settings: Mapping[str, tuple[str, str]], rows: Sequence[Row]
) -> dict[str, Any]:
    sides = {
        name: [{"path": str(run.root.resolve()), "seed": run.seed} for run in runs]
        for name, runs in (("a", a), ("b", b))
    }
    listed = {key: dict(zip(("a", "b"), values, strict=True)) for key, values in settings.items()}
    return {**sides, "settings": listed, "metrics": [asdict(row) for row in rows]}
