"""Trackers mirror metrics.jsonl: one tracker run over the whole loop, with steps of our own."""

import json
import logging
import netrc
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlparse

from spin_reg import durable
from spin_reg.fingerprint import digest
from spin_reg.settings import Tracker, Wandb

log = logging.getLogger(__name__)
WANDB_FILE = "wandb.json"


class Mirror(Protocol):
    """A tracker that takes rows by index and iterates by folder; each at most once."""

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


class Quiet:
    """A tracker must never hurt the run: its first error is logged, and it is asked nothing more."""

    def __init__(self, mirror: Mirror) -> None:
        self._mirror: Mirror | None = mirror
        self._next = 0

    def log(self, index: int, row: dict[str, Any]) -> None:
        if index >= self._next and self._mirror is not None:
            self._next = index + 1
            self._guarded("log", index, row)

    def close(self, exit_code: int) -> None:
        self._guarded("close", exit_code)

    def _guarded(self, method: str, *args: Any) -> None:
        try:
            if self._mirror is not None:
                getattr(self._mirror, method)(*args)
        except Exception as error:  # whatever a tracker raises, the run and metrics.jsonl go on without it
            self._mirror = None
            log.warning("the tracker failed (%s: %s); metrics.jsonl stays complete", type(error).__name__, error)


class WandbMirror:
    """One Weights & Biases run: its id is kept in the run folder before init, its steps are the lines' indices."""

    def __init__(self, root: Path, tracker: Wandb, settings: dict[str, Any]) -> None:
        import wandb

        saved = root / WANDB_FILE
        if not saved.exists():
            durable.write_json(saved, {"id": digest([str(root.resolve()), os.urandom(8).hex()])[:16]})
        run_id = json.loads(saved.read_text(encoding="utf-8"))["id"]
        if not re.fullmatch(r"[\w-]+", run_id):
            raise ValueError(f"{saved} holds no run id")  # W&B makes files under this name
        self._wandb, self._root, self._log_model = wandb, root, tracker.log_model
        if not (os.environ.get("WANDB_API_KEY") or _has_login()) and "WANDB_MODE" not in os.environ:
            log.info("W&B: no key, so offline; `wandb sync` sends it later")
            os.environ["WANDB_MODE"] = "offline"
        self._run = wandb.init(
            project=tracker.project,
            entity=tracker.entity,
            group=tracker.group,
            id=run_id,
            name=root.name,
            dir=root,
            config=settings,
            resume="allow",
            settings=wandb.Settings(silent=True, console="off", x_disable_stats=True),
        )
        self._first = int(self._run.starting_step or 0)
        for prefix in ("sft", "train"):
            self._run.define_metric(f"{prefix}/*", step_metric="step_in_all")
        self._run.define_metric("eval/*", step_metric="iterate")

    def log(self, index: int, row: dict[str, Any]) -> None:
        if index < self._first:
            return
        payload = dict(row) | {"step_in_all": index}
        if "iterate" in row:
            payload |= self._samples(row["iterate"])
            self._artifact(row["iterate"])
        self._run.log(payload, step=index)

    def _samples(self, k: int) -> dict[str, Any]:
        """The table of sample generations of an iterate, beside its metrics."""
        for folder in (f"iterate-{k:02d}/evaluate", f"iterate-{k:02d}/evaluate.tmp"):
            path = self._root / folder / "samples.json"
            if path.exists():
                rows = json.loads(path.read_text(encoding="utf-8"))
                columns = list(rows[0]) if rows else []
                data = [[row[column] for column in columns] for row in rows]
                return {f"samples/iterate_{k:02d}": self._wandb.Table(columns=columns, data=data)} if rows else {}
        return {}

    def _artifact(self, k: int) -> None:
        folder = self._root / f"iterate-{k:02d}/model"
        if self._log_model and folder.is_dir():
            artifact = self._wandb.Artifact(f"{self._root.name}-iterate-{k:02d}", type="model")
            artifact.add_dir(str(folder))
            self._run.log_artifact(artifact)

    def close(self, exit_code: int) -> None:
        self._run.finish(exit_code=exit_code)


def _has_login() -> bool:
    """Whether `wandb login` left a key in the netrc file; never asks, never calls out."""
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


class AccelerateMirror:
    """Any tracker that Accelerate knows (tensorboard and others), by its name there."""

    def __init__(self, root: Path, name: str, settings: dict[str, Any]) -> None:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        kind = LOGGER_TYPE_TO_CLASS[name]
        self._tracker = kind("spin-reg", logging_dir=root) if kind.requires_logging_directory else kind("spin-reg")
        if hasattr(self._tracker, "start"):  # newer releases of Accelerate begin only when told
            self._tracker.start()
        self._tracker.store_init_configuration(
            {key: value if isinstance(value, int | float | str) else str(value) for key, value in settings.items()}
        )

    def log(self, index: int, row: dict[str, Any]) -> None:
        self._tracker.log(row, step=index)

    def close(self, exit_code: int) -> None:
        self._tracker.finish()


@contextmanager
def mirror(root: Path, tracker: Tracker, settings: dict[str, Any]) -> Iterator[Mirror]:
    """The tracker of a run, closed with the exit code that the process is about to have."""
    opened = Quiet(_open(root, tracker, settings))
    try:
        yield opened
    except BaseException as error:
        opened.close(int(getattr(error, "exit_code", 1)))
        raise
    opened.close(0)


def _open(root: Path, tracker: Tracker, settings: dict[str, Any]) -> Mirror:
    try:
        if isinstance(tracker, Wandb):
            return WandbMirror(root, tracker, settings)
        return NoMirror() if tracker.name == "none" else AccelerateMirror(root, tracker.name, settings)
    except Exception as error:  # as in Quiet
        log.warning("the tracker did not start (%s: %s); metrics.jsonl is kept", type(error).__name__, error)
        return NoMirror()
