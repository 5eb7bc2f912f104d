"""Faults on demand: the k-th change of the disk kills the process, or fails as a full or a broken disk does."""

import errno
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spin_reg import durable


class Killed(BaseException):
    """Stands for signal 9 where a process of its own would cost too much: nothing may catch it."""


@dataclass
class Counter:
    """How many changes were made; the one numbered `at` (from 1) ends in `fault`.

    Attributes:
        fault: `raise` (Killed), `kill` (signal 9), `ENOSPC` or `EIO`.
    """

    at: int = 0
    fault: str = "raise"
    calls: int = 0

    def step(self, half: Any = None) -> None:
        self.calls += 1
        if self.calls != self.at:
            return
        if half is not None:
            half()
        if self.fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.fault == "raise":
            raise Killed
        number = getattr(errno, self.fault)
        raise OSError(number, os.strerror(number))


class _Os:
    """The `os` module as `durable` sees it, with every call that changes the disk counted before it is made."""

    COUNTED = ("fsync", "replace", "rename", "link", "unlink", "makedirs")

    def __init__(self, counter: Counter) -> None:
        self._counter = counter

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name not in self.COUNTED:
            return real

        def call(*args: Any, **kwargs: Any) -> Any:
            self._counter.step()
            return real(*args, **kwargs)

        return call


class _Shutil:
    """`shutil` as `durable` sees it: a removal that is cut short leaves half of the folder."""

    def __init__(self, counter: Counter) -> None:
        self._counter = counter

    def __getattr__(self, name: str) -> Any:
        real = getattr(shutil, name)
        if name != "rmtree":
            return real

        def call(path: Path, ignore_errors: bool = False) -> None:
            files = sorted(p for p in Path(path).rglob("*") if p.is_file())
            if files:
                self._counter.step(files[0].unlink)
            real(path, ignore_errors=ignore_errors)

        return call


class _Halves:
    """A stream that a fault cuts halfway through the bytes of one of its writes."""

    def __init__(self, stream: Any, counter: Counter) -> None:
        self._stream, self._counter = stream, counter

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, content: Any) -> int:
        self._counter.step(lambda: self._stream.write(memoryview(content)[: len(content) // 2]))
        return int(self._stream.write(content))


HELPERS = ("write_bytes", "rename_folder", "replace_file", "link", "remove", "make_folder")


@contextmanager
def before_calls(counter: Counter) -> Iterator[Counter]:
    """Count the calls of the helpers that change the disk; the fault comes as a call begins."""
    real = {name: getattr(durable, name) for name in HELPERS}

    def counted(name: str) -> Any:
        def call(*args: Any) -> None:
            with durable.disk_errors(args[0]):  # as the helper reports what its own calls of the system raise
                counter.step()
            real[name](*args)

        return call

    for name in HELPERS:
        setattr(durable, name, counted(name))
    try:
        yield counter
    finally:
        for name in HELPERS:
            setattr(durable, name, real[name])


@contextmanager
def inside_calls(counter: Counter) -> Iterator[Counter]:
    """Count every step inside the helpers: half a write, fsync, rename, link, half a removal."""
    held = vars(durable)
    real = {name: held[name] for name in ("os", "shutil", "_fill", "writing")}
    real_fill, real_writing = durable._fill, durable.writing

    def fill(path: Path, content: bytes) -> None:
        counter.step(lambda: real_fill(path, content[: len(content) // 2]))
        real_fill(path, content)

    @contextmanager
    def writing(path: Path) -> Iterator[Any]:
        with real_writing(path) as stream:
            yield _Halves(stream, counter)

    held |= {"os": _Os(counter), "shutil": _Shutil(counter), "_fill": fill, "writing": writing}
    try:
        yield counter
    finally:
        held |= real
