"""How much disk a run may come to hold, before it holds it; and what in a run's folder nothing needs any more."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from spin_reg import durable, known, rundir, sizes, stored
from spin_reg.amounts import Amounts
from spin_reg.config import Config
from spin_reg.errors import NoSpace
from spin_reg.pace import human as human
from spin_reg.plan import Sources, Stage, plan
from spin_reg.runner import contents
from spin_reg.settings import Dtype, KeepIterates, Model, Optimizer, Pretrained
from spin_reg.specs import SftSpec, Split, TrainSpec

BYTES = {Dtype.float32: 4, Dtype.bfloat16: 2}
SLOTS = {Optimizer.adamw: 2, Optimizer.rmsprop: 1}  # numbers a weight that the optimizer keeps


@dataclass(frozen=True)
class Need:
    """Bytes. `peak` is the most that is held at one time, half-written files included; the others are sums.

    `left` is what is there when all is made, where lengths are `measured` as it is expected to be, with `iterates` and
    `tables`. `download` goes to the Hub's cache, wherever that lies, and is part of none of them.
    """

    peak: int
    left: int
    iterates: int
    checkpoints: int
    tables: int
    counted: bool  # whether the number of examples is known
    measured: bool = False
    download: int = 0

    def words(self) -> str:
        if not self.peak:
            return "nothing more"
        parts = {"iterates": self.iterates, "tables": self.tables, "a training checkpoint": self.checkpoints}
        *left, checkpoint = (f"{name} {human(size)}" for name, size in parts.items())
        first = f", and {human(self.download)} of weights to download" if self.download else ""
        if self.measured:
            peak = f"{human(self.peak)} at most on the way (with {checkpoint})"
            return f"about {human(self.left)} when all is made ({', '.join(left)}), {peak}{first}"
        unknown = "" if self.counted else ", before the data are counted"
        return f"{human(self.peak)} at most ({', '.join([*left, checkpoint])}{unknown}){first}"


def unneeded(
    stages: Sequence[Stage], pending: Sequence[Stage], keep: KeepIterates, future: frozenset[str]
) -> list[Stage]:
    """The stages whose weights may go: none that is still to be made needs them.

    Args:
        pending: the stages still to be made. future: names of those that one more iteration would need.
    """
    models = [] if keep is KeepIterates.all else [s for s in stages if isinstance(s.spec, SftSpec | TrainSpec)]
    if not models:
        return []
    wanted = {models[-1].name} | {stage.name for stage in pending}
    wanted |= {need.name for stage in pending for need in stage.needs.values()}
    wanted |= future if keep is KeepIterates.needed else set()
    return [stage for stage in models if stage.name not in wanted]


def future(config: Config, sources: Sources) -> frozenset[str]:
    """Names of the stages of this plan that one more iteration would need; empty where nothing is kept for one."""
    if config.keep_iterates is not KeepIterates.needed:
        return frozenset()
    longer = replace(config, schedule=replace(config.schedule, iterations=config.schedule.iterations + 1))
    now = {stage.name for stage in plan(config, sources)}
    new = [stage for stage in plan(longer, sources) if stage.name not in now]
    return frozenset(need.name for stage in new for need in stage.needs.values() if need.name in now)


def need(
    stages: Sequence[Stage],
    todo: Sequence[Stage],
    model: Model,
    have: Amounts,
    keep: KeepIterates,
    future: frozenset[str],
) -> Need:
    """The disk that the stages still to be made may need.

    Args:
        keep, future: what is removed on the way (see `unneeded`).
    """
    weights, whole = _weights(model), iterate(model)
    held, peak, iterates, checkpoints, tables = 0, 0, 0, 0, 0
    gone: set[str] = set()
    for place, stage in enumerate(todo):
        size, spec = stored.of(stage, whole, have), stage.spec
        if isinstance(spec, SftSpec | TrainSpec):
            optimizer = spec.optimizer if isinstance(spec, TrainSpec) else Optimizer.adamw
            scratch = 2 * weights * (1 + SLOTS[optimizer])  # the next checkpoint is whole before the last one goes
            iterates += size
        else:
            scratch = size  # shards
            tables += size
        checkpoints = max(checkpoints, scratch if isinstance(spec, SftSpec | TrainSpec) else 0)
        peak = max(peak, held + size + scratch)
        held += size
        for useless in unneeded(stages, todo[place + 1 :], keep, future):
            if useless.name not in gone and useless in todo:
                gone.add(useless.name)
                held -= weights
    download = sizes.to_download(model) if todo else 0
    counted = have.rows[Split.train] > 0
    return Need(peak, held, iterates, checkpoints, tables, counted, have.measured, download)


def iterate(model: Model) -> int:
    """Bytes of an iterate's model: its weights, its tokenizer."""
    return _weights(model) + sizes.of_tokenizer(model)


