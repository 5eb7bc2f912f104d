"""The words of `spin-reg report`, and what `train` calls when it is done."""

import logging
import shlex
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from spin_reg import durable, manual, runlog
from spin_reg.errors import ConfigError, SpinRegError
from spin_reg.metrics import HEALTHY
from spin_reg.report import figures, gather, page, story
from spin_reg.report.sheets import PAGE
from spin_reg.sheet import short

USAGE = manual.usage("report")
FIGURES = "figures"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Made:
    """Where a page lies, how many figures beside it, and the runs that could not be read."""

    page: Path
    figures: Path
    count: int
    unread: Sequence[SpinRegError]

    def words(self) -> str:
        return f"report   {short(self.page)}"


def report(folders: Sequence[Path], *, to: Path | None = None, metric: str | None = None, png: bool = False) -> Made:
    """Write the page about these runs, and its figures: into `figures/` beside report.html, NAME-figures/ of another.

    Raises:
        ConfigError: no runs, no place to write to, no such metric, or nothing to draw PNG with. DamagedError: no run
            can be read.
    """
    judge = _judge(metric)
    target = to if to is not None else place(folders)
    if target.suffix != ".html" or target.is_dir():
        raise ConfigError("The page is an HTML file.", where=f"--to {target}", why="it must end in .html", todo=USAGE)
    runs, unread = gather.runs(gather.roots(folders))
    if not runs:
        raise unread[0]
    told = story.told(runs, judge, [f"{error.where}: {error.why}" for error in unread])
    durable.make_folder(target.parent)
    beside = target.parent / (FIGURES if target.name == PAGE else f"{target.stem}-{FIGURES}")
    count = figures.write(told, beside, png=png)
    durable.write_bytes(target, page.page(told, target.parent.resolve()).encode())
    return Made(target, beside, count, unread)


def _judge(metric: str | None) -> str | None:
    if metric is None:
        return None
    name = metric if metric.startswith("eval/") else f"eval/{metric}"
    if name not in HEALTHY:
        why = (
            f"no side of it is better by itself; those that have one: {', '.join(k.partition('/')[2] for k in HEALTHY)}"
        )
        raise ConfigError("Iterates cannot be judged by this.", where=f"--metric {metric}", why=why, todo=USAGE)
    return name


def place(folders: Sequence[Path]) -> Path:
    """Where the page goes: into the folder, or into the one that holds them all.

    Raises:
        ConfigError: several folders that do not lie in one.
    """
    if len(folders) == 1:
        return folders[0] / PAGE
    parents = {folder.resolve().parent for folder in folders}
    if len(parents) > 1:
        why = "these folders do not lie in one folder"
        raise ConfigError("Where should the page go?", where="spin-reg report", why=why, todo=f"give --to: {USAGE}")
    return parents.pop() / PAGE


def main(words: Sequence[str]) -> Sequence[SpinRegError]:
    """The verb: write the page and say where it is. The runs that could not be read are handed back, to be told."""
    given = manual.parsed("report", words)
    made = report(
        [Path(folder) for folder in given.dir], to=given.to and Path(given.to), metric=given.metric, png=given.png
    )
    print(made.words())
    if made.count:
        print(f"figures  {short(made.figures)} ({made.count})")
    return made.unread


def after(roots: Sequence[Path]) -> Sequence[SpinRegError]:
    """The page at the end of a run, or of a sweep. What goes wrong with it is handed back, to be told: the run is
    finished and whole whatever becomes of its page, so its exit code stays that of a finished run.
    """
    again = f"spin-reg report {shlex.join(short(root) for root in roots)}"
    try:
        made = report(roots)
    except SpinRegError as error:
        return [error]
    except Exception as error:
        with runlog.kept(roots[0] / "run.log"):
            log.exception("the report was not written")
        what = traceback.format_exception_only(error)[-1].strip()
        todo = f"the run itself is finished; the traceback is in its run.log, and `{again}` tries again"
        return [SpinRegError("The report was not written.", where=str(roots[0]), why=what, todo=todo)]
    print(made.words(), file=sys.stderr)
    return made.unread
