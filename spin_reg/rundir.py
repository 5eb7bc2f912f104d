"""The run folder: its provenance, its stages' manifests, its owner; and where finished stages of other runs lie."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from spin_reg import durable
from spin_reg.errors import DamagedError, RunBusy
from spin_reg.fingerprint import file_sha256, plain
from spin_reg.plan import Stage

MANIFEST, RUN, STAGES = "stage.json", "run.json", ".stages"
Manifest = dict[str, Any]
FIELDS = {  # of run.json
    **{"created": str, "cwd": str, "iterations": int, "overrides": list},
    **{"settings": dict, "sources": dict, "versions": dict},
}


def manifest(folder: Path) -> Manifest | None:
    """A finished stage's manifest; None where the stage is not there."""
    path = folder / MANIFEST
    if not path.exists():
        return None
    try:
        return _shaped(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise damaged(path, f"it is not a manifest ({error})") from error


def _shaped(found: Manifest) -> Manifest:
    """The manifest, if it has what is read of it and names files of its own folder alone; else a ValueError."""
    for name, entry in found["files"].items():
        if not _inside(name) or not {"size", "sha256"} <= set(entry):
            raise ValueError(f"the file {name}")
    if not {"fingerprint", "spec", "version", "needs"} <= set(found):
        raise ValueError("it lacks fields")
    return found


def _inside(name: str) -> bool:
    """Whether a relative path stays in its folder: files are made under the names that a manifest gives."""
    return bool(name) and not Path(name).is_absolute() and ".." not in Path(name).parts


def provenance(root: Path) -> dict[str, Any] | None:
    """What run.json says; None where there is none.

    Raises:
        DamagedError: it is not what was written.
    """
    path = root / RUN
    if not path.is_file():
        return None
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        wrong = {key for key, kind in FIELDS.items() if not isinstance(found.get(key), kind)}
    except (ValueError, AttributeError, RecursionError) as error:
        raise damaged_run(path, f"it is not JSON ({error})") from error
    if wrong:
        raise damaged_run(path, f"it lacks {', '.join(sorted(wrong))}, or has it in another form")
    return found


def damaged_run(path: Path, why: str) -> DamagedError:
    """The error for a run.json that cannot be used: a source, so it is refused, not rebuilt."""
    todo = "put it back from a copy, or begin the run anew under another run_name (finished stages are taken over)"
    return DamagedError("The record of a run is damaged.", where=str(path), why=why, todo=todo)


def damaged(path: Path, why: str) -> DamagedError:
    """The error that names a damaged file of a finished stage."""
    todo = f"delete {path.parent} and run the same command: the stage is made again"
    return DamagedError("A file of a finished stage is damaged.", where=str(path), why=why, todo=todo)


def check_sizes(folder: Path, found: Manifest) -> None:
    """Every file of the manifest is there with its size (quick; says nothing of the content)."""
    for name, entry in found["files"].items():
        path = folder / name
        if not path.is_file():
            raise damaged(path, "it is missing")
        if path.stat().st_size != entry["size"]:
            raise damaged(path, f"it has {path.stat().st_size} bytes, not {entry['size']}")


def check_hashes(folder: Path, found: Manifest) -> None:
    """Every file of the manifest has its SHA-256."""
    check_sizes(folder, found)
    for name, entry in found["files"].items():
        if file_sha256(folder / name) != entry["sha256"]:
            raise damaged(folder / name, "its content is not what was written")


def begin(root: Path, stage: Stage) -> Path:
    """The folder to make the stage in; what an interrupted call left there stays if it was for the same stage."""
    work = root / f"{stage.folder}.tmp"
    marker = work / ".fingerprint"
    if not marker.exists() or marker.read_text(encoding="utf-8") != stage.fingerprint:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        durable.write_bytes(marker, stage.fingerprint.encode())
    return work


def commit(root: Path, stage: Stage, work: Path) -> None:
    """Publish a stage: what it left behind is cleared, the manifest with checksums is written last, then the rename."""
    (work / ".fingerprint").unlink()
    for path in work.glob("checkpoint-*"):
        shutil.rmtree(path)
    files = {}
    for path in sorted(p for p in work.rglob("*") if p.is_file()):
        path.chmod(0o444)
        files[str(path.relative_to(work))] = {"size": path.stat().st_size, "sha256": file_sha256(path)}
    needs = {role: need.fingerprint for role, need in stage.needs.items()}
    value = {"name": stage.name, "kind": stage.kind, "version": stage.spec.version, "fingerprint": stage.fingerprint}
    durable.write_json(work / MANIFEST, value | {"spec": plain(stage.spec), "needs": needs, "files": files})
    (work / MANIFEST).chmod(0o444)
    shutil.rmtree(root / stage.folder, ignore_errors=True)  # there only where a stage is made anew
    durable.rename_folder(work, root / stage.folder)


def remember(outputs: Path, root: Path, stage: Stage) -> None:
    """Note in `outputs/.stages` where this finished stage lies."""
    index = outputs / STAGES
    index.mkdir(exist_ok=True)
    path = index / stage.fingerprint
    line = str((root / stage.folder).relative_to(outputs))
    known = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    if line not in known:
        durable.write_bytes(path, "\n".join([*known, line, ""]).encode())


def elsewhere(outputs: Path, stage: Stage) -> Path | None:
    """A whole copy of this stage in another run; damaged or deleted ones are passed over."""
    path = outputs / STAGES / stage.fingerprint
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        folder = outputs / line
        if not _inside(line):
            continue
        try:
            found = manifest(folder)
            if found is not None and found["fingerprint"] == stage.fingerprint:
                check_hashes(folder, found)
                return folder
        except DamagedError:
            continue
    return None


def adopt(root: Path, stage: Stage, folder: Path) -> None:
    """Publish a stage of another run here: hard links, or copies across disks."""
    work = root / f"{stage.folder}.tmp"
    shutil.rmtree(work, ignore_errors=True)
    found = manifest(folder)
    assert found is not None
    for name in [*found["files"], MANIFEST]:
        target = work / name
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(folder / name, target)
        except OSError:  # another disk, or one without links
            shutil.copy2(folder / name, target)
    durable.rename_folder(work, root / stage.folder)


@contextmanager
def owned(root: Path) -> Iterator[None]:
    """Hold the run folder against other processes.

    Raises:
        RunBusy: another process holds it.
    """
    lock, owner = FileLock(root / ".lock"), root / ".owner.json"
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        who = owner.read_text(encoding="utf-8").strip() if owner.exists() else "unknown"
        raise RunBusy(
            "Another process is working on this run.", where=str(root), why=f"its owner: {who}", todo="wait, or stop it"
        ) from error
    try:
        host = os.uname().nodename
        durable.write_bytes(owner, json.dumps({"host": host, "pid": os.getpid()}).encode())
        yield
    finally:
        owner.unlink(missing_ok=True)
        lock.release()
