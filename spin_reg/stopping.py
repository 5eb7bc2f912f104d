"""How a run ends when it is asked to: the first signal sets a flag that every loop polls, the second ends the process.

A thread of its own hears the signals, since Python's handlers wait for the main thread to come back from native code.
Where no loop polls in time (one long kernel, a library that waits), that thread ends the process after `GRACE` seconds;
what is on disk is whole at any moment, so that loses nothing that was finished.
"""

import os
import select
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from weakref import WeakSet

from spin_reg.errors import Stopped

SIGNALS = (  # Slurm sends SIGUSR1 before the time is up; SIGHUP comes as a terminal goes, unless nohup holds it off
    *(signal.SIGINT, signal.SIGTERM, signal.SIGUSR1),
    *(() if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else (signal.SIGHUP,)),
)
GRACE = 8.0  # seconds
APART = 0.0  # seconds within which several signals count as one; a launcher passes on what its processes have too

_asked: list[int] = []  # the signals that came
_last_words: list[Callable[[], None]] = []
_ends: list[Callable[[], None]] = []  # what ends the programs that run beside this process
_folders: "WeakSet[TemporaryDirectory[str]]" = WeakSet()
_how: list[tuple[str, Path]] = []  # other commands that go on, each once a file is there


def poll() -> None:
    """End the work at hand if a signal has asked for it; to be called wherever stopping is safe.

    Raises:
        Stopped: a signal came.
    """
    if _asked:
        raise stopped()


def asked() -> int | None:
    """The signal that has asked for it; None where none has."""
    return _asked[0] if _asked else None


def stopped() -> Stopped:
    """The error for a run that a signal stopped; `goes_on_by` adds a way to go on."""
    name = signal.Signals(_asked[0]).name if _asked else "SIGINT"
    return Stopped(f"Stopped by {name}.", where="the run at work", why="nothing finished is lost", todo=_to_go_on())


def goes_on_by(command: str, once: Path) -> None:
    """Another way to go on than the same command, told to who stops the run once that file is there."""
    _how[:] = [(command, once)]


def _to_go_on() -> str:
    return ", or ".join(["run the same command again", *(command for command, once in _how if once.exists())])


def temporary_folder() -> TemporaryDirectory[str]:
    """A folder that goes with its object, or with the process where a signal ends that."""
    folder = TemporaryDirectory(prefix="spin-reg-")
    _folders.add(folder)
    return folder


@contextmanager
def listening() -> Iterator[None]:
    """Hear the signals while the block runs."""
    heard, told = os.pipe()
    os.set_blocking(told, False)
    handlers = {number: signal.signal(number, _ignore) for number in SIGNALS}
    before = signal.set_wakeup_fd(told, warn_on_full_buffer=False)
    _how.clear()
    thread = threading.Thread(target=_hear, args=(heard,), name="signals", daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        os.close(told)
        thread.join(GRACE)
        _asked.clear()


@contextmanager
def saving(save: Callable[[], None]) -> Iterator[None]:
    """Have `save` called, from another thread, where no loop polls in time; it must take what locks it needs."""
    _last_words.append(save)
    try:
        yield
    finally:
        _last_words.remove(save)


@contextmanager
def ending(end: Callable[[], None]) -> Iterator[None]:
    """Have `end` called, from another thread, where this process is ended at once; it must be quick."""
    _ends.append(end)
    try:
        yield
    finally:
        _ends.remove(end)


def _ignore(number: int, frame: Any) -> None:
    """The handler in the main thread: without one a signal would do what it does by default."""


def _hear(pipe: int) -> None:
    """Read the signals' numbers as they come, until the pipe is closed."""
    patience: float | None = None
    first = 0.0
    while True:
        ready, _, _ = select.select([pipe], [], [], patience)
        if not ready:
            patience = None
            threading.Thread(target=_give_up, daemon=True).start()
            continue
        numbers = os.read(pipe, 64)
        if not numbers:
            os.close(pipe)
            return
        for number in numbers:
            if number in SIGNALS and not (_asked and time.monotonic() - first < APART):
                _asked.append(number)
                first = time.monotonic() if len(_asked) == 1 else first
        if len(_asked) > 1:
            _say("stopped at once; what is on disk is whole")
            _end()
        if _asked and patience is None:
            _say("stopping as soon as it is safe; a second signal stops at once")
            patience = GRACE


def _give_up() -> None:
    for save in list(_last_words):
        try:
            save()
        except Exception as error:  # the process ends either way
            _say(f"the steps since the last checkpoint could not be kept ({type(error).__name__}: {error})")
    _say(f"no safe point within {GRACE:.0f} s, so stopped where it was; nothing finished is lost")
    _end()


def _end() -> None:
    if sys.stderr.isatty():
        os.write(2, b"\x1b[?25h\n")  # a live line had hidden the cursor
    for end in list(_ends):
        end()
    for folder in list(_folders):
        shutil.rmtree(folder.name, ignore_errors=True)
    _say(f"to go on: {_to_go_on()}")
    os._exit(Stopped.exit_code)


def _say(text: str) -> None:
    with suppress(OSError):
        os.write(2, f"spin-reg: {text}\n".encode())
