"""The iterates of a run by name: best, last, base, or a number. Reads files alone."""

import shlex
from dataclasses import dataclass
from pathlib import Path

from spin_reg import metrics, results, rundir
from spin_reg.errors import ConfigError

BEST, LAST, BASE = "best", "last", "base"
NAMES = (BEST, LAST, BASE)
BY = "eval/heldout_nll"  # every run has it, all iterates are judged on the same answers, and its better side is plain


@dataclass(frozen=True)
class Named:
    """An iterate, where it lies (with its weights, or with the record of its base), and how it was named, in words."""

    k: int
    folder: Path
    words: str


def iterate(root: Path, name: str, by: str | None = None) -> Named:
    """The iterate of the run in `root` that a name means.

    Args:
        name: `best` by a metric (of equals the first; the base counts), `last` of those that are there, `base`, or a
            number. by: the metric of `best`, with or without `eval/` in front; None: BY.

    Raises:
        ConfigError: it is not there, or is no name; the metric has no better side, or was not measured. DamagedError:
            the iterate's files are not whole.
    """
    there = _there(root)
    k, words = number(root, name, by)
    if k not in there:
        path = root / f"iterate-{k:02d}" / "model"
        path = path if path.exists() else path.parent  # a base that was used as it is
        gone = (rundir.readable(path) or {}).get("removed")
        again = f"rm -r {shlex.quote(str(path))}; spin-reg resume {shlex.quote(str(root))} keep_iterates=all"
        raise ConfigError(
            "This iterate is not there.",
            where=f"{root}, --iterate {name}" + (f", which is {words}" if words != name else ""),
            why=("its weights were removed; " if gone else "") + _listed(there),
            todo=f"{again} makes it again" if gone else f"spin-reg resume RUN schedule.iterations={k} makes it",
        )
    made = rundir.manifest(there[k])
    assert made is not None
    rundir.check_hashes(there[k], made)
    return Named(k, there[k], f"iterate {k}" if words in (str(k), LAST, BASE) else words)


def number(root: Path, name: str, by: str | None = None) -> tuple[int, str]:
    """The number of the iterate that a name means, and how it is named in words.

    Raises:
        ConfigError: it is no name; the metric has no better side, or was not measured.
    """
    if by is not None and name != BEST:
        todo = f"give --iterate {BEST}, or leave --by out"
        raise ConfigError(
            "A metric names no iterate here.", where=f"--by {by}", why=f"only {BEST} is by one", todo=todo
        )
    if name == BEST:
        return _best(root, by or BY)
    there = _there(root)
    if name == LAST:
        return max(there, default=0), name
    if name == BASE:
        return 0, name
    if not name.isdecimal():
        why = f"it is neither a number nor one of {', '.join(NAMES)}"
        raise ConfigError("This names no iterate.", where=f"--iterate {name}", why=why, todo=_listed(there))
    return int(name), name


def _there(root: Path) -> dict[int, Path]:
    """The iterates that are there with their weights, or with the record of their base."""
    found = {}
    for path in [root / "iterate-00", *sorted(root.glob("iterate-*/model"))]:
        made = rundir.readable(path)
        if made is not None and not made["removed"]:
            name = path.name if path.name.startswith("iterate-") else path.parent.name
            found[int(name.removeprefix("iterate-"))] = path
    return found


def _listed(there: dict[int, Path]) -> str:
    return f"with their weights: {', '.join(map(str, sorted(there))) or 'none'}"


def _best(root: Path, by: str) -> tuple[int, str]:
    """The best iterate by a metric, and why in words."""
    name = by if by.startswith("eval/") else f"eval/{by}"
    iterations = max((int(path.name.removeprefix("iterate-")) for path in root.glob("iterate-??")), default=0)
    found = results.evaluated(root, iterations)
    values = {k: values[name] for k, values in found.items() if name in values}
    if name not in metrics.HEALTHY or not values:
        measured = {known for values in found.values() for known in values} & set(metrics.HEALTHY)
        why = "no side of it is better by itself" if values else f"it was not measured for any iterate of {root}"
        usable = ", ".join(sorted(known.removeprefix("eval/") for known in measured))
        todo = f"give one of {usable}" if usable else "spin-reg evaluate RUN; or give --iterate last, base or a number"
        raise ConfigError("No iterate is best by this.", where=f"--by {by}", why=why, todo=todo)
    k = min(values, key=lambda i: metrics.badness(name, values[i]))
    return k, f"iterate {k}, the best of {len(values)} by {name}: {values[k]:.4g}"
