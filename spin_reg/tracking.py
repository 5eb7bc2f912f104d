"""Trackers mirror metrics.jsonl: one tracker run over the whole loop, with steps of our own.

A tracker lives in a thread of its own, so a run never waits for it before its end, and then only so long.
"""

import importlib
import json
import logging
import netrc
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any, NoReturn, Protocol
from urllib.parse import urlparse

from spin_reg import durable
from spin_reg.errors import ConfigError, DamagedError, SpinRegError, Stopped
from spin_reg.fingerprint import digest
from spin_reg.metrics import best
from spin_reg.settings import Tracker, Wandb

OFFLINE = "W&B, offline,"
log = logging.getLogger(__name__)
WANDB_FILE = "wandb.json"
AFTER_A_SIGNAL = 2.0  # seconds that a stopped run waits for its tracker at most
_unclosed: set[object] = set()  # trackers of this process that were begun and have not ended well


class Mirror(Protocol):
    """An open tracker, which takes rows by index, in order, each at most once.

    Attributes:
        sent: how many rows were sent; what the tracker has already is not. place: where they go, for people.
    """

    sent: int
    place: str

    def log(self, index: int, row: dict[str, Any]) -> None:
        """One metrics row; `index` is its line in metrics.jsonl, from 0."""

    def close(self, exit_code: int) -> None:
        """The process ends; `exit_code` says how."""


class NoMirror:
    """`tracker=none`."""

    def log(self, index: int, row: dict[str, Any]) -> None:
        """Nothing is mirrored."""

    def close(self, exit_code: int) -> None:
        """Nothing was opened."""


class Background:
    """A tracker in a thread of its own: whatever it does, or does not, the run goes on.

    Its first error is logged and it is asked nothing more. `log` returns at once; `close` waits at most `patience`
    seconds.
    """

    def __init__(self, opening: Callable[[], Mirror], root: Path, patience: float) -> None:
        self._queue: SimpleQueue[tuple[int, dict[str, Any]] | int] = SimpleQueue()  # rows, then the exit code
        self._next, self._patience, self._left = 0, patience, False
        self._rest = f"metrics.jsonl keeps all; `spin-reg sync {shlex.quote(str(root))}` sends the rest"
        self._thread = Thread(target=self._work, args=(opening,), name="tracker", daemon=True)
        _unclosed.add(self)
        self._thread.start()

    def log(self, index: int, row: dict[str, Any]) -> None:
        if index >= self._next and self._thread.is_alive():
            self._next = index + 1
            self._queue.put((index, row))

    def close(self, exit_code: int) -> None:
        self._queue.put(exit_code)
        patience = min(self._patience, AFTER_A_SIGNAL) if exit_code == Stopped.exit_code else self._patience
        self._thread.join(patience)
        if self._thread.is_alive():
            self._left = True
            log.warning("the tracker did not finish within %g s; %s", patience, self._rest)

    def _work(self, opening: Callable[[], Mirror]) -> None:
        try:
            mirror = opening()
            while isinstance(item := self._queue.get(), tuple):
                mirror.log(*item)
            mirror.close(item)
            _unclosed.discard(self)
        except BaseException as error:  # SystemExit too: a thread would end of it without a word
            if not self._left:  # else its run is over, and the log may be another run's by now
                log.warning("the tracker failed (%s); %s", _words(error), self._rest)


