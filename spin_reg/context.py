"""What a stage is handed besides its spec and its inputs: ways to say how far it is, and to be asked to stop."""

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

EVERY = 10.0  # seconds between the log's lines on how far a stage is
log = logging.getLogger(__name__)


class Sink(Protocol):
    """Where metrics rows are mirrored to; a row's index is its line in the run's metrics.jsonl."""

    def log(self, index: int, row: dict[str, Any]) -> None:
        """One metrics row."""


def _quiet_progress(done: int, total: int, unit: str) -> None:
    """Say nothing."""


def _quiet_log(row: dict[str, Any]) -> None:
    """Keep nothing."""


def _never() -> None:
    """Nobody asks to stop."""


@dataclass(frozen=True)
class Context:
    """Attributes:
    progress: called with (done, total, unit) as work goes on.
    log: called with each metrics row as it is made; the stage's own `metrics.jsonl` is what counts.
    poll: called wherever stopping is safe; raises `Stopped` when a signal has asked for it.
    """

    progress: Callable[[int, int, str], None] = _quiet_progress
    log: Callable[[dict[str, Any]], None] = _quiet_log
    poll: Callable[[], None] = _never


@dataclass
class Logged:
    """A progress function that also says in the log how far a stage is, and how long that took since its first call.

    What was there before, from a run that was stopped, is not counted.
    """

    name: str
    progress: Callable[[int, int, str], None]
    clock: Callable[[], float]
    first: tuple[int, float] | None = field(default=None, init=False)
    said: float = field(default=0.0, init=False)

    def __call__(self, done: int, total: int, unit: str) -> None:
        self.progress(done, total, unit)
        now = self.clock()
        if self.first is None:
            self.first, self.said = (done, now), now
        since, began = self.first
        if now - self.said >= EVERY and done > since:
            self.said = now
            at = {"done": done, "total": total, "since": since, "seconds": round(now - began, 2), "unit": unit}
            log.info("%s: at %s", self.name, json.dumps(at))
