"""One run from settings to a finished folder: find or make the folder, own it, bring every stage into being."""

import logging
import os
import platform
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from hashlib import sha256
from itertools import compress
from pathlib import Path
from typing import Any

from spin_reg import (
    config,
    durable,
    exact,
    harness,
    judges,
    machine,
    origins,
    outlook,
    processes,
    results,
    rundir,
    runlog,
    runner,
    sizes,
    space,
    stopping,
    survey,
    tracking,
    versions,
    vllm_python,
)
from spin_reg.config import Config
from spin_reg.context import Context
from spin_reg.errors import ConfigError, DamagedError, RunBusy, SpinRegError
from spin_reg.fingerprint import file_sha256, flatten, plain
from spin_reg.outlook import Planned
from spin_reg.plan import plan
from spin_reg.redact import redacted
from spin_reg.runner import Listener, Status
from spin_reg.settings import Dtype, KeepIterates, Precision, Pretrained, Tracker
from spin_reg.specs import BenchmarkSpec, PrepareSpec, SftSpec, Split, TrainSpec

QUIET = {
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
}
CONFIG = "config.yaml"
log = logging.getLogger(__name__)


def prepare(settings: Config, *, only_evaluate: bool = False) -> Planned:
    """Plan a run and look at what is there; writes nothing.

    Args:
        only_evaluate: plan no more than the evaluation of the iterates that are there.

    Raises:
        ConfigError: the folder was made with other settings; the model is not to be had. DataError: nor the data.
    """
    processes.check(settings.hardware, settings.model)
    outputs = Path(settings.outputs).expanduser().resolve()
    root = outputs / config.run_name(settings)
    saved = _saved(root)
    moved: dict[str, str] = {}
    if saved is None and only_evaluate:
        todo = "spin-reg status lists runs; other settings make another folder, so give the run's folder itself"
        raise ConfigError("This is no run.", where=str(root), why="it has no run.json", todo=todo)
    if saved is not None:
        moved = origins.moved(root, saved["settings"], config.identity_settings(settings))
        if _played(saved) > settings.schedule.iterations:  # what was played stays part of the run
            settings = replace(settings, schedule=replace(settings.schedule, iterations=saved["iterations"]))
    matched = settings.evaluation.exact_match.max_new_tokens
    if saved is None or matched is not None:
        sizes.check_positions(settings.model, settings.dataset, settings.generation, matched)
    found = origins.found(settings, (saved or {}).get("sources", {}), moved)
    stages = plan(settings, found)
    states = runner.states(root, outputs, stages)
    done = [stage for stage, state in zip(stages, states, strict=True) if state.status is Status.done]
    stop = results.stop(done, root=root, stages=stages, schedule=settings.schedule)
    if stop is not None:
        stays = results.until(stages, stop.iterate)
        stages, states = list(compress(stages, stays)), list(compress(states, stays))
    if only_evaluate:
        kept = results.evaluations(stages, {stage.name for stage in done})
        states = [state for stage, state in zip(stages, states, strict=True) if stage.name in kept]
        stages = [stage for stage in stages if stage.name in kept]
    written = _config_whole(root, saved)
    whole = not only_evaluate
    planned = Planned(settings, root, outputs, found, stages, states, written, whole=whole, stop=stop, moved=moved)
    if any(isinstance(stage.spec, BenchmarkSpec) for stage in planned.todo):
        harness.check()
    vllm_python.check(stage.spec for stage in planned.todo)
    return planned


def execute(
    planned: Planned, *, listener: Listener, command: Sequence[str], overrides: Sequence[str], data_alone: bool = False
) -> Planned:
    """Make what is missing of a planned run; how it came out.

    Args:
        command: as it was typed, verb and all. overrides: the settings that it comes to, where it was typed.
        data_alone: make the data and leave it at that; only what they need is asked of the disk, nothing of a judge.

    Raises:
        RunBusy: another process owns the folder. ConfigError: `data_alone`, of a run that was played. Whatever a stage
            raises.
    """
    settings, root = planned.config, planned.root
    for stage, state in zip(planned.stages, planned.states, strict=True):
        if state.status is Status.stale:
            raise runner.refused(root, stage, state)
    asked = replace(planned, stages=planned.stages[:1], states=planned.states[:1]) if data_alone else planned
    judges.check(settings, asked.todo, planned.sources.mt_bench, root)
    read = None
    if not root.exists():
        environment(settings)
        read = _check_data(planned, listener)
    _check_results(planned)
    space.check(planned.outputs, outlook.disk(asked, read))
    durable.make_folder(root)
    with rundir.owned(root):  # before anything slow: who comes second is told at once
        saved = _saved(root)
        if saved is not None:  # another process may have made it since we looked
            origins.moved(root, saved["settings"], config.identity_settings(settings))
            if _played(saved) > settings.schedule.iterations:
                why = "another process has just given it more iterations"
                raise RunBusy("This run has changed.", where=str(root), why=why, todo="run the same command again")
            if data_alone and survey.PREPARED not in saved:
                raise _refused_to_prepare(root)
        environment(settings)
        _write_provenance(planned, command, overrides, data_alone=data_alone)
        return _run(planned, listener, read, data_alone=data_alone)


