"""The one helper that writes what must survive a kill: temporary file, fsync, rename, fsync of the folder."""

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from spin_reg.errors import NoSpace, SpinRegError


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise full(path, error) from error
        raise SpinRegError(
            "A file or folder could not be written.",
            where=str(path),
            why=str(error),
            todo="mend it, then run the command again",
        ) from error
    except Exception as error:  # safetensors writes in Rust: its errors carry the system's only as text
        if "No space left" in str(error) or f"os error {errno.ENOSPC}" in str(error):
            raise full(path, error) from error
        raise


def full(path: Path, error: Exception) -> NoSpace:
    """The error for a disk without room."""
    todo = "make room and run the same command again"
    return NoSpace("The disk is full.", where=str(path), why=str(error), todo=todo)


def make_folder(path: Path) -> None:
    """Make the folder and its parents where they are not there."""
    with disk_errors(path):
        path.mkdir(parents=True, exist_ok=True)


def sync(path: Path) -> None:
    """Flush a file or a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: Path, content: bytes) -> None:
    """Make the file hold exactly `content`, or what it held before: never anything between."""
    temporary = path.with_name(f".{path.name}.tmp")
    with disk_errors(path):
        with temporary.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
        sync(path.parent)


def write_json(path: Path, value: Any) -> None:
    """`write_bytes` of indented JSON; NaN and infinity are refused."""
    write_bytes(path, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())


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
        source.rename(target)
        sync(target.parent)