class WandbMirror:
    """One Weights & Biases run: its id is kept in the run folder before init, with the rows that it has, by step.

    Its steps only grow, while a row may come late: of an evaluation that was asked for afterwards, or done again. Such
    rows have the next steps.
    """

    def __init__(self, root: Path, tracker: Wandb, settings: dict[str, Any]) -> None:
        import wandb

        self._wandb, self._root, self._log_model = wandb, root, tracker.log_model
        keyless = not (os.environ.get("WANDB_API_KEY") or _has_login()) and "WANDB_MODE" not in os.environ
        if keyless:
            log.info("W&B: no key, so offline; `spin-reg sync` or `wandb sync` sends it later")
        self._run = wandb.init(
            project=tracker.project,
            entity=tracker.entity,
            group=tracker.group,
            id=wandb_id(root),
            name=root.name,
            dir=root,
            config=settings,
            mode="offline" if keyless else None,
            resume="allow",
            reinit="create_new",  # the tracker of a sweep's last point may still be at it
            settings=wandb.Settings(silent=True, console="off", x_disable_stats=True),
        )
        self.sent, self._first = 0, int(self._run.starting_step or 0)
        self._there = _there(root)[: self._first]  # the rest of it never arrived
        self._known = set(self._there)
        self.place = f"{OFFLINE} in {self._run.sync_dir}" if self._run.offline else f"W&B, {self._run.url}"
        for prefix in ("sft", "train"):
            self._run.define_metric(f"{prefix}/*", step_metric="step_in_all")
        self._run.define_metric("eval/*", step_metric="iterate")
        self._judged: dict[int, dict[str, Any]] = {}

    def log(self, index: int, row: dict[str, Any]) -> None:
        if "iterate" in row:
            self._judged[row["iterate"]] = self._judged.get(row["iterate"], {}) | row  # a judge's row comes after
            self._artifact(row["iterate"])  # it has no step, and W&B keeps equal ones once
        key = digest(row)[:16]
        if key in self._known:
            return
        step = len(self._there)
        self._there.append(key)
        self._known.add(key)
        if step < self._first:  # nobody noted what was sent: then it was the first rows
            return
        payload = dict(row) | {"step_in_all": index}
        if "iterate" in row and "task" not in row:  # a benchmark's row has none
            payload |= self._samples(row["iterate"]) | self._iterates()
        self._run.log(payload, step=step)
        self.sent += 1
        if "iterate" in row:
            self._note()

    def _note(self) -> None:
        durable.write_json(self._root / WANDB_FILE, {"id": wandb_id(self._root), "rows": self._there})

    def _samples(self, k: int) -> dict[str, Any]:
        """The table of sample generations of an iterate, beside its metrics."""
        try:
            text = (self._root / f"iterate-{k:02d}/evaluate/samples.json").read_text(encoding="utf-8")
        except FileNotFoundError:  # the run may be making it anew meanwhile
            return {}
        rows = json.loads(text)
        columns = list(rows[0]) if rows else []
        data = [[row[column] for column in columns] for row in rows]
        return {f"samples/iterate_{k:02d}": self._wandb.Table(columns=columns, data=data)} if rows else {}

    def _iterates(self) -> dict[str, Any]:
        """The table of all iterates so far, standard errors beside each metric, and the best of each in a last row."""
        names = list(dict.fromkeys(name for row in self._judged.values() for name in row if name.startswith("eval/")))
        if not names:
            return {}
        data = [[str(k), *(row.get(name) for name in names)] for k, row in self._judged.items()]
        last: list[Any] = ["best"]
        for name in names:
            k = best(name, {k: row[name] for k, row in self._judged.items() if name in row})
            last.append(None if k is None else self._judged[k][name])
        return {"iterates": self._wandb.Table(columns=["iterate", *names], data=[*data, last])}

    def _artifact(self, k: int) -> None:
        folder = self._root / f"iterate-{k:02d}/model"
        if self._log_model and folder.is_dir():
            artifact = self._wandb.Artifact(f"{self._root.name}-iterate-{k:02d}", type="model")
            artifact.add_dir(str(folder))
            self._run.log_artifact(artifact)

    def close(self, exit_code: int) -> None:
        self._note()
        self._run.finish(exit_code=exit_code)


def _there(root: Path) -> list[str]:
    """What is on record of the rows at W&B, in the order of their steps."""
    with suppress(OSError, ValueError, AttributeError, RecursionError):
        found = json.loads((root / WANDB_FILE).read_bytes()).get("rows", [])
        return [str(key) for key in found] if isinstance(found, list) else []
    return []


def wandb_id(root: Path) -> str:
    """The id of the run at W&B, in the run folder before W&B first hears of it; a damaged one is made anew."""
    path = root / WANDB_FILE
    if path.exists():
        with suppress(ValueError, KeyError, TypeError, RecursionError):
            found = json.loads(path.read_text(encoding="utf-8"))["id"]
            if re.fullmatch("[0-9a-f]{16}", found):
                return str(found)
        log.warning("%s is damaged: it holds no id of 16 hex digits; the run goes on under a new one at W&B", path)
    made = digest([str(root.resolve()), os.urandom(8).hex()])[:16]
    durable.write_json(path, {"id": made})
    return made


def _has_login() -> bool:
    """Whether `wandb login` left a key in the netrc file; never asks, never calls out."""
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


