"""Makes each stage's folder exist exactly once: skip what is done, adopt what another run has, run the rest, refuse
what was made otherwise."""

import importlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from spin_reg import claims, durable, known, rundir, stopping, usage
from spin_reg.context import Context, Logged, Sink
from spin_reg.errors import ConfigError, DamagedError
from spin_reg.plan import Stage
from spin_reg.specs import Spec
from spin_reg.stage import changes

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
    damaged: bool = False


class Listener(Protocol):
    """Who is told how the run goes on; the surface draws it, tests ignore it."""

    def stage(self, index: int, total: int, stage: Stage, state: State) -> None:
        """A stage begins, or is skipped."""

    def progress(self, done: int, total: int, unit: str) -> None:
        """The running stage is this far."""

    def finished(self, stage: Stage, seconds: float) -> None:
        """The running stage is done."""


def states(root: Path, outputs: Path, stages: Sequence[Stage]) -> list[State]:
    """`state_of` each, by one look at what other runs have."""
    notes = known.remembered(outputs)
    return [state_of(root, outputs, stage, notes) for stage in stages]


def state_of(root: Path, outputs: Path, stage: Stage, notes: Mapping[str, Sequence[str]] | None = None) -> State:
    """Done, to do, to be adopted from another run, or made otherwise than now planned.

    Args:
        notes: of what other runs have, as `known.remembered`; None: look now.

    Raises:
        DamagedError: a file of weights that are there is damaged; what can be made again is to do instead.
    """
    folder = root / stage.folder
    try:
        found = rundir.manifest(folder)
        if found is not None:
            rundir.check_quickly(folder, found)
    except DamagedError as damage:
        if stage.spec.precious:
            raise
        return State(Status.todo, f"{damage.where} is damaged ({damage.why}), so it is made again", damaged=True)
    if found is None:
        copies = known.elsewhere(outputs, stage, partial(contents, root, stage), notes)
        if copies:
            return State(Status.reuse, f"the same stage lies in {copies[0].relative_to(outputs)}")
        begun = (root / f"{stage.folder}.tmp").exists()
        return State(Status.todo, "begun, goes on" if begun else "not made yet")
    reason = difference(root, found, stage)
    if not reason:
        return State(Status.done, "made; its weights were removed" if found["removed"] else "made")
    return State(Status.todo if stage.spec.remade else Status.stale, reason)


def contents(root: Path, stage: Stage) -> dict[str, str | None]:
    """What each input of a stage holds (the digest in its manifest); None where it is not made, or damaged."""
    found: dict[str, str | None] = {}
    for role, need in stage.needs.items():
        made = rundir.readable(root / need.folder)
        found[role] = None if made is None else made["content"]
    return found


def difference(root: Path, found: rundir.Manifest, stage: Stage) -> str:
    """What a finished stage was made with that the plan or its inputs have otherwise, for people; empty if nothing."""
    lines = [] if found["fingerprint"] == stage.fingerprint else changes(found["spec"], stage.spec)
    if found["version"] != stage.spec.version:
        lines.append(f"stage version: {found['version']} -> {stage.spec.version}")
    now = {role: need.fingerprint for role, need in stage.needs.items()}
    lines += [f"its input {role} has changed" for role in now if found["needs"].get(role) != now[role]]
    if not lines and found["fingerprint"] == stage.fingerprint:
        was = found["inputs"]
        lines = [
            f"its input {role} was made again and is not what it was"
            for role, content in contents(root, stage).items()
            if content not in (None, was.get(role))
        ]
        return "; ".join(lines)
    return "; ".join(lines) or "its inputs have changed"


