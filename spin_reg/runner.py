"""Makes each stage's folder exist exactly once: skip what is done, adopt what another run has, run the rest, refuse
what was made otherwise."""

import importlib
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

from spin_reg import durable, rundir
from spin_reg.context import Context
from spin_reg.errors import ConfigError
from spin_reg.fingerprint import plain
from spin_reg.plan import Stage

METRICS = "metrics.jsonl"
Rows = list[dict[str, Any]]
log = logging.getLogger(__name__)


class Status(StrEnum):
    """How a stage of the plan stands."""

    done = "done"
    todo = "todo"
    reuse = "reuse"
    stale = "stale"


@dataclass(frozen=True)
class State:
    """A stage's status and the reason for it."""

    status: Status
    reason: str


class Listener(Protocol):
    """Who is told how the run goes on; the surface draws it, tests ignore it."""

    def stage(self, index: int, total: int, stage: Stage, state: State) -> None:
        """A stage begins, or is skipped."""

    def progress(self, done: int, total: int, unit: str) -> None:
        """The running stage is this far."""

    def finished(self, stage: Stage, seconds: float) -> None:
        """The running stage is done."""


class Sink(Protocol):
    """Where metrics rows are mirrored to; a row's index is its line in the run's metrics.jsonl."""

    def log(self, index: int, row: dict[str, Any]) -> None:
        """One metrics row."""


def state_of(root: Path, outputs: Path, stage: Stage) -> State:
    """Done, to do, to be adopted from another run, or made with other settings."""
    found = rundir.manifest(root / stage.folder)
    if found is None:
        lies = rundir.elsewhere(outputs, stage)
        if lies is not None:
            return State(Status.reuse, f"the same stage lies in {lies.relative_to(outputs)}")
        begun = (root / f"{stage.folder}.tmp").exists()
        return State(Status.todo, "begun, goes on" if begun else "not made yet")
    rundir.check_sizes(root / stage.folder, found)
    if found["fingerprint"] == stage.fingerprint:
        return State(Status.done, "made")
    status = Status.todo if getattr(stage.spec, "remade", False) else Status.stale
    return State(status, difference(found, stage))


def difference(found: rundir.Manifest, stage: Stage) -> str:
    """What a finished stage was made with that the plan has otherwise, for people."""
    lines = _changes(found["spec"], plain(stage.spec))
    if found["version"] != stage.spec.version:
        lines.append(f"stage version: {found['version']} -> {stage.spec.version}")
    now = {role: need.fingerprint for role, need in stage.needs.items()}
    lines += [f"its input {role} has changed" for role in now if found["needs"].get(role) != now[role]]
    return "; ".join(lines) or "its inputs have changed"


def _changes(old: Any, new: Any, prefix: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(key for key in new if key not in old)]
        return [line for key in keys for line in _changes(old.get(key), new.get(key), f"{prefix}{key}.")]
    return [] if old == new else [f"{prefix.rstrip('.')}: {json.dumps(old)} -> {json.dumps(new)}"]


def run_all(
    stages: list[Stage],
    *,
    root: Path,
    outputs: Path,
    listener: Listener,
    sink: Sink,
    clock: Callable[[], float],
    run: Callable[[Stage, dict[str, Path], Path, Context], None] | None = None,
) -> None:
    """Bring every stage into being, in order; `metrics.jsonl` grows by what each stage keeps.

    Raises:
        ConfigError: a stage's folder was made with other settings.
    """
    kept = {stage.name: stage_rows(root, stage) for stage in stages}
    sent = 0
    checked: set[str] = set()
    for index, stage in enumerate(stages, start=1):
        state = state_of(root, outputs, stage)
        if state.status is Status.stale:
            raise refused(root, stage, state)
        listener.stage(index, len(stages), stage, state)
        log.info("%s: %s (%s)", stage.name, state.status, state.reason)
        if state.status is Status.reuse:
            lies = rundir.elsewhere(outputs, stage)
            assert lies is not None
            rundir.adopt(root, stage, lies)
        elif state.status is Status.todo:
            began = clock()
            _verify(root, stage, checked)
            context = Context(listener.progress, _live(sink, sent))
            work = rundir.begin(root, stage)
            (run or run_stage)(stage, {role: root / need.folder for role, need in stage.needs.items()}, work, context)
            rundir.commit(root, stage, work)
            listener.finished(stage, clock() - began)
        if state.status is not Status.done:
            rundir.remember(outputs, root, stage)
        kept[stage.name] = stage_rows(root, stage)
        for row in kept[stage.name]:  # a sink ignores what it has
            sink.log(sent, row)
            sent += 1
        _publish(root / METRICS, [row for rows in kept.values() for row in rows])


def run_stage(stage: Stage, inputs: dict[str, Path], work: Path, context: Context) -> None:
    """Run a stage's code; its module (and torch) is imported only now."""
    importlib.import_module(f"spin_reg.stages.{stage.kind}").run(stage.spec, inputs, work, context)


def refused(root: Path, stage: Stage, state: State) -> ConfigError:
    """The error for a stage that was made with other settings."""
    return ConfigError(
        f"{stage.name} was made with other settings.",
        where=str(root / stage.folder),
        why=state.reason,
        todo="go back to those settings, choose another run_name, or delete the folder to make it again",
    )


def _verify(root: Path, stage: Stage, checked: set[str]) -> None:
    """Check the content of every input before it is used, once a process."""
    for need in stage.needs.values():
        if need.name not in checked:
            found = rundir.manifest(root / need.folder)
            assert found is not None
            rundir.check_hashes(root / need.folder, found)
            checked.add(need.name)


def _live(sink: Sink, start: int) -> Callable[[dict[str, Any]], None]:
    """A function that sends a running stage's rows on, each with its index."""
    count = iter(range(start, 1 << 62))
    return lambda row: sink.log(next(count), row)


def stage_rows(root: Path, stage: Stage) -> Rows:
    """The metrics rows that a finished stage keeps; none where it is not made or keeps none."""
    folder = root / stage.folder
    path = folder / METRICS
    return durable.read_jsonl(path) if (folder / rundir.MANIFEST).exists() and path.exists() else []


def metrics_whole(root: Path, stages: list[Stage]) -> bool:
    """Whether the run's metrics.jsonl holds exactly what these stages keep."""
    path = root / METRICS
    try:
        return durable.read_jsonl(path) == [row for stage in stages for row in stage_rows(root, stage)]
    except (OSError, ValueError):
        return False


def _publish(path: Path, rows: Rows) -> None:
    """Make the run's metrics.jsonl hold these rows."""
    content = durable.jsonl(rows)
    if not path.exists() or path.read_bytes() != content:
        durable.write_bytes(path, content)
