"""A run's folder as values: what `report` shows of it. Reads files alone; `metrics.jsonl` is the truth."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spin_reg import opponents, pace, results, rundir
from spin_reg.errors import ConfigError, DamagedError, SpinRegError
from spin_reg.opponents import Generator, Geometric, Iterate, Reference
from spin_reg.results import Values
from spin_reg.runner import METRICS
from spin_reg.scoreboard import how

Row = dict[str, Any]
SUBSCRIPTS = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")


@dataclass(frozen=True)
class Step:
    """One optimiser step of an iteration (from 1)."""

    iteration: int
    step: int
    values: Values


@dataclass(frozen=True)
class Played:
    """One iteration of the plan: against what, with what, and how far it is."""

    t: int
    made: bool
    answers: str
    reference: str
    settings: Mapping[str, Any]
    steps: int
    seconds: float | None  # of its training, where it was made here in one go


@dataclass(frozen=True)
class Run:
    """What a run's folder says.

    Attributes:
        record: run.json.
        iterates: the metrics of every iterate that was evaluated, with their standard errors as NAME_se.
        benchmarks: the same for tasks of lm-eval; a name says how the task was asked.
        crossplay: A[i, j] by (i, j).
        counts: examples of each split; empty before the data are prepared.
    """

    root: Path
    record: Mapping[str, Any]
    iterates: Mapping[int, Values]
    benchmarks: Mapping[int, Values]
    steps: Sequence[Step]
    crossplay: Mapping[tuple[int, int], Values]
    samples: Sequence[Row]
    counts: Mapping[str, int]
    plan: Sequence[Played]
    stopped: str | None

    @property
    def settings(self) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self.record["settings"]
        return found

    @property
    def seed(self) -> int:
        return int(self.settings["seed"])

    @property
    def state(self) -> str:
        """How far it is, in words."""
        made, planned = sum(played.made for played in self.plan), self.record["iterations"]
        judged = len([k for k in self.iterates if k <= made])
        unjudged = "" if judged == made + 1 else f", {judged} of {made + 1} iterates evaluated"
        if self.stopped is not None:
            return f"ended early after {made} of {planned} iterations{unjudged}"
        if made < planned:
            return f"unfinished: {made} of {planned} iterations{unjudged}"
        return f"{planned} iterations{unjudged}" if unjudged else f"finished, {planned} iterations"


def roots(folders: Sequence[Path]) -> list[Path]:
    """The runs that these folders are, or hold.

    Raises:
        ConfigError: one is not there, or is no run and holds none.
    """
    found: list[Path] = []
    for folder in folders:
        alone = (folder / rundir.RUN).exists()
        inside = [folder] if alone else sorted(path.parent for path in folder.glob(f"*/{rundir.RUN}"))
        if not inside:
            why = "it holds no run" if folder.is_dir() else "there is no such folder"
            todo = "give a run's folder, or one that holds runs; spin-reg status lists runs"
            raise ConfigError("There is nothing to report on.", where=str(folder), why=why, todo=todo)
        found += inside
    return list(dict.fromkeys(path.resolve() for path in found))


def runs(folders: Sequence[Path]) -> tuple[list[Run], list[SpinRegError]]:
    """The runs, and of those that cannot be read why not."""
    found: list[Run] = []
    failures: list[SpinRegError] = []
    for root in folders:
        try:
            found.append(run(root))
        except DamagedError as error:
            failures.append(error)
    return found, failures


def run(root: Path) -> Run:
    """What the folder of a run holds, finished or not.

    Raises:
        DamagedError: run.json or metrics.jsonl is not what was written.
    """
    record = rundir.provenance(root)
    if record is None:
        raise rundir.damaged_run(root / rundir.RUN, "it is missing")
    rows = _rows(root / METRICS)
    last = max([record["iterations"], *(row["iterate"] for row in rows if "iterate" in row)])
    steps = [
        Step(row["iteration"], row["step"], _values(row, "train/"))
        for row in rows
        if "iterate" not in row and row.get("iteration", -1) >= 0
    ]
    return Run(
        root=root,
        record=record,
        iterates=_by_iterate([row for row in rows if "lm_eval" not in row]),
        benchmarks=_by_iterate([_named(row) for row in rows if "lm_eval" in row]),
        steps=steps,
        crossplay=results.crossplay(root, last),
        samples=results.samples(root, last),
        counts=_counts(root),
        plan=[_played(root, t, steps, seconds) for seconds in [_seconds(root)] for t in range(record["iterations"])],
        stopped=_stopped(root),
    )


def _rows(path: Path) -> list[Row]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    except UnicodeDecodeError as error:
        raise _damaged(path, str(error)) from error
    try:
        rows = [json.loads(line) for line in lines]
    except ValueError:
        for number, line in enumerate(lines, start=1):
            try:
                json.loads(line)
            except ValueError as error:
                raise _damaged(path, f"line {number}: {error}") from error
        raise
    if not all(isinstance(row, dict) for row in rows):
        raise _damaged(path, "a line is no JSON object")
    return rows


def _damaged(path: Path, why: str) -> DamagedError:
    todo = f"spin-reg resume {path.parent} puts it together again"
    return DamagedError("The metrics of a run are damaged.", where=str(path), why=why, todo=todo)


def _values(row: Row, prefix: str) -> Values:
    """The numbers of a row; what is not finite is none."""
    numbers = ((key, value) for key, value in row.items() if key.startswith(prefix) and type(value) in (int, float))
    return {key: float(value) for key, value in numbers if math.isfinite(value)}


def _by_iterate(rows: Sequence[Row]) -> dict[int, Values]:
    found: dict[int, Values] = {}
    for row in rows:
        values = _values(row, "eval/")
        if "iterate" in row and values:
            found.setdefault(row["iterate"], {}).update(values)
    return dict(sorted(found.items()))


def _named(row: Row) -> Row:
    """A benchmark's row with the way it was asked in the names of its metrics: another way is another metric."""

    def name(key: str) -> str:
        task, metric = key.removeprefix("eval/").split("/", 1)
        return f"eval/{task} ({how(row)})/{metric}"

    return {name(key) if key.startswith("eval/") else key: value for key, value in row.items()}