def run_all(
    stages: list[Stage],
    *,
    root: Path,
    outputs: Path,
    listener: Listener,
    sink: Sink,
    clock: Callable[[], float],
    run: Callable[[Stage, dict[str, Path], Path, Context], None] | None = None,
    unneeded: Callable[[Sequence[Stage]], Sequence[Stage]] | None = None,
    enough: Callable[[Sequence[Stage]], object] | None = None,
) -> None:
    """Bring every stage into being, in order; `metrics.jsonl` grows by what each stage keeps.

    Args:
        unneeded: given the stages that are still to be made, those whose weights may go; None: none may.
        enough: given the stages that are made, whether to leave it at that; None: all are made.

    Raises:
        ConfigError: a stage's folder was made with other settings. DamagedError: a source is damaged, or a stage that
        had to be made again came out otherwise. Stopped: a signal asked for it.
    """
    durable.tidy(root)
    maker = _Maker(stages, root, listener, clock, run or run_stage)
    kept = {stage.name: stage_rows(root, stage) for stage in stages}
    _name_damage(root)
    _publish(root / METRICS, kept)
    before = zip(stages, states(root, outputs, stages), strict=True) if unneeded is not None else ()
    todo = [stage for stage, state in before if state.status is not Status.done]
    sent = 0
    for index, stage in enumerate(stages, start=1):
        stopping.poll()
        state = state_of(root, outputs, stage)
        if state.status is Status.stale:
            raise refused(root, stage, state)
        listener.stage(index, len(stages), stage, state)
        level = logging.WARNING if state.damaged else logging.INFO
        log.log(level, "%s: %s (%s)", stage.name, state.status, state.reason)
        if state.status is not Status.done:
            _bring(stage, state, outputs, maker, Context(listener.progress, _live(sink, sent), stopping.poll))
        known.remember(outputs, root, stage)
        if state.status is not Status.done:
            kept[stage.name] = stage_rows(root, stage)
            _publish(root / METRICS, kept)
        for row in kept[stage.name]:  # a sink ignores what it has
            sink.log(sent, row)
            sent += 1
        if unneeded is not None:
            todo = [later for later in todo if later is not stage]
            for useless in unneeded(todo):
                rundir.drop_weights(root / useless.folder)
                maker.checked.discard(useless.name)
        if enough is not None and enough(stages[:index]):
            break


def _bring(stage: Stage, state: State, outputs: Path, maker: "_Maker", context: Context) -> None:
    """Take a stage over from another run, or make it; where another process is just making it, after that."""
    if state.status is Status.reuse and _adopted(maker.root, outputs, stage):
        return
    with claims.claimed(outputs, stage, poll=stopping.poll):
        now = state_of(maker.root, outputs, stage)
        if now.status is not Status.reuse or not _adopted(maker.root, outputs, stage):
            maker.make(stage, context)
        known.remember(outputs, maker.root, stage)


def _adopted(root: Path, outputs: Path, stage: Stage) -> bool:
    """Take the stage over from another run; False where every copy turns out to be damaged."""
    for lies in known.elsewhere(outputs, stage, partial(contents, root, stage)):
        try:
            known.adopt(root, stage, lies)
            log.info("%s: taken from %s", stage.name, lies.relative_to(outputs))
            return True
        except DamagedError as damage:
            log.warning("%s is not taken over: %s (%s)", lies, damage.where, damage.why)
    return False


