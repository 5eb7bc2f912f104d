"""The run folder: its provenance, its stages' manifests, and its owner."""

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import Any

from filelock import FileLock, Timeout

from spin_reg import durable
from spin_reg.errors import DamagedError, RunBusy
from spin_reg.fingerprint import digest, file_sha256, plain
from spin_reg.stage import Stage

MANIFEST, RUN, OWNER, LOCK = "stage.json", "run.json", ".owner.json", ".lock"
A_GLANCE = 0.2  # seconds: who looks whether the folder is held, holds it that long at most
MARKER = f"{durable.SCRATCH}/fingerprint"
WEIGHTS = "*.safetensors"
SMALL = 1 << 16  # bytes; files up to this size are hashed whenever a stage is looked at, larger ones when used
Manifest = dict[str, Any]
FIELDS = {  # of run.json
    **{"created": str, "cwd": str, "iterations": int, "overrides": list},
    **{"settings": dict, "sources": dict, "versions": dict},
}


def manifest(folder: Path) -> Manifest | None:
    """A finished stage's manifest; None where the stage is not there.

    Raises:
        DamagedError: it is not what was written.
    """
    path = folder / MANIFEST
    try:
        seen = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return _manifest(path, seen.st_ino, seen.st_mtime_ns, seen.st_size)


@lru_cache(maxsize=4096)  # a plan asks for each manifest once for every stage that needs it
def _manifest(path: Path, *stamp: int) -> Manifest:
    try:
        found = durable.read_record(path)
        return _shaped(found)
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise damaged(path, f"it is not a manifest ({error})") from error


def readable(folder: Path) -> Manifest | None:
    """`manifest`, and None too where it is damaged: that is told where the stage itself is looked at."""
    try:
        return manifest(folder)
    except DamagedError:
        return None


def _shaped(found: Manifest) -> Manifest:
    """The manifest, if it has what is read of it and names files of its own folder alone; else a ValueError."""
    for name, entry in found["files"].items():
        if not inside(name) or not {"size", "sha256"} <= set(entry):
            raise ValueError(f"the file {name}")
    missing = {"fingerprint", "spec", "version", "needs", "inputs", "content", "removed"} - set(found)
    if missing:
        raise ValueError(f"it lacks {', '.join(sorted(missing))}")
    return found


def inside(name: str) -> bool:
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
        found = durable.read_record(path)
    except (ValueError, TypeError, OSError) as error:
        raise damaged_run(path, str(error)) from error
    wrong = {key for key, kind in FIELDS.items() if not isinstance(found.get(key), kind)}
    if wrong:
        raise damaged_run(path, f"it lacks {', '.join(sorted(wrong))}, or has it in another form")
    return found


def damaged_run(path: Path, why: str) -> DamagedError:
    """The error for a run.json that cannot be used: a source, so it is refused, not rebuilt."""
    todo = "put it back from a copy, or begin the run anew under another run_name (finished stages are taken over)"
    return DamagedError("The record of a run is damaged.", where=str(path), why=why, todo=todo)


def damaged(path: Path, why: str) -> DamagedError:
    """The error that names a damaged file of a finished stage."""
    todo = f"put it back from a copy, or delete {path.parent / MANIFEST}: the same command then makes the stage again"
    return DamagedError("A file of a finished stage is damaged.", where=str(path), why=why, todo=todo)


def check_sizes(folder: Path, found: Manifest) -> None:
    """Every file of the manifest is there with its size (quick; says nothing of the content)."""
    for name, entry in _kept(found):
        path = folder / name
        if not path.is_file():
            raise damaged(path, "it is missing")
        if path.stat().st_size != entry["size"]:
            raise damaged(path, f"it has {path.stat().st_size} bytes, not {entry['size']}")


def check_quickly(folder: Path, found: Manifest) -> None:
    """`check_sizes`, and the content of the files that are small."""
    check_sizes(folder, found)
    _check_content(folder, [(name, entry) for name, entry in _kept(found) if entry["size"] <= SMALL])


def check_hashes(folder: Path, found: Manifest) -> None:
    """Every file of the manifest has its size and its SHA-256."""
    check_sizes(folder, found)
    _check_content(folder, _kept(found))


def _check_content(folder: Path, entries: list[tuple[str, Any]]) -> None:
    for name, entry in entries:
        try:
            found = file_sha256(folder / name)
        except FileNotFoundError:  # removed since its size was looked at
            raise damaged(folder / name, "it is missing") from None
        if found != entry["sha256"]:
            raise damaged(folder / name, "its content is not what was written")


def _kept(found: Manifest) -> list[tuple[str, Any]]:
    return [(name, entry) for name, entry in found["files"].items() if name not in found["removed"]]


def read(folder: Path, name: str) -> bytes | None:
    """A small file of a finished stage, checked; None where the stage is not made or has no such file.

    Raises:
        DamagedError: its content is not what was written.
    """
    found = manifest(folder)
    if found is None or name not in found["files"]:
        return None
    if not (folder / name).is_file():
        raise damaged(folder / name, "it is missing")
    content = (folder / name).read_bytes()
    if sha256(content).hexdigest() != found["files"][name]["sha256"]:
        raise damaged(folder / name, "its content is not what was written")
    return content