def with_data(planned: Planned, *, listener: Listener, command: Sequence[str], overrides: Sequence[str]) -> Planned:
    """Make the data of a planned run, as `execute` would and will find them; the plan as it stands then.

    Raises:
        As `execute`.
    """
    if planned.states[0].status in (Status.done, Status.reuse):
        return planned
    execute(planned, listener=listener, command=command, overrides=overrides, data_alone=True)
    states = runner.states(planned.root, planned.outputs, planned.stages)
    return replace(planned, states=states, config_whole=_config_whole(planned.root, _saved(planned.root)))


def _run(planned: Planned, listener: Listener, read: Mapping[Split, int] | None, *, data_alone: bool) -> Planned:
    settings, root = planned.config, planned.root
    with runlog.kept(root / "run.log"):
        _warn_of_versions(root, [] if data_alone else _also(planned))
        _warn_of_precision(settings)
        if not planned.config_whole:
            log.warning("%s is damaged or was edited; it is a record, and was written again", root / CONFIG)
        for line in planned.moved.values():
            log.info("%s; what lies there is the same", line)
        keep = settings.keep_iterates
        goes = partial(space.unneeded, planned.stages, keep=keep, future=planned.future)
        enough = partial(results.stop, root=root, stages=planned.stages, schedule=settings.schedule)
        tracker = Tracker() if data_alone else settings.tracker  # which hears of a run once there is one
        results.record(root, planned.stop)
        if planned.whole:
            survey.record(root, outlook.pieces(planned, read))
        try:
            with tracking.mirror(root, tracker, flatten(plain(settings))) as mirror:
                runner.run_all(
                    planned.stages,
                    root=root,
                    outputs=planned.outputs,
                    listener=listener,
                    sink=mirror,
                    clock=time.monotonic,
                    run=processes.run_with(settings.hardware),
                    unneeded=goes if planned.whole and keep is not KeepIterates.all else None,
                    enough=bool if data_alone else enough if planned.whole else None,  # one is enough
                )
        except BaseException as error:
            log.exception("the run ended early: %s: %s", type(error).__name__, _one_line(error))
            raise
        if data_alone:
            log.info("only its data were asked for")
            return planned
        stop = enough(planned.stages)
        results.record(root, stop)
        if stop is not None:
            log.info("stopped %s", stop.words())
    return replace(planned, made=True, stop=stop)


def _one_line(error: BaseException) -> str:
    """What happened, as `status` shows it."""
    text = f"{error.what} {error.where}: {error.why}" if isinstance(error, SpinRegError) else str(error)
    return " ".join(text.split())


def _check_data(planned: Planned, listener: Listener) -> dict[Split, int] | None:
    """Before a new folder is made its data must be good: read them, in memory; how many examples each split has."""
    spec = planned.stages[0].spec
    if planned.states[0].status is not Status.todo:
        return None
    from spin_reg.stages import prepare as stage

    assert isinstance(spec, PrepareSpec)
    listener.stage(1, len(planned.stages), planned.stages[0], planned.states[0])
    return stage.check(spec, Context(listener.progress, poll=stopping.poll))


def _check_results(planned: Planned) -> None:
    """Most real answers must have a result, where results are to be matched; told as soon as the data are known."""
    exact_match, spec = planned.config.evaluation.exact_match, planned.stages[0].spec
    if exact_match.regex is None:
        return
    from spin_reg.stages import prepare as stage

    assert isinstance(spec, PrepareSpec)
    try:
        made = rundir.read(planned.folder(planned.stages[0]), f"{Split.heldout}.parquet")
    except DamagedError:  # it is made again
        made = None
    real = stage.heldout_answers(spec, made)
    if real:
        exact.wanted(exact_match, real)


