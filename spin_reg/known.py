"""Where finished stages lie in `outputs`, by the notes that all runs leave there; and taking one over."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from spin_reg import durable, rundir
from spin_reg.errors import DamagedError, SpinRegError
from spin_reg.fingerprint import digest
from spin_reg.stage import Stage

STAGES = ".stages"


def remember(outputs: Path, root: Path, stage: Stage) -> None:
    """Note in `outputs/.stages` where this finished stage lies; the lock of who was to make it is then without use."""
    line = str((root / stage.folder).relative_to(outputs))
    path = outputs / STAGES / f"{stage.fingerprint}-{digest(line)[:16]}"  # one run's own: runs at work share the folder
    if not path.is_file() or path.read_bytes() != line.encode():
        durable.make_folder(path.parent)
        durable.write_bytes(path, line.encode())
    lock(outputs, stage).unlink(missing_ok=True)


def lock(outputs: Path, stage: Stage) -> Path:
    """The file that is locked by who makes this stage."""
    return outputs / STAGES / f".{stage.fingerprint}.lock"


def remembered(outputs: Path) -> dict[str, list[str]]:
    """The notes in `outputs/.stages` as they are now, by the fingerprint of the stage."""
    found: dict[str, list[str]] = {}
    for name in sorted(os.listdir(outputs / STAGES)) if (outputs / STAGES).is_dir() else []:
        if not name.endswith(".tmp"):
            found.setdefault(name.partition("-")[0], []).append(name)
    return found


def elsewhere(
    outputs: Path,
    stage: Stage,
    inputs: Callable[[], Mapping[str, str | None]] = dict,
    notes: Mapping[str, Sequence[str]] | None = None,
) -> list[Path]:
    """Other runs' folders of this stage, made from the same inputs; sizes are looked at, contents are not.

    Args:
        inputs: tells what it is to be made from, and is asked only where there are such folders.
        notes: those that were `remembered`; None: look again.
    """
    names = (remembered(outputs) if notes is None else notes).get(stage.fingerprint)
    if not names:
        return []
    made_from = inputs()
    lines = [_line(outputs / STAGES / name) for name in names]
    return [outputs / line for line in lines if rundir.inside(line) and _usable(outputs / line, stage, made_from)]


def _line(note: Path) -> str:
    try:
        return note.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:  # it has just been removed
        return ""


def _usable(folder: Path, stage: Stage, inputs: Mapping[str, str | None]) -> bool:
    try:
        found = rundir.manifest(folder)
        if found is None or found["fingerprint"] != stage.fingerprint or found["removed"]:
            return False
        rundir.check_sizes(folder, found)
    except DamagedError:
        return False
    return all(content in (None, found["inputs"].get(role)) for role, content in inputs.items())


def adopt(root: Path, stage: Stage, folder: Path) -> None:
    """Publish a stage of another run here: hard links, or copies across disks.

    Raises:
        DamagedError: its content is not what was written, or goes while it is taken over.
    """
    work, found = root / f"{stage.folder}.tmp", rundir.manifest(folder)
    if found is None or found["removed"]:
        raise rundir.damaged(folder / rundir.MANIFEST, "it has just been removed")
    rundir.check_hashes(folder, found)
    durable.remove(work)
    for name in found["files"]:
        try:
            durable.link(folder / name, work / name)
        except SpinRegError as error:
            if not (folder / name).is_file():
                raise rundir.damaged(folder / name, "it has just been removed") from error
            raise
    durable.write_record(work / rundir.MANIFEST, found)  # the one that was checked, whatever stands there by now
    (work / rundir.MANIFEST).chmod(0o444)
    rundir.publish(root, stage, work)
