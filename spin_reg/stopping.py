"""How a run ends when it is asked to: the first signal sets a flag that every loop polls, the second ends the process.

Where no loop polls in time (one long kernel, a library that waits), the process ends by itself after `GRACE` seconds;
what is on disk is whole at any moment, so that loses nothing that was finished.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from spin_reg.errors import Stopped

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # Slurm sends the last one before the time is up
GRACE = 8.0  # seconds

_asked: list[int] = []  # the signals that came
_timers: list[threading.Timer] = []
_last_words: list[Callable[[], None]] = []
_how = ["run the same command again"]


def poll() -> None:
    """End the work at hand if a signal has asked for it; to be called wherever stopping is safe.

    Raises:
        Stopped: a signal came.
    """
    if _asked:
        raise stopped()


def stopped() -> Stopped:
    """The error for a run that a signal stopped; `goes_on_by` says how to go on."""
    name = signal.Signals(_asked[0]).name if _asked else "SIGINT"
    return Stopped(f"Stopped by {name}.", where="the run at work", why="nothing finished is lost", todo=_how[0])


def goes_on_by(command: str) -> None:
    """What to tell who stopped the run."""
    _how[0] = command


@contextmanager
def listening() -> Iterator[None]:
    """Handle the signals while the block runs."""
    before = {number: signal.signal(number, _handle) for number in SIGNALS}
    _how[0] = "run the same command again"
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for timer in _timers:
            timer.cancel()
        _timers.clear()
        _asked.clear()


@contextmanager
def saving(save: Callable[[], None]) -> Iterator[None]:
    """Have `save` called, from another thread, where no loop polls in time; it must take what locks it needs."""
    _last_words.append(save)
    try:
        yield
    finally:
        _last_words.remove(save)


def _handle(number: int, frame: Any) -> None:
    _asked.append(number)
    if len(_asked) > 1:
        _say("stopped at once; what is on disk is whole")
        _end()
    _say("stopping as soon as it is safe; a second signal stops at once")
    timer = threading.Timer(GRACE, _give_up)
    timer.daemon = True
    _timers.append(timer)
    timer.start()


def _give_up() -> None:
    for save in _last_words:
        with suppress(Exception):  # the process ends either way
            save()
    _say(f"no safe point within {GRACE:.0f} s, so stopped where it was; nothing finished is lost")
    _end()


def _end() -> None:
    if sys.stderr.isatty():
        os.write(2, b"\x1b[?25h\n")  # a live line had hidden the cursor
    _say(f"to go on: {_how[0]}")
    os._exit(Stopped.exit_code)


def _say(text: str) -> None:
    with suppress(OSError):
        os.write(2, f"spin-reg: {text}\n".encode())
