"""Many runs from one command: the words that a sweep adds, what is heard while its points run, and its end."""

import json
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from threading import Event, Thread
from typing import Any

from spin_reg import cli, metrics, points, settings, stopping
from spin_reg.config import Config
from spin_reg.errors import ConfigError, Stopped
from spin_reg.fingerprint import digest
from spin_reg.pace import duration
from spin_reg.points import STOP, Point, told

FOLDER = ".sweeps"
EVERY = 0.3  # seconds between two looks at what the points say
MULTIRUN = {"-m", "--multirun"}


def group(words: Sequence[str]) -> str | None:
    """The name under which a tracker groups the points of a sweep: what is swept; None of a single run.

    The same command gives the same group, so that a sweep that goes on stays in it.
    """
    if not MULTIRUN & set(words):
        return None
    swept = " ".join(word.strip() for word, sweeps in _parsed(words) if sweeps) or "sweep"
    return swept if len(swept) <= 120 else f"{swept[:100]} {digest(swept)[:6]}"


def _parsed(words: Sequence[str]) -> list[tuple[str, bool]]:
    """The overrides among the words, and whether each gives several values."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    found = [word for word in words if "=" in word and not word.startswith(("-", "hydra"))]
    return [(word, OverridesParser.create().parse_override(word).is_sweep_override()) for word in found]


def fixed(words: Sequence[str]) -> frozenset[str]:
    """The keys that are the same in all points by the words of the command."""
    return frozenset(word.partition("=")[0] for word, sweeps in _parsed(words) if not sweeps)


def grouped(config: Config, group: str | None) -> Config:
    """The settings of a sweep's point: W&B groups the points, where the user has named no group."""
    tracker = config.tracker
    if group is None or not isinstance(tracker, settings.Wandb) or tracker.group is not None:
        return config
    return replace(config, tracker=replace(tracker, group=group))


@contextmanager
def folder(words: Sequence[str]) -> Iterator[Path]:
    """Where the points of a sweep tell of themselves; it goes, but for what workers that died have said.

    With a launcher it lies below `outputs`, which all workers see; else it is a temporary one.
    """
    if _value(words, "hydra/launcher") in (None, "basic"):
        with stopping.temporary_folder() as scratch:
            yield Path(scratch)
        return
    outputs = Path(_value(words, "outputs") or "outputs").expanduser().absolute()
    place = outputs / FOLDER / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    yield place
    if not _lost(place):
        shutil.rmtree(place, ignore_errors=True)
        for path in (place.parent, outputs):
            with suppress(OSError):  # something is in it
                path.rmdir()


def _value(words: Sequence[str], key: str) -> str | None:
    """What a word of the command line sets, as text."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    found = [word for word in words if word.lstrip("+").startswith(f"{key}=")]
    return str(OverridesParser.create().parse_override(found[-1]).value()) if found else None


def added(words: Sequence[str], place: Path) -> list[str]:
    """The words that a sweep adds for Hydra: its folder; and for Optuna that a failed point is no reason to stop, and
    which side of the objective is better.
    """
    more = {"hydra.sweep.dir": "'" + str(place).replace("\\", "\\\\").replace("'", "\\'") + "'"}
    if _value(words, "hydra/sweeper") == "optuna":
        more["hydra.sweeper.max_failure_rate"] = "1.0"
        if metrics.HEALTHY.get(_value(words, "objective") or "") is metrics.Healthy.high:
            more["hydra.sweeper.direction"] = "maximize"
    return [f"{key}={value}" for key, value in more.items() if _value(words, key) is None]


@contextmanager
def attended(place: Path, same: frozenset[str]) -> Iterator[None]:
    """While points run in processes of their own: print what failed at once, and pass signals on to them.

    Args:
        same: keys that are not to be told, since they are the same in all points.
    """
    over, seen = Event(), set[int]()

    def look() -> None:
        last = False
        while not last:
            last = over.wait(EVERY)
            for said in told(place):
                if said.point not in seen and not said.shown:
                    how = points.result(said) + f" in {duration(said.seconds)}"
                    print(f"point {said.point} ({points.own(said, same)}): {how}", file=sys.stderr)
                    if said.error is not None:
                        print(f"spin-reg: {said.error}", file=sys.stderr)
                seen.add(said.point)

    def hear(number: int, frame: Any) -> None:
        if (place / STOP).exists():
            raise KeyboardInterrupt
        place.mkdir(parents=True, exist_ok=True)
        (place / STOP).touch()
        if number == signal.SIGINT and sys.stdin is not None and sys.stdin.isatty():
            return  # the terminal has sent it to all of them
        for pid in _at_work(place):
            with suppress(OSError):
                os.kill(pid, number)

    handlers = {number: signal.signal(number, hear) for number in stopping.SIGNALS}
    thread = Thread(target=look, name="points", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        for number, handler in handlers.items():
            signal.signal(number, handler)


def run(compose: Callable[[Any], Any], words: Sequence[str], task: Callable[[Any], Any], *, full: bool) -> int:
    """Have Hydra make every point; the exit code.

    Raises:
        BrokenPipeError: nobody reads what a point printed. Whatever Hydra raises where it cannot sweep.
    """
    same = fixed(words)
    with folder(words) as place:
        sys.argv += added(words, place)
        try:
            with attended(place, same):
                compose(Point(task, full, place))()
        except Exception as error:
            if not told(place):
                raise
            cli.report(cli.ours(error, full=full))
            close(place, same)
            return 1
        return close(place, same)


def _at_work(place: Path) -> list[int]:
    """The processes on this host, other than this one, that make a point."""
    begun = [json.loads(path.read_text()) for path in place.glob("*.begun") if not path.with_suffix(".json").exists()]
    return [b["pid"] for b in begun if b["host"] == socket.gethostname() and b["pid"] != os.getpid()]


def _lost(place: Path) -> list[int]:
    """The points that began and never told how they ended."""
    return sorted(int(path.stem) for path in place.glob("*.begun") if not path.with_suffix(".json").exists())


def close(place: Path, same: frozenset[str]) -> int:
    """Print the table of a sweep, and what to do about what is missing; the exit code.

    Raises:
        BrokenPipeError: nobody reads what a point printed.
    """
    found, lost = told(place), _lost(place)
    if any(said.unread for said in found):
        raise BrokenPipeError
    shown = points.table(found, same)
    roots = list(dict.fromkeys(Path(said.root) for said in found if said.root is not None and not said.code))
    if len(roots) > 1:
        cli.page_after(roots)
    for number in lost:
        print(f"spin-reg: point {number} ended without a word; what its process said: {place}", file=sys.stderr)
    codes = [said.code for said in found]
    stopped = (place / STOP).exists()
    if shown and (stopped or lost or any(codes)):
        unfinished = "stopped" if stopped else f"{sum(map(bool, codes)) + len(lost)} of {len(found) + len(lost)} failed"
        hopeless = not stopped and not lost and {code for code in codes if code} == {ConfigError.exit_code}
        first = "mend what is named above, and " if hopeless else ""
        print(f"spin-reg: {unfinished}; {first}the same command again makes what is missing", file=sys.stderr)
    return Stopped.exit_code if stopped else next(filter(None, codes), int(bool(lost)))
