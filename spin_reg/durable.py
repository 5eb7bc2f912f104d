"""The one place that changes what must survive a kill: temporary file, fsync, rename, fsync of the folder.

Every change of a run folder is made by a function of this module, and each is all or nothing: after a kill, a full disk
or an I/O error at any point, a path holds what it held before or what it was to hold, never anything between.
"""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from spin_reg.errors import NoSpace, SpinRegError
from spin_reg.fingerprint import digest

CHECKSUM = "checksum"
REMOVED = ".removed"  # ending of a folder on its way out
SCRATCH = ".scratch"  # below a stage at work: what lets an interrupted call go on; no part of the result


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn the system's errors inside the block into ours, with the path named."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise full(path, error) from error
        raise broken(path, error) from error
    except Exception as error:  # safetensors writes in Rust: its errors carry the system's only as text
        if "No space left" in str(error) or f"os error {errno.ENOSPC}" in str(error):
            raise full(path, error) from error
        if "(os error " in str(error):
            raise broken(path, error) from error
        raise


def full(path: Path, error: Exception) -> NoSpace:
    """The error for a disk without room."""
    todo = "make room and run the same command again; what was there before is as it was"
    return NoSpace("The disk is full.", where=str(path), why=str(error), todo=todo)


def broken(path: Path, error: Exception) -> SpinRegError:
    """The error for a path that cannot be written for any other reason."""
    todo = "mend it, then run the command again; what was there before is as it was"
    return SpinRegError("A file or folder could not be written.", where=str(path), why=str(error), todo=todo)


def make_folder(path: Path) -> None:
    """Make the folder and its parents where they are not there."""
    with disk_errors(path):
        os.makedirs(path, exist_ok=True)


def sync(path: Path) -> None:
    """Flush a file or a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: Path, content: bytes) -> None:
    """Make the file hold exactly `content`, or what it held before: never anything between."""
    with _replacing(path) as temporary:
        _fill(temporary, content)


@contextmanager
def writing(path: Path) -> Iterator[BinaryIO]:
    """A stream whose bytes are the file's once the block ends well; till then, and else, it holds what it held."""
    with _replacing(path) as temporary, temporary.open("wb") as stream:
        yield stream


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    temporary = path.with_name(f".{path.name}.tmp")
    with disk_errors(path):
        try:
            yield temporary
            sync(temporary)
            os.replace(temporary, path)
        except Exception:
            temporary.unlink(missing_ok=True)  # on a full disk half a file is in the way
            raise
        sync(path.parent)


def _fill(path: Path, content: bytes) -> None:
    with path.open("wb") as stream:
        stream.write(content)


def write_json(path: Path, value: Any) -> None:
    """`write_bytes` of indented JSON; NaN and infinity are refused."""
    write_bytes(path, _indented(value))


def _indented(value: Any) -> bytes:
    return (json.dumps(value, indent=1, allow_nan=False) + "\n").encode()


def write_record(path: Path, value: dict[str, Any]) -> None:
    """`write_json` with a checksum of its own inside, for the files that vouch for others."""
    write_bytes(path, record(value))


def record(value: dict[str, Any]) -> bytes:
    """What `write_record` writes."""
    return _indented({**value, CHECKSUM: digest(value)})


def read_record(path: Path) -> dict[str, Any]:
    """What `write_record` wrote, without the checksum.

    Raises:
        ValueError: it is not what was written. OSError: it cannot be read.
    """
    try:
        found = json.loads(path.read_bytes())
        if not isinstance(found, dict) or CHECKSUM not in found:
            raise ValueError("it has no checksum")
        checksum = found.pop(CHECKSUM)
        if digest(found) != checksum:
            raise ValueError("its content is not what was written")
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    return found


def jsonl(rows: list[dict[str, Any]]) -> bytes:
    """One JSON object a line; NaN and infinity are refused."""
    return "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows).encode()


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    """`write_bytes` of one JSON object a line."""
    write_bytes(path, jsonl(rows))


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of one JSON object a line."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def rename_folder(source: Path, target: Path) -> None:
    """Publish a finished folder under its name; everything in it reaches the disk first."""
    with disk_errors(target):
        for path in sorted(source.rglob("*")):
            sync(path)
        sync(source)
        os.rename(source, target)
        sync(target.parent)


def replace_file(source: Path, target: Path) -> None:
    """Move a file over another."""
    with disk_errors(target):
        sync(source)
        os.replace(source, target)
        sync(target.parent)


def link(source: Path, target: Path) -> None:
    """The same file under a second name; a copy where the disk has no links, or is another."""
    with disk_errors(target):
        os.makedirs(target.parent, exist_ok=True)
        try:
            os.link(source, target)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
                raise
            shutil.copy2(source, target)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there; a folder goes at once, or not at all."""
    with disk_errors(path):
        if not path.is_dir():
            if path.exists():
                os.unlink(path)
            return
        going = path.with_name(f".{path.name}{REMOVED}")
        shutil.rmtree(going, ignore_errors=True)
        os.rename(path, going)
        shutil.rmtree(going)


def tidy(root: Path) -> None:
    """Finish the removals that a kill cut short."""
    for path in list(root.rglob(f".*{REMOVED}")):
        shutil.rmtree(path, ignore_errors=True)