def environment(settings: Config) -> None:
    """Pin what bits depend on, and quiet the libraries, before torch is imported."""
    for name, value in (QUIET | processes.bound() | processes.yielding()).items():
        os.environ.setdefault(name, value)
    from spin_reg import models

    models.environment(processes.threads(settings.hardware))


def _saved(root: Path) -> dict[str, Any] | None:
    found = rundir.provenance(root)
    if found is None and root.exists() and any(not path.name.startswith(".") for path in root.iterdir()):
        raise ConfigError(
            "This folder is not a run of ours.",
            where=str(root),
            why=f"it has no {rundir.RUN}, yet it is not empty",
            todo="choose another run_name or outputs",
        )
    return found


def _played(saved: Mapping[str, Any]) -> int:
    """How many iterations a run has by its record: none yet where its data alone were asked for."""
    return 0 if survey.PREPARED in saved else int(saved["iterations"])


def _refused_to_prepare(root: Path) -> ConfigError:
    return ConfigError(
        "--prepare makes the data of runs that were not played yet.",
        where=str(root),
        why="its data are gone or damaged, and what it played with is for train and resume to make again",
        todo=f"spin-reg resume {shlex.quote(str(root))}, or leave --prepare out",
    )


def _write_provenance(planned: Planned, command: Sequence[str], overrides: Sequence[str], *, data_alone: bool) -> None:
    settings, found = planned.config, planned.sources
    path = planned.root / rundir.RUN
    before = rundir.provenance(planned.root) or {}
    if survey.PREPARED in before and not data_alone:  # the run begins now; its data stay those that were looked at
        before = {"sources": before["sources"]}
    value = {
        "created": before.get("created") or datetime.now(UTC).isoformat(timespec="seconds"),
        "command": before.get("command") or [redacted(word) for word in command],
        "overrides": list(overrides),
        "cwd": str(Path.cwd()),  # what paths among these overrides are relative to
        "iterations": settings.schedule.iterations,
        "settings": config.identity_settings(settings),
        "sources": origins.record(found, before.get("sources", {})),
        "versions": versions.began(before.get("versions", {}), [] if data_alone else _also(planned)),
        "machine": {"platform": platform.platform(), "cpus": machine.cores()},
        "threads": processes.threads(settings.hardware),
        "processes": processes.count(settings.hardware),
    } | ({survey.PREPARED: True} if data_alone else {})
    text = config.as_yaml(settings).encode()
    durable.write_record(path, value | {"config_sha256": sha256(text).hexdigest()})  # first: it makes the folder ours
    durable.write_bytes(planned.root / CONFIG, text)


def _config_whole(root: Path, saved: Mapping[str, Any] | None) -> bool:
    """Whether config.yaml, which is for people, is as it was written."""
    path = root / CONFIG
    return saved is None or (path.is_file() and file_sha256(path) == saved.get("config_sha256"))


def _also(planned: Planned) -> list[str]:
    """Packages that make what is still to be made, beside those that every run uses."""
    loads = any(hasattr(stage.spec, "policy") for stage in planned.todo)
    trains = any(isinstance(stage.spec, SftSpec | TrainSpec) for stage in planned.todo)
    own = [package for _, package, _ in config.extras(planned.config.model)] if loads else []
    return own + (processes.packages(planned.config.hardware) if trains else [])


def _warn_of_precision(settings: Config) -> None:
    """Weights in bfloat16 hardly train; and on a CPU that has to put it together of other instructions it is slow."""
    from torch import cuda

    low = {"hardware.precision": settings.hardware.precision, "model.dtype": settings.model.dtype}
    for name, value in low.items():
        if value in (Precision.bf16, Dtype.bfloat16) and not cuda.is_available() and machine.bfloat16() is False:
            log.warning("%s=%s: this CPU has no instructions for bfloat16, float32 takes less time", name, value)
    adapted = isinstance(settings.model, Pretrained) and settings.model.lora.rank > 0
    if settings.model.dtype is Dtype.bfloat16 and not adapted:
        log.warning(
            "model.dtype=bfloat16: weights that train keep 8 bits, and most of a step is less than the last of them; "
            "model.dtype=float32 hardware.precision=bf16 keeps it, as does an adapter (model.lora.rank)"
        )


def _warn_of_versions(root: Path, also: Sequence[str]) -> None:
    """Versions are provenance: other ones than the run began with are told, not refused."""
    saved = _saved(root)
    assert saved is not None
    if changed := versions.changed(saved["versions"], also):
        log.warning("versions differ from those this run began with: %s", ", ".join(changed))