def _counts(root: Path) -> dict[str, int]:
    try:
        content = rundir.read(root / "data", "summary.json")
    except DamagedError:  # the data are checked when they are used; here they are only counted
        content = None
    return {} if content is None else dict(json.loads(content)["counts"])


def _seconds(root: Path) -> dict[str, float]:
    """What the run's log says that its stages took."""
    path = root / "run.log"
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    return {name: timed.seconds for name, timed in pace.timed(text).items() if timed.left == 0}


def _played(root: Path, t: int, steps: Sequence[Step], seconds: Mapping[str, float]) -> Played:
    """An iteration as the manifests of its stages tell of it."""
    trained = rundir.readable(root / f"iterate-{t + 1:02d}" / "model")
    paired = rundir.readable(root / f"iteration-{t:02d}")
    spec = (trained or paired or {"spec": {}})["spec"]
    return Played(
        t=t,
        made=trained is not None,
        answers=_sampler(spec, paired),
        reference=compared(opponents.from_json(spec["reference"])) if "reference" in spec else "",
        settings={key: spec[key] for key in ("beta", "learning_rate", "epochs") if key in spec},
        steps=max((step.step for step in steps if step.iteration == t), default=0),
        seconds=seconds.get(f"iteration-{t:02d}/train"),
    )


def _sampler(spec: Mapping[str, Any], paired: Mapping[str, Any] | None) -> str:
    """Who answered: one iterate, or a draw over several."""
    window = spec.get("window", [])
    draw = (paired or {"spec": {}})["spec"].get("draw")
    names = [pi(k) for k in window]
    if len(names) < 2:
        return "".join(names)
    return ("a draw over " if draw else "each of ") + ", ".join(names)


def pi(k: int) -> str:
    """Iterate k."""
    return "π" + str(k).translate(SUBSCRIPTS)


def compared(node: Reference) -> str:
    """A reference as one writes it: powers of a geometric mixture, shares of an arithmetic one."""
    if isinstance(node, Iterate):
        return pi(node.k)
    if isinstance(node, Generator):
        return "the iterate that answered"
    parts = [(weight, compared(part)) for weight, part in node.parts]
    if isinstance(node, Geometric):
        inside = [words if words.startswith("π") and " " not in words else f"({words})" for _, words in parts]
        return " · ".join(f"{words}^{weight:.3g}" for words, (weight, _) in zip(inside, parts, strict=True))
    if len({f"{weight:.9f}" for weight, _ in parts}) == 1:
        return "mean of " + ", ".join(words for _, words in parts)
    return " + ".join(f"{weight:.3g} {words}" for weight, words in parts)


def _stopped(root: Path) -> str | None:
    path = root / results.STOPPED
    if not path.is_file():
        return None
    try:
        return str(json.loads(path.read_bytes())["why"])
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(path, str(error)) from error
