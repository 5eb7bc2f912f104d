"""A point of a sweep: one run, and what it tells of itself in whatever process it is made.

A launcher is handed a function by its name, so that a worker gets the overrides and composes for itself. The answer is
a file in the sweep's folder: `NUMBER.begun`, then `NUMBER.json`.
"""

import json
import os
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from spin_reg import cli, config, groups, overrides, rundir, sheet, survey
from spin_reg.errors import ConfigError, DamagedError, Stopped
from spin_reg.pace import duration
from spin_reg.redact import redacted

STOP = "stop"  # the file that tells points not to begin
NLL = "eval/heldout_nll"


@dataclass(frozen=True)
class Made:
    """A run that a point asked for. `anew`: something was missing. `value`: of the objective, if there is one."""

    root: Path
    anew: bool
    value: float | None


@dataclass(frozen=True)
class Told:
    """What a point says at its end. `code`: its exit code. `shown`: its error has been printed."""

    point: int
    words: list[str]
    code: int
    seconds: float
    root: str | None = None
    anew: bool = True
    value: float | None = None
    error: str | None = None
    unread: bool = False
    shown: bool = False


@dataclass(frozen=True)
class Point:
    """One run of a sweep. It never raises: the other points go on, unless a signal came.

    Attributes:
        task: what to do with the composed settings; a function of a module, so that a worker finds it by its name.
        full: whether tracebacks are printed. place: the sweep's folder.
    """

    task: Callable[[Any], Any]
    full: bool
    place: Path

    def __call__(self, cfg: Any) -> float | None:
        """Returns the objective's value; NaN where there is none."""
        from hydra.core.hydra_config import HydraConfig

        config.register()  # a worker is new
        overrides.register_help(cli.conf_dir())
        hydra = HydraConfig.get()
        number, alone = int(hydra.job.num), hydra.runtime.choices["hydra/launcher"] == "basic"
        if (self.place / STOP).exists():
            return float("nan")
        self.place.mkdir(parents=True, exist_ok=True)
        _write(self.place / f"{number}.begun", {"host": socket.gethostname(), "pid": os.getpid()})
        made, failure, unread, began = None, None, False, time.monotonic()
        try:
            if hydra.runtime.choices["hydra/sweeper"] == "optuna" and cfg.objective is None:
                raise _aimless()
            made = self.task(cfg)
        except BrokenPipeError:
            unread = True
        except Exception as error:
            failure = cli.ours(error, full=self.full)
            if alone:
                cli.report(failure)
        code = failure.exit_code if failure is not None else int(unread)
        if code == Stopped.exit_code:
            (self.place / STOP).touch()
        run = made if isinstance(made, Made) else None
        said = Told(
            number,
            list(hydra.overrides.task),
            code,
            time.monotonic() - began,
            root=_begun(cfg) if run is None else str(run.root),
            anew=run is None or run.anew,
            value=None if run is None else run.value,
            error=None if failure is None else redacted(str(failure)),
            unread=unread,
            shown=alone,
        )
        _write(self.place / f"{number}.json", asdict(said))
        return float("nan") if said.value is None else said.value


def _begun(cfg: Any) -> str | None:
    """The folder of a run that ended early; None where it has none."""
    try:
        settings = config.load(cfg, sweep=True)
    except ConfigError:
        return None
    root = Path(settings.outputs).expanduser().resolve() / config.run_name(settings)
    return str(root) if (root / rundir.RUN).is_file() else None


def _aimless() -> ConfigError:
    todo = f"objective={NLL}, or eval/TASK/METRIC of a benchmark"
    return ConfigError("Optuna needs an objective.", where="hydra/sweeper=optuna", why="objective is null", todo=todo)


def _write(path: Path, value: Any) -> None:
    """A whole file or none: others look on."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(json.dumps(value))
    os.replace(temporary, path)


def told(place: Path) -> list[Told]:
    """What the points have said, in their order."""
    found = [Told(**json.loads(path.read_text())) for path in place.glob("*.json")]
    return sorted(found, key=lambda said: said.point)


def own(said: Told, same: frozenset[str]) -> str:
    """The words of a point that are not those of all points."""
    return " ".join(word for word in said.words if word.partition("=")[0] not in same)


def result(said: Told) -> str:
    if said.code:
        return "stopped" if said.code == Stopped.exit_code else "failed"
    return "done" if said.anew else "was finished"


def table(points: Sequence[Told], same: frozenset[str]) -> bool:
    """One row a point: what is its own among the words, how it went, and what came out; False where nothing did."""
    if not any(said.root for said in points):
        return False
    rows = []
    for said in points:
        rows.append(
            [own(said, same), result(said), *_outcome(said), _number(said.value), duration(said.seconds), _where(said)]
        )
    sheet.say("")
    columns = ("point", "result", "iterates", "heldout_nll", "reused", "objective", "time", "run")
    sheet.show("", columns, rows, right=columns[2:7])
    return True


def _outcome(said: Told) -> list[str]:
    """How many iterates were judged, the NLL of the newest, and how many of its stages other runs had made."""
    if said.root is None:
        return ["", "", ""]
    root = Path(said.root)
    try:
        run = groups.read(root)
    except DamagedError:
        run = None
    nll = {} if run is None else {k: v[NLL] for k, v in run.metrics.items() if NLL in v}
    seen = survey.look(root)
    reused = f"{len(survey.taken(root))}/{seen.stages_total or seen.stages_done}"
    return [f"{len(nll)}" if nll else "", f"{nll[max(nll)]:.3f}" if nll else "", reused]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _where(said: Told) -> str:
    return "" if said.root is None else Path(said.root).name