def begin(root: Path, stage: Stage, inputs: Mapping[str, str]) -> tuple[Path, bool]:
    """The folder to make the stage in, and whether all is made there and only the last rename is missing.

    What an interrupted call left stays if it was for the same stage and the same inputs, to the byte.
    """
    work = root / f"{stage.folder}.tmp"
    try:
        sealed = manifest(work)
        if sealed is not None and (sealed["fingerprint"], sealed["inputs"]) == (stage.fingerprint, dict(inputs)):
            check_hashes(work, sealed)
            return work, True
    except DamagedError:
        durable.remove(work)
    marker, mark = work / MARKER, begun_as(stage, inputs)
    if not marker.exists() or marker.read_bytes() != mark:
        durable.remove(work)
        durable.make_folder(marker.parent)
        durable.write_bytes(marker, mark)
    return work, False


def begun_as(stage: Stage, inputs: Mapping[str, str | None]) -> bytes:
    """What marks begun work as that of this stage from these inputs."""
    return digest([stage.fingerprint, dict(inputs)]).encode()


def seal(stage: Stage, work: Path, inputs: Mapping[str, str]) -> None:
    """Write the manifest, with checksums, over what a stage has made.

    Args:
        inputs: the content of each need, as its own manifest gives it.
    """
    files = {}
    for path in sorted(p for p in work.rglob("*") if p.is_file()):
        name = path.relative_to(work)
        if not any(part.startswith(".") for part in name.parts) and name.name != MANIFEST:
            files[name.as_posix()] = {"size": path.stat().st_size, "sha256": file_sha256(path)}
    durable.write_record(work / MANIFEST, record(stage, inputs, files))
    for made in (*files, MANIFEST):  # not before: an interrupted stage must be able to write them again
        (work / made).chmod(0o444)


def record(stage: Stage, inputs: Mapping[str, str], files: Mapping[str, Mapping[str, Any]]) -> Manifest:
    """The manifest of a stage that is made."""
    needs = {role: need.fingerprint for role, need in stage.needs.items()}
    value = {"name": stage.name, "kind": stage.kind, "version": stage.spec.version, "fingerprint": stage.fingerprint}
    value |= {"spec": plain(stage.spec), "needs": needs, "inputs": dict(inputs)}
    return value | {"files": dict(files), "content": digest(dict(files)), "removed": []}


def publish(root: Path, stage: Stage, work: Path) -> None:
    """Give a sealed stage its place; what is not part of it is cleared: what an interrupted call would need, and what
    one that was killed had half written (a safetensors file is `.tmp...` until it is whole)."""
    target, made = root / stage.folder, manifest(work)
    assert made is not None
    durable.remove(work / durable.SCRATCH)
    for path in [path for path in work.rglob("*") if path.is_file()]:
        if path != work / MANIFEST and path.relative_to(work).as_posix() not in made["files"]:
            durable.remove(path)
    if target.is_dir() and any(path.is_dir() for path in target.iterdir()):  # other stages lie below: leave them
        for path in sorted(work.iterdir(), key=lambda p: p.name == MANIFEST):
            durable.replace_file(path, target / path.name)
        durable.remove(work)
    else:
        durable.remove(target)  # there only where a stage is made anew
        durable.rename_folder(work, target)


def drop_weights(folder: Path) -> None:
    """Remove a model's weights and leave the record of them; what needs them later makes them again."""
    found = manifest(folder)
    assert found is not None
    names = sorted(name for name in found["files"] if PurePosixPath(name).match(WEIGHTS))
    if found["removed"] != names:
        durable.write_record(folder / MANIFEST, found | {"removed": names})
    for name in names:
        durable.remove(folder / name)


@contextmanager
def owned(root: Path) -> Iterator[None]:
    """Hold the run folder against other processes. The system frees it when its owner ends, however it ends.

    Raises:
        RunBusy: another process holds it; host, process id and age are named.
    """
    lock, owner = FileLock(root / LOCK), root / OWNER
    with durable.disk_errors(root / LOCK):
        try:
            lock.acquire(timeout=A_GLANCE)
        except Timeout as error:
            todo = "wait for it, or stop it; then run the same command"
            raise RunBusy(
                "Another process is working on this run.", where=str(root), why=_owner(owner), todo=todo
            ) from error
    try:
        value = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.time()}
        durable.write_bytes(owner, json.dumps(value).encode())
        yield
    finally:
        owner.unlink(missing_ok=True)
        lock.release()


def held(root: Path) -> bool:
    """Whether a process holds the run folder. The system says so, on whatever host it is, and however one ended; where
    it keeps no locks, that a process says it does must do."""
    try:
        lock = os.open(root / LOCK, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(lock)
    return False


def _owner(path: Path) -> str:
    """Who holds a run, in words."""
    try:
        who = json.loads(path.read_bytes())
        return f"it runs on host {who['host']}, pid {who['pid']}, for {_age(time.time() - who['since'])}"
    except (OSError, ValueError, KeyError, TypeError):
        return "its owner has only just begun"


def _age(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
