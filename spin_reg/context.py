"""What a stage is handed besides its spec and its inputs: ways to say how far it is, and to be asked to stop."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


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