def _weights(model: Model) -> int:
    """Bytes of what an iterate keeps; PEFT keeps adapters in float32."""
    adapter = isinstance(model, Pretrained) and model.lora.rank > 0
    return sizes.trained_parameters(model) * (4 if adapter else BYTES[model.dtype])


def free(folder: Path) -> int:
    """Bytes free on the disk that holds a folder, or will."""
    return shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free


def check(outputs: Path, needed: Need) -> None:
    """Raise NoSpace where the disk has less than is needed."""
    room = free(outputs)
    if needed.peak > room:
        raise NoSpace(
            "The disk has no room for this run.",
            where=str(outputs),
            why=f"what is still to be made may need {needed.words()}; {human(room)} are free",
            todo="make room (spin-reg gc shows what can go), set keep_iterates=needed or last, or outputs=ELSEWHERE",
        )


@dataclass(frozen=True)
class Garbage:
    """Something that nothing needs. `frees`: bytes, when it alone goes: 0 where other runs hold the same file."""

    path: Path
    why: str
    frees: int
    model: Path | None = None  # the folder of the model whose weights it is


def garbage(root: Path, stages: Sequence[Stage], keep: KeepIterates, future: frozenset[str]) -> list[Garbage]:
    """What can go from a run's folder: work that was given up, cut removals, weights that `keep` does not keep."""
    planned = {f"{stage.folder}.tmp": stage for stage in stages}
    found = [Garbage(path, "a removal that was cut short", _size(path)) for path in root.rglob(f".*{durable.REMOVED}")]
    for work in root.rglob("*.tmp"):
        stage = planned.get(work.relative_to(root).as_posix())
        if stage is None and (work.parent / rundir.MANIFEST).exists():
            continue  # in a finished stage's folder nothing is ours to judge
        marker = work / rundir.MARKER
        begun = marker.read_bytes() if marker.is_file() else None
        if work.is_dir() and durable.SCRATCH not in work.relative_to(root).parts:
            if stage is None or begun not in (None, rundir.begun_as(stage, contents(root, stage))):
                found.append(Garbage(work, "begun with other settings, and given up", _size(work)))
            elif rundir.readable(root / stage.folder) is not None:
                found.append(Garbage(work, "begun again, and given up: the stage is there", _size(work)))
    pending = [stage for stage in stages if rundir.readable(root / stage.folder) is None]
    for stage in unneeded(stages, pending, keep, future):
        for path in sorted((root / stage.folder).glob(rundir.WEIGHTS)):
            why = f"no later stage needs it (keep_iterates={keep})"
            found.append(Garbage(path, why, _size(path), root / stage.folder))
    return found


def freed(found: Sequence[Garbage]) -> int:
    """Bytes that all of it frees together: a file that several runs hold goes with the last of them."""
    names: dict[tuple[int, int], int] = {}
    total = 0
    for seen in (path.stat() for item in found for path in _files(item.path)):
        key = seen.st_dev, seen.st_ino
        names[key] = names.get(key, 0) + 1
        total += seen.st_size if names[key] == seen.st_nlink else 0
    return total


def remove(found: Sequence[Garbage]) -> None:
    """Remove what `garbage` found; of weights the record stays, and what needs them later makes them again."""
    for folder in sorted({item.model for item in found if item.model is not None}):
        rundir.drop_weights(folder)
    for item in found:
        durable.remove(item.path)


def stale_index(outputs: Path) -> list[Path]:
    """Entries of `.stages` whose folders are gone."""
    found = []
    for path in sorted((outputs / known.STAGES).glob("[!.]*")):  # not one that is being written
        line = path.read_text(encoding="utf-8", errors="replace")
        if not (outputs / line / rundir.MANIFEST).is_file():
            found.append(path)
    return found


def _files(path: Path) -> list[Path]:
    return [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]


def _size(path: Path) -> int:
    return sum(p.stat().st_size for p in _files(path) if p.stat().st_nlink == 1)
