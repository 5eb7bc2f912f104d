"""What a stage is handed besides its spec and its inputs: a way to say how far it is."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


def _quiet_progress(done: int, total: int, unit: str) -> None:
    """Say nothing."""


def _quiet_log(row: dict[str, Any]) -> None:
    """Keep nothing."""


@dataclass(frozen=True)
class Context:
    """Attributes:
    progress: called with (done, total, unit) as work goes on.
    log: called with each metrics row as it is made; the stage's own `metrics.jsonl` is what counts.
    """

    progress: Callable[[int, int, str], None] = _quiet_progress
    log: Callable[[dict[str, Any]], None] = _quiet_log