class AccelerateMirror:
    """Any tracker that Accelerate knows (tensorboard and others), by its name there."""

    sent = 0

    def __init__(self, root: Path, name: str, settings: dict[str, Any]) -> None:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        found: Any = LOGGER_TYPE_TO_CLASS[name]
        # else each call would look after Accelerate's process state, which the run may be making at this moment
        kind: Any = type(found.__name__, (found,), {"main_process_only": False})
        self.place = f"{name}, {root}" if kind.requires_logging_directory else name
        self._tracker = kind("spin-reg", logging_dir=root) if kind.requires_logging_directory else kind("spin-reg")
        if hasattr(self._tracker, "start"):  # newer releases of Accelerate begin only when told
            self._tracker.start()
        self._tracker.store_init_configuration(
            {key: value if isinstance(value, int | float | str) else str(value) for key, value in settings.items()}
        )

    def log(self, index: int, row: dict[str, Any]) -> None:
        self._tracker.log(row, step=index)
        self.sent += 1

    def close(self, exit_code: int) -> None:
        self._tracker.finish()


def _words(error: BaseException) -> str:
    """An error on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


@contextmanager
def mirror(root: Path, tracker: Tracker, settings: dict[str, Any]) -> Iterator[Background | NoMirror]:
    """The tracker of a run, closed with the exit code that the process is about to have."""
    if tracker.name == "none":
        yield NoMirror()
        return
    with suppress(Exception):  # the thread meets the same error, and tells it
        _load(tracker)
    opened = Background(lambda: _open(root, tracker, settings), root, tracker.patience)
    try:
        yield opened
    except BaseException as error:
        stopped = Stopped.exit_code if isinstance(error, KeyboardInterrupt) else 1
        opened.close(int(getattr(error, "exit_code", stopped)))
        raise
    opened.close(0)


def _load(tracker: Tracker) -> None:
    """Import what the tracker needs, in the run's thread: two threads that import the same see it half made."""
    if isinstance(tracker, Wandb):
        importlib.import_module("wandb")
    else:
        importlib.import_module("accelerate.tracking")
        importlib.import_module("accelerate").PartialState()  # its loggers want it


def _open(root: Path, tracker: Tracker, settings: dict[str, Any]) -> Mirror:
    if isinstance(tracker, Wandb):
        return WandbMirror(root, tracker, settings)
    return AccelerateMirror(root, tracker.name, settings)


def replay(metrics: Path, tracker: Tracker, settings: dict[str, Any]) -> str:
    """Send a run's metrics.jsonl to a tracker, here and now; says how many rows went where.

    Raises:
        ConfigError: the tracker is none, or there are no metrics. DamagedError: the metrics cannot be read.
        SpinRegError: the tracker failed.
    """
    root = metrics.parent
    if tracker.name == "none":
        todo = f"spin-reg sync {shlex.quote(str(root))} tracker=wandb"
        raise ConfigError("There is no tracker to send to.", where=str(root), why="its tracker is none", todo=todo)
    if not metrics.exists():
        why = "no stage that keeps metrics is finished, or the file was deleted"
        todo = f"spin-reg resume {shlex.quote(str(root))}"
        raise ConfigError("This run has no metrics.", where=str(metrics), why=why, todo=todo)
    try:
        rows = durable.read_jsonl(metrics)
    except ValueError as error:
        todo = f"spin-reg resume {shlex.quote(str(root))} makes it again from the stages"
        raise DamagedError("The metrics are damaged.", where=str(metrics), why=str(error), todo=todo) from error
    token = object()
    _unclosed.add(token)
    try:
        _load(tracker)
        opened = _open(root, tracker, settings)
        for index, row in enumerate(rows):
            opened.log(index, row)
        opened.close(0)
    except Exception as error:
        why = _words(error)
        todo = "mend it and run the same command again, or give another tracker=..."
        raise SpinRegError("The tracker failed.", where=f"tracker={tracker.name}", why=why, todo=todo) from error
    _unclosed.discard(token)
    said = f"{opened.sent} of {len(rows)} rows {{}} {opened.place}"
    if not opened.place.startswith(OFFLINE):
        return said.format("sent to")
    return said.format("written to") + "; nothing was sent: for that, wandb login (or WANDB_API_KEY) and the same again"


def leave(code: int) -> NoReturn:
    """End the process with this exit code; at once where a tracker did not end well, whose own hooks could hold it."""
    if not _unclosed:
        sys.exit(code)
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # closed: nobody reads it any more
            stream.flush()
    logging.shutdown()
    os._exit(code)
