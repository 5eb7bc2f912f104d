"""What the evaluations of a run say: the metrics by iterate, the cross-play matrix, and whether to play on."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

from spin_reg import durable, metrics, rundir
from spin_reg.errors import ConfigError, DamagedError
from spin_reg.fingerprint import plain
from spin_reg.settings import Schedule
from spin_reg.specs import BenchmarkSpec, ConverseSpec, EvaluateSpec, JudgeSpec, QuestionsSpec, TrainSpec
from spin_reg.stage import Stage

Values = dict[str, float]
Late = BenchmarkSpec | ConverseSpec | JudgeSpec  # what may stand at the end of a plan
STOPPED = "stopped.json"


def evaluations(stages: list[Stage], there: set[str]) -> set[str]:
    """The names of the stages that evaluate the iterates among `there`, and of all that those need."""
    kept: set[str] = set()

    def keep(stage: Stage) -> None:
        if stage.name not in kept:
            kept.add(stage.name)
            for need in stage.needs.values():
                keep(need)

    for stage in stages:
        if isinstance(stage.spec, EvaluateSpec | Late) and judged_model(stage).name in there:
            keep(stage)
    return kept


def judged_model(stage: Stage) -> Stage:
    """The stage that made the iterate which a stage judges."""
    return stage.needs["model"] if "model" in stage.needs else stage.needs["answers"].needs["model"]


def _read(root: Path, k: int, name: str) -> Any:
    """A file of an iterate's evaluation; None where it has none."""
    try:
        content = rundir.read(root / f"iterate-{k:02d}" / "evaluate", name)
    except DamagedError:  # of a run that is not evaluated any more; else it was made again
        content = None
    return None if content is None else json.loads(content)


def evaluated(root: Path, iterations: int) -> dict[int, Values]:
    """The metrics of every iterate that was evaluated."""
    found = {k: _read(root, k, "metrics.json") for k in range(iterations + 1)}
    return {k: values for k, values in found.items() if values is not None}


def crossplay(root: Path, iterations: int) -> dict[tuple[int, int], Values]:
    """A[i, j] by (i, j), as far as it is known: see `stages.evaluate.crossplay`."""
    entries = [entry for k in range(iterations + 1) for entry in _read(root, k, "crossplay.json") or []]
    return {(entry["discriminator"], entry["answers"]): entry for entry in entries}


def samples(root: Path, iterations: int) -> list[dict[str, Any]]:
    """The first held-out prompts with their real answers and those of every iterate, in order."""
    return [row for k in range(iterations + 1) for row in _read(root, k, "samples.json") or []]


def preferences(root: Path, iterations: int) -> dict[tuple[int, int], Values]:
    """How often iterate k gives real answers the higher log-prob than iterate j, by (k, j): see `stages.evaluate`."""
    entries = [entry for k in range(iterations + 1) for entry in _read(root, k, "preferences.json") or []]
    return {(entry["iterate"], entry["over"]): entry for entry in entries}


def objective(root: Path, name: str | None) -> float | None:
    """A metric of the newest iterate that has it; None where no name is given.

    Raises:
        ConfigError: no iterate has it.
    """
    if name is None:
        return None
    path = root / "metrics.jsonl"
    rows = [row for row in (durable.read_jsonl(path) if path.exists() else []) if "iterate" in row]
    found = {row["iterate"]: float(row[name]) for row in rows if name in row}
    if not found:
        measured = ", ".join(sorted({key for row in rows for key in row if key.startswith("eval/")})) or "nothing"
        raise ConfigError(
            "The objective was not measured.", where=f"objective={name}", why=str(root), todo=f"there is {measured}"
        )
    return found[max(found)]


@dataclass(frozen=True)
class Stop:
    """Why the game ends before its last iteration. `values`: of the last iterates, the newest is `iterate`."""

    iterate: int
    metric: str
    values: tuple[float, ...]

    def words(self) -> str:
        first = self.iterate + 1 - len(self.values)
        listed = ", ".join(f"{value:.4g} (iterate {k})" for k, value in enumerate(self.values, start=first))
        times = len(self.values) - 1
        return (
            f"after iterate {self.iterate}: {self.metric} got worse "
            f"{'once' if times == 1 else f'{times} times in a row'}: {listed}"
        )


def stop(made: Sequence[Stage], *, root: Path, stages: Sequence[Stage], schedule: Schedule) -> Stop | None:
    """Whether the game is to end before its last iteration: the newest iterate is judged, and it and those before it
    got worse each time. Read off the run folder alone, so that the same folder always gives the same answer.

    Args:
        made: the finished ones of the plan's stages.
    """
    rule = schedule.stop_when
    if rule is None:
        return None
    there = [s.spec.t + 1 for s in stages if isinstance(s.spec, TrainSpec) and rundir.readable(root / s.folder)]
    newest = max(there, default=0)
    judged = {stage.spec.k for stage in made if isinstance(stage.spec, EvaluateSpec)}
    if newest not in judged or newest >= schedule.iterations:
        return None
    found = {k: values[rule.metric] for k, values in evaluated(root, newest).items() if k in judged}
    if metrics.worsenings([metrics.badness(rule.metric, value) for value in found.values()]) < rule.worse:
        return None
    return Stop(newest, rule.metric, tuple(found.values())[-rule.worse - 1 :])


def until(stages: Sequence[Stage], k: int) -> list[bool]:
    """Whether each stage of a plan comes up to the evaluation of iterate k, itself among them, or judges an iterate up
    to k: benchmarks may stand at the end of a plan.
    """
    end = next(i for i, s in enumerate(stages) if isinstance(s.spec, EvaluateSpec) and s.spec.k == k)
    return [i <= end or _late(s) <= k for i, s in enumerate(stages)]


def _late(stage: Stage) -> float:
    """The iterate that a stage judges, or 0 where it is for all; infinite where it is no such stage."""
    judges_all = isinstance(stage.spec, QuestionsSpec)
    return 0 if judges_all else stage.spec.k if isinstance(stage.spec, Late) else inf


def recorded(root: Path, stopped: Stop | None) -> bool:
    """Whether the run folder says of an early end what is so."""
    path = root / STOPPED
    return path.exists() == (stopped is not None) and (stopped is None or path.read_bytes() == _text(stopped))


def record(root: Path, stopped: Stop | None) -> None:
    """Write, or take away, the run folder's word of an early end; it is for people and their report alone."""
    if stopped is None:
        durable.remove(root / STOPPED)
    elif not recorded(root, stopped):
        durable.write_bytes(root / STOPPED, _text(stopped))


def _text(stopped: Stop) -> bytes:
    return (json.dumps(plain(stopped) | {"why": stopped.words()}, indent=1) + "\n").encode()
