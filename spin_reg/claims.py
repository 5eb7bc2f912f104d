"""One process at a time makes a stage: who else wants the same one waits, and then takes it over."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from spin_reg import durable, known
from spin_reg.stage import Stage

log = logging.getLogger(__name__)
EVERY = 0.5  # seconds between two tries


@contextmanager
def claimed(outputs: Path, stage: Stage, *, poll: Callable[[], None]) -> Iterator[None]:
    """Hold the stage against the other runs in `outputs`. The system frees it when its owner ends, however it ends.

    The lock's file goes when the stage is made and known (`known.remember`): who was waiting for it finds the stage,
    and so does who comes later. Hence look again for the stage inside the block.

    Args:
        poll: called while it waits; may raise.
    """
    path = known.lock(outputs, stage)
    durable.make_folder(path.parent)
    lock, told = FileLock(path), False
    while not lock.is_locked:
        try:
            with durable.disk_errors(path):
                _try(lock, EVERY if told else 0)
        except _Busy:
            if not told:
                log.warning("%s: waits: another run is making it", stage.name)
            told = True
            poll()
    try:
        yield
    finally:
        lock.release()


class _Busy(Exception):
    """Another process has the lock; filelock's own word for it is an OSError."""


def _try(lock: FileLock, seconds: float) -> None:
    try:
        lock.acquire(timeout=seconds)
    except Timeout as error:
        raise _Busy from error
