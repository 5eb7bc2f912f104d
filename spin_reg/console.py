"""What a person sees: a live line in a terminal or plain lines when piped, and the table at the end."""

import json
import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from spin_reg import rundir
from spin_reg.errors import DamagedError
from spin_reg.plan import Stage
from spin_reg.redact import redacted
from spin_reg.runner import State, Status

COLUMNS = ("heldout_nll", "kl_data", "kl_off", "margin", "accuracy", "kl_to_base", "kl_to_previous", "length_mean")
PIPED_WIDTH = 140
EVERY = 10.0  # seconds between plain progress lines


class _Console(Console):
    """Once nobody reads it any more, it says no more: the run goes on."""

    def on_broken_pipe(self) -> None:
        self.quiet = True


class Screen:
    """Listens to the runner; one line a stage, with a live bar where there is a terminal."""

    def __init__(self) -> None:
        terminal = sys.stderr.isatty()
        self.console = _Console(file=sys.stderr, highlight=False, width=None if terminal else PIPED_WIDTH)
        self._bar: Progress | None = None
        self._titles: dict[str, str] = {}  # a stage may begin inside another, to make what that one needs again
        self._title, self._began, self._said, self._heard = "", 0.0, 0.0, 0.0
        self._counted = (0, "")

    def stage(self, index: int, total: int, stage: Stage, state: State) -> None:
        self.close()  # the data are looked at once before their stage begins
        self._title = self._titles[stage.name] = f"[{index}/{total}] {stage.name}"
        self._began = self._said = self._heard = time.monotonic()
        self._counted = (0, "")
        if state.status is Status.reuse:
            self._line(f"{self._title}  reused: {state.reason}")
        if state.status is Status.todo and self.console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[unit]}s"),
            )
            self._bar = Progress(
                *columns, TimeElapsedColumn(), TimeRemainingColumn(), console=self.console, transient=True
            )
            self._bar.add_task(self._title.replace("[", r"\["), total=None, unit="step")
            self._bar.start()

    def progress(self, done: int, total: int, unit: str) -> None:
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done, total=total, unit=unit)
            return
        if self._counted != (total, unit):  # the data are read as bytes, then tokenised as rows
            self._counted, self._began = (total, unit), self._heard
        self._heard = now
        if now - self._said >= EVERY and done < total:
            self._said = now
            left = (now - self._began) / max(done, 1) * (total - done)
            self._line(f"{self._title}  {unit} {done}/{total}, about {left:.0f} s left")

    def finished(self, stage: Stage, seconds: float) -> None:
        self.close()
        self._line(f"{self._titles[stage.name]}  {seconds:.1f} s")

    @contextmanager
    def warnings(self) -> Iterator[None]:
        """Show what is logged as a warning, as one line above the live one."""
        handler = _Lines(self._line)
        logger = logging.getLogger("spin_reg")
        logger.addHandler(handler)
        try:
            yield
        finally:
            logger.removeHandler(handler)

    def close(self) -> None:
        """Take the live line down."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _line(self, text: str) -> None:
        self.console.print(text, markup=False, soft_wrap=True)


class _Lines(logging.Handler):
    """Warnings as lines."""

    def __init__(self, say: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self._say = say

    def emit(self, record: logging.LogRecord) -> None:
        if not record.exc_info:  # an error that ends the run is told by the command
            self._say(redacted(f"warning: {record.getMessage()}"))


def iterates_table(root: Path, iterations: int) -> Table | None:
    """The metrics of every iterate, one row each; None where none was evaluated."""
    found: dict[int, dict[str, float]] = {}
    for k in range(iterations + 1):
        try:
            content = rundir.read(root / f"iterate-{k:02d}" / "evaluate", "metrics.json")
        except DamagedError:  # of a run that is not evaluated any more; else it was made again
            content = None
        if content is not None:
            found[k] = json.loads(content)
    names = [name for name in COLUMNS if any(f"eval/{name}" in values for values in found.values())]
    if not names:
        return None
    table = Table(title=root.name, title_justify="left", box=SIMPLE_HEAD, padding=(0, 0, 0, 1))  # fits 80 columns
    table.add_column("iterate")
    for name in names:
        table.add_column(name.replace("_", "\n"), justify="right")
    for k, values in found.items():
        cells = [f"{values[f'eval/{name}']:.3f}" if f"eval/{name}" in values else "" for name in names]
        table.add_row("0 base" if k == 0 else str(k), *cells)
    return table