@dataclass(frozen=True)
class _Maker:
    """Makes stages, and makes again what a stage needs and is damaged or was removed."""

    stages: list[Stage]
    root: Path
    listener: Listener
    clock: Callable[[], float]
    run: Callable[[Stage, dict[str, Path], Path, Context], None]
    checked: set[str] = field(default_factory=set)

    def make(self, stage: Stage, context: Context) -> None:
        """Run a stage, or only finish it where a kill came just before its folder was renamed."""
        began = self.clock()
        usage.begin()
        for need in stage.needs.values():
            self.whole(need)
        held = {role: str(content) for role, content in contents(self.root, stage).items()}
        work, sealed = rundir.begin(self.root, stage, held)
        if not sealed:
            context = replace(context, progress=Logged(stage.name, context.progress, self.clock))
            self.run(stage, {role: self.root / need.folder for role, need in stage.needs.items()}, work, context)
            rundir.seal(stage, work, held)
        self._same_as_before(stage, work)
        rundir.publish(self.root, stage, work)
        seconds = self.clock() - began
        log.info("%s: took %s", stage.name, json.dumps({"seconds": round(seconds, 2)} | usage.peak()))
        self.listener.finished(stage, seconds)

    def whole(self, stage: Stage) -> None:
        """Check the content of an input before it is used, once a process; make it again where that can be done."""
        if stage.name in self.checked:
            return
        folder = self.root / stage.folder
        try:
            found = rundir.manifest(folder)
            assert found is not None
            rundir.check_hashes(folder, found)
            why = "its weights were removed, and are needed again" if found["removed"] else ""
        except DamagedError as damage:
            if stage.spec.precious:
                raise
            why = f"{damage.where} is damaged ({damage.why}), so it is made again"
        if why:
            log.warning("%s: %s", stage.name, why)
            self.listener.stage(self.stages.index(stage) + 1, len(self.stages), stage, State(Status.todo, why))
            self.make(stage, Context(self.listener.progress, poll=stopping.poll))
        self.checked.add(stage.name)

    def _same_as_before(self, stage: Stage, work: Path) -> None:
        """A stage that is made again must hold, to the byte, what finished stages were made from."""
        made = rundir.manifest(work)
        assert made is not None
        for user in self.stages:
            roles = [role for role, need in user.needs.items() if need.name == stage.name]
            found = rundir.readable(self.root / user.folder) if roles and not user.spec.remade else None
            if found is None or found["fingerprint"] != user.fingerprint:
                continue
            if any(found["inputs"].get(role) != made["content"] for role in roles):
                durable.remove(work)
                raise DamagedError(
                    f"{stage.name} was made again and is not what it was.",
                    where=str(self.root / stage.folder),
                    why=f"{user.name} was made from the old one; packages, threads or the machine may differ",
                    todo=f"put the old folder back, or delete {self.root / user.folder} and what was made from it",
                )


def run_stage(stage: Stage, inputs: dict[str, Path], work: Path, context: Context) -> None:
    """Run a stage's code in this process."""
    run_spec(stage.spec, inputs, work, context)


def run_spec(spec: Spec, inputs: dict[str, Path], work: Path, context: Context) -> None:
    """Run the code that a spec is for; its module (and torch) is imported only now."""
    importlib.import_module(f"spin_reg.stages.{spec.kind}").run(spec, inputs, work, context)


def refused(root: Path, stage: Stage, state: State) -> ConfigError:
    """The error for a stage that was made with other settings."""
    return ConfigError(
        f"{stage.name} was made with other settings.",
        where=str(root / stage.folder),
        why=state.reason,
        todo="go back to those settings and files, choose another run_name, or delete the folder to make it again",
    )


def _live(sink: Sink, start: int) -> Callable[[dict[str, Any]], None]:
    """A function that sends a running stage's rows on, each with its index."""
    count = iter(range(start, 1 << 62))
    return lambda row: sink.log(next(count), row)


def stage_rows(root: Path, stage: Stage) -> Rows:
    """The metrics rows that a finished stage keeps; none where it is not made, keeps none or is to be made again."""
    try:
        content = rundir.read(root / stage.folder, METRICS)
    except DamagedError:
        if stage.spec.precious:
            raise
        return []
    return [] if content is None else [json.loads(line) for line in content.decode().splitlines()]


def metrics_whole(root: Path, stages: list[Stage]) -> bool:
    """Whether the run's metrics.jsonl holds exactly what these stages keep."""
    path = root / METRICS
    return path.is_file() and path.read_bytes() == durable.jsonl([r for s in stages for r in stage_rows(root, s)])


def _name_damage(root: Path) -> None:
    """Tell of lines in the run's metrics.jsonl that no stage keeps. A kill may leave it short; damage leaves others."""
    path = root / METRICS
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    folders = [found.parent for found in root.rglob(rundir.MANIFEST)] if lines else []
    known = {line for folder in folders if rundir.readable(folder) for line in _lines(folder)}
    if not set(lines) <= known:
        log.warning("%s is damaged, or holds lines of stages that are gone: it is put together again", path)


def _lines(folder: Path) -> list[bytes]:
    path = folder / METRICS
    return path.read_bytes().splitlines(keepends=True) if path.exists() else []


def _publish(path: Path, kept: Mapping[str, Rows]) -> None:
    """Make the run's metrics.jsonl hold the rows that its stages keep."""
    content = durable.jsonl([row for rows in kept.values() for row in rows])
    if not path.exists() or path.read_bytes() != content:
        durable.write_bytes(path, content)
