"""What a person sees: a live line in a terminal or plain lines when piped, and the table at the end."""

import logging
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from spin_reg import metrics, results
from spin_reg.outlook import Planned
from spin_reg.plan import Stage
from spin_reg.redact import redacted
from spin_reg.results import Values
from spin_reg.runner import State, Status
from spin_reg.scoreboard import benchmarks_table, mt_bench_table
from spin_reg.sheet import short

COLUMNS = (
    *("heldout_nll", "exact_match", "kl_data", "kl_off", "margin", "accuracy", "kl_to_base", "kl_to_previous"),
    "length_mean",
)
FIT = 8  # columns into 80 characters
PIPED_WIDTH = 140
EVERY = 10.0  # seconds between plain progress lines


class _Console(Console):
    """Once nobody reads it any more, it says no more: the run goes on."""

    def on_broken_pipe(self) -> None:
        self.quiet = True


class Screen:
    """Listens to the runner; one line a stage, with a live bar where there is a terminal."""

    def __init__(self, *, quiet: bool = False) -> None:
        terminal = sys.stderr.isatty()
        self.console = _Console(file=sys.stderr, highlight=False, width=None if terminal else PIPED_WIDTH)
        self.console.quiet = quiet  # workers of a sweep would speak all at once; their logs have it
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


def closing_words(planned: Planned, screen: Screen, *, everything: bool, briefly: bool = False) -> None:
    """What came out, and how to go on.

    Args:
        everything: all that was measured, not the main table alone. briefly: of a run that was finished before no more
            than that, since a table of all runs follows.
    """

    def say(text: str) -> None:
        screen.console.print(text, markup=False, soft_wrap=True)

    if not planned.stages:
        say(f"{planned.root}: nothing to evaluate.")
        return
    iterations = planned.config.schedule.iterations
    newest = max((p.parent.name for p in planned.root.glob("iterate-??/model")), default="iterate-00")
    played = int(newest.removeprefix("iterate-"))
    unfinished = not planned.whole and planned.stop is None and played < iterations
    if unfinished:
        say(f"{planned.root}: {played} of {iterations} iterates are made, and what is there is evaluated.")
    elif not planned.made:
        say(f"{planned.root} is finished: nothing to do.")
        if briefly:
            return
    table = iterates_table(planned.root, iterations)
    if table is not None:
        rest = details(planned.root, iterations, screen.console.width) if everything else []
        for shown in ("", table, "", *rest):
            screen.console.print(shown, markup=False)
    for judged in (benchmarks_table, mt_bench_table):
        found = judged(planned.root, planned.stages)
        if found is not None:
            screen.console.print(found)
    place = short(planned.root)
    more = "" if unfinished else f" schedule.iterations={iterations + 2}"
    if planned.stop is not None:
        say(f"stopped  {planned.stop.words()}")
        more = " schedule.stop_when=null"
    say(f"model    {place}/{newest}/model")
    say(f"metrics  {place}/metrics.jsonl")
    say(f"go on    spin-reg resume {shlex.quote(place)}{more}")


def _table(title: str, first: str) -> Table:
    look: dict[str, Any] = {"box": SIMPLE_HEAD, "show_edge": False, "padding": (0, 0, 0, 1)}
    table = Table(title=title or None, title_justify="left", caption_justify="left", **look)
    table.add_column(first, no_wrap=True)
    return table


def _best(found: Mapping[int, Values]) -> dict[str, int | None]:
    """The iterate that is best, by metric."""
    names = {name for values in found.values() for name in values}
    return {name: metrics.best(name, {k: v[name] for k, v in found.items() if name in v}) for name in names}


def _cell(values: Values, name: str, *, best: bool, between: str) -> Text:
    """A value, starred where it is best, and its standard error after `between`: four digits, so that columns fit."""
    if name not in values:
        return Text()
    value, star = values[name], "*" if best else " " if name in metrics.HEALTHY else ""
    places = max(0, 3 - max(0, len(str(int(abs(value)))) - 1))
    text = Text(f"{value:.{places}f}{star}", style="bold" if best else "")
    if f"{name}_se" in values:
        text.append(f"{between}±{values[f'{name}_se']:.{places}f}" + " " * len(star), style="not bold dim")
    return text


def _name(k: int) -> str:
    return "0 base" if k == 0 else str(k)


def iterates_table(root: Path, iterations: int) -> Table | None:
    """The main metrics of every iterate, one row each, in 80 columns; None where none was evaluated."""
    found = results.evaluated(root, iterations)
    names = [f"eval/{name}" for name in COLUMNS if any(f"eval/{name}" in values for values in found.values())][:FIT]
    if not names:
        return None
    table, best = _table(root.name, "iterate"), _best(found)
    table.caption = "* the best of its column;  ± one standard error"
    for name in names:
        table.add_column(name.removeprefix("eval/").replace("_", "\n"), justify="right")
    for k, values in found.items():
        table.add_row(_name(k), *(_cell(values, name, best=best[name] == k, between="\n") for name in names))
    return table


def details(root: Path, iterations: int, width: int) -> list[Table | str]:
    """All that was measured: a row a metric, as many iterates beside each other as fit; then how each metric behaved
    over the iterates, and the cross-play matrix.
    """
    found = results.evaluated(root, iterations)
    names = list(dict.fromkeys(name for values in found.values() for name in values if not name.endswith("_se")))
    best, made = _best(found), list[Table | str]()
    many = max(1, (width - 27) // 17)
    for some in (list(found)[i : i + many] for i in range(0, len(found), many)):
        table = _table("", "metric")
        for k in some:
            table.add_column(_name(k), justify="right", no_wrap=True)
        for name in names:
            cells = (_cell(found[k], name, best=best[name] == k, between=" ") for k in some)
            table.add_row(name.removeprefix("eval/"), *cells)
        made += [table, ""]
    behaved = _table("", "metric")
    for title in ("best at", "instability", "drawdown"):
        behaved.add_column(title, justify="right")
    for name in (name for name in names if best[name] is not None):
        bad = [metrics.badness(name, values[name]) for values in found.values() if name in values]
        sums = (f"{metrics.instability(bad):.3f}", f"{metrics.drawdown(bad):.3f}")
        behaved.add_row(name.removeprefix("eval/"), str(best[name]), *sums)
    if behaved.row_count:
        made += ["over the iterates: the best, the sum of all steps for the worse, the deepest fall", behaved, ""]
    matrix = results.crossplay(root, iterations)
    if matrix:
        made += [
            "cross-play: how often discriminator i tells real answers from those of iterate j",
            _matrix(matrix, "i \\ j", "accuracy"),
            "",
        ]
    preferred = results.preferences(root, iterations)
    if preferred:
        words = "preferences: how often iterate k gives a real answer a higher log-prob than iterate j"
        made += [words, _matrix(preferred, "k \\ j", "share"), ""]
    return made


def _matrix(matrix: Mapping[tuple[int, int], Values], corner: str, name: str) -> Table:
    table = _table("", corner)
    for j in sorted({j for _, j in matrix}):
        table.add_column(str(j), justify="right")
    for i in sorted({i for i, _ in matrix}):
        known = (matrix.get((i, j)) for j in sorted({j for _, j in matrix}))
        table.add_row(str(i), *("" if entry is None else f"{entry[name]:.3f}" for entry in known))
    return table
