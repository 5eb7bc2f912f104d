"""Which processes make a stage: the runner's own, one of its own, or several that torchrun starts.

A process of its own gives all its memory back, and a crash in native code is that stage's failure and not the run's.
"""

import json
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path
from typing import Any

from spin_reg import child, errors, jobs, launched, machine, runner, sizes, stopping, usage, wire
from spin_reg.context import Context
from spin_reg.errors import ConfigError, SpinRegError
from spin_reg.generation import Backend
from spin_reg.jobs import Job
from spin_reg.settings import Dtype, Hardware, Lora, Model, Pretrained, Quantize, Sharding
from spin_reg.specs import GenerateSpec
from spin_reg.stage import Stage

HEAVY = {"sft", "generate", "score", "train", "divergence", "converse"}  # they load a model, and ranks share their rows
SHOWN = 4  # lines
LOOKS = 4000  # one run alone is no slower with it; with fewer looks it is
INSTALL = "pip install spin-reg[deepspeed]"
DEEPSPEED = (0, 19, 8), (0, 20)  # from, and up to but without: its inner workings differ from one to the next
AGENT = re.compile(r"exitcode: (-?\d+)\) local_rank: (\d+)")  # torchrun, of the rank that ended first
REPORT = re.compile(r"[WE]\d{4} .*torch/distributed/elastic")  # and so its report begins
log = logging.getLogger(__name__)
Run = Callable[[Stage, dict[str, Path], Path, Context], None]


def run_with(hardware: Hardware) -> Run:
    """How the stages of a run are made."""
    if launched.world() > 1:
        return partial(_in_step, hardware=hardware)
    apart = hardware.isolate or hardware.processes > 1
    return partial(_apart, hardware=hardware) if apart else runner.run_stage


def check(hardware: Hardware, model: Model | None = None) -> None:
    """Under a launcher the processes are there, and they can share what they are to share of the model.

    Raises:
        ConfigError: the settings ask for others, or for what cannot be shared.
    """
    there = launched.world()
    if there > 1 and (hardware.isolate or hardware.processes not in (1, there)):
        wrong = "hardware.isolate=true" if hardware.isolate else f"hardware.processes={hardware.processes}"
        why = f"a launcher has started {there} processes, and they are those that work"
        raise ConfigError("A setting cannot be used.", where=wrong, why=why, todo="leave it out, or the launcher")
    if hardware.sharding is not Sharding.none and count(hardware) == 1:
        todo = "give hardware.processes=N, start the command by torchrun, or leave it out"
        raise _unshared(hardware.sharding, "one process has nobody to share with", todo)
    if packages(hardware):
        _check_zero(hardware.sharding, model)
    elif hardware.sharding is Sharding.full and isinstance(model, Pretrained) and model.lora.quantize is Quantize.int8:
        why = "the layers of model.lora.quantize=int8 do not find their weights where FSDP2 lays them"
        raise _unshared(hardware.sharding, why, "use model.lora.quantize=nf4, or hardware.sharding=none")


def packages(hardware: Hardware) -> list[str]:
    """What trains beside torch."""
    return ["deepspeed"] if hardware.sharding in (Sharding.zero1, Sharding.zero2) else []


def _check_zero(sharding: Sharding, model: Model | None) -> None:
    """DeepSpeed is there, and does with these weights what one process does."""
    if find_spec("deepspeed") is None:
        raise _unshared(sharding, "it needs the package deepspeed, which is not here", INSTALL)
    found = metadata.version("deepspeed")
    if not DEEPSPEED[0] <= tuple(int(n) for n in re.findall(r"\d+", found)[:3]) < DEEPSPEED[1]:
        first, last = (".".join(map(str, version)) for version in DEEPSPEED)
        why = f"DeepSpeed {found} is installed, and what is known to work is {first} or later, before {last}"
        raise _unshared(sharding, why, INSTALL)
    lora = model.lora if isinstance(model, Pretrained) else Lora()
    if lora.quantize is not Quantize.none:
        why = f"with model.lora.quantize={lora.quantize} an adapter is trained, and its optimizer is small"
        raise _unshared(sharding, why, "leave it out")
    if model is not None and model.dtype is not Dtype.float32 and lora.rank == 0:
        why = f"of weights in {model.dtype} DeepSpeed trains float32 copies: not what one process does"
        raise _unshared(sharding, why, "use hardware.sharding=full, or model.dtype=float32")


def _unshared(sharding: Sharding, why: str, todo: str) -> ConfigError:
    return ConfigError("A setting cannot be used.", where=f"hardware.sharding={sharding}", why=why, todo=todo)


def count(hardware: Hardware) -> int:
    """How many processes work on a stage that deals its rows."""
    return max(hardware.processes, launched.world())


def here(hardware: Hardware) -> int:
    """How many of them are on this machine."""
    return launched.local_world() if launched.world() > 1 else hardware.processes


def threads(hardware: Hardware) -> int:
    """Threads of one process: what was asked for, else what OMP_NUM_THREADS says, else its share of the cores."""
    return hardware.threads or machine.threads() or max(1, machine.cores() // here(hardware))


def words(hardware: Hardware) -> str:
    """How the stages of a run are made, for people; empty where the command makes all itself."""
    each, many = threads(hardware), count(hardware)
    if many > 1:
        return f"{many} for each stage that loads a model, {each} thread{'s' * (each > 1)} each"
    return "one for each stage that loads a model" if hardware.isolate else ""


def job_of(stage: Stage, inputs: Mapping[str, Path], work: Path, hardware: Hardware) -> Job:
    """A stage as it is handed to other processes."""
    folders = {role: str(folder.absolute()) for role, folder in inputs.items()}
    return Job(stage.name, stage.spec, folders, str(work.absolute()), threads(hardware), _ranks(stage, hardware))


def _ranks(stage: Stage, hardware: Hardware) -> int:
    """How many processes make a stage; vLLM is asked by one, and starts what it needs itself."""
    asks = isinstance(stage.spec, GenerateSpec) and stage.spec.generation.backend is Backend.vllm
    return 1 if asks else count(hardware)


def _in_step(stage: Stage, inputs: dict[str, Path], work: Path, context: Context, *, hardware: Hardware) -> None:
    """Make a stage with the ranks of a launcher, where it deals its rows."""
    if stage.kind in HEAVY and _ranks(stage, hardware) > 1:
        launched.run(job_of(stage, inputs, work, hardware), context)
        return
    if stage.kind in HEAVY:
        from spin_reg import iterates

        iterates.make_room()
        launched.make_room()
    _apart(stage, inputs, work, context, hardware=hardware)


def _apart(stage: Stage, inputs: dict[str, Path], work: Path, context: Context, *, hardware: Hardware) -> None:
    """Make a stage in one or more processes of its own, where it is a heavy one.

    Raises:
        SpinRegError: what they raised; or that one ended without a word. Stopped: once they have stopped.
    """
    if stage.kind not in HEAVY:
        return runner.run_stage(stage, inputs, work, context)
    job = job_of(stage, inputs, work, hardware)
    scratch = stopping.temporary_folder()
    with scratch as folder, wire.board(Path(folder, wire.NAME)) as board:
        path = Path(folder, "job.json")
        path.write_text(json.dumps(jobs.written(job), allow_nan=False), encoding="utf-8")
        hearing = _Hearing(board, job, context)
        code, lines = child.run(
            command(job, path), environment(job), poll=hearing.poll, ask=hearing.ask, kill=board.kill
        )
        hearing.rest()
        if lines:
            log.info("%s: its processes also said:\n%s", job.name, "\n".join(lines))
        if code != 0 or hearing.done < job.processes:
            raise _crashed(job, code, lines, board.lost)


def command(job: Job, path: Path) -> list[str]:
    """The words that start a job's processes."""
    worker = ["-m", "spin_reg.worker", str(path)]
    if job.processes == 1:
        return [sys.executable, *worker]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(job.processes)]
    return [sys.executable, *launcher, *worker]


def bound() -> dict[str, str]:
    """What keeps a process from growing by the product kernels of every number of tokens that it ever read.

    Each takes about half a megabyte, and both oneDNN and PyTorch's layer over it keep 1024. Those of one batch, which
    every layer uses, are fewer than `sizes.KERNELS`.
    """
    return {name: str(sizes.KERNELS) for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")}


def yielding() -> dict[str, str]:
    """How often GNU's OpenMP, PyTorch's on Linux, has an idle thread look for work before it gives its core away.

    It looks 300,000 times, which is longer than a small model's whole operations take: two runs on the same cores then
    keep them from each other by looking.
    """
    return {} if "OMP_WAIT_POLICY" in os.environ else {"GOMP_SPINCOUNT": str(LOOKS)}


def environment(job: Job) -> dict[str, str]:
    """Theirs: our modules, and nothing from the folder that they start in."""
    modules = os.pathsep.join(path or os.getcwd() for path in sys.path)
    said = {"PYTHONPATH": modules, "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"}
    return os.environ | said | {"OMP_NUM_THREADS": str(job.threads)}


@dataclass
class _Hearing:
    """Passes on what workers say; `done`: how many have made all that was theirs."""

    board: wire.Board
    job: Job
    context: Context
    done: int = 0
    failure: SpinRegError | None = field(default=None)

    def poll(self) -> None:
        self._hear()
        if self.failure is not None and not self.board.lost:  # of a lost rank torchrun tells the others itself
            raise self.failure
        self.context.poll()

    def ask(self) -> None:
        self._hear()
        self.board.ask(stopping.asked() or signal.SIGTERM)

    def rest(self) -> None:
        """What came last, of processes that have ended."""
        self._hear()
        if self.failure is not None and not self.board.lost:
            raise self.failure

    def _hear(self) -> None:
        for _, message in self.board.heard():
            if "progress" in message:
                self.context.progress(*message["progress"])
            elif "row" in message:
                self.context.log(message["row"])
            elif "log" in message:
                name, level, text = message["log"]
                logging.getLogger(name).log(level, "%s", text)
            elif "done" in message:
                self.done += 1
                usage.heard(message["done"])
            elif self.failure is None and "hello" not in message:
                self.failure = _failure(self.job, message)


def _failure(job: Job, message: dict[str, Any]) -> SpinRegError:
    """What a worker raised: our own errors as themselves, others with their traceback in the log."""
    if "error" in message:
        return errors.heard(message["error"])
    kind, text, trace = message["failed"]
    log.info("%s failed:\n%s", job.name, trace)  # what happened is told by the command
    return SpinRegError(
        f"{job.name} failed: {kind}.",
        where=job.out.removesuffix(".tmp"),
        why=" ".join(text.split())[:400] or "no message",
        todo="the traceback is in the run's run.log; mend it and run the same command again",
    )


def _crashed(job: Job, code: int, lines: list[str], lost: list[int]) -> SpinRegError:
    """The error for a process that ended without a word."""
    who = "its process"
    said = lines
    if job.processes > 1:
        said = list(takewhile(lambda line: not REPORT.match(line), lines))
        told = [match for match in map(AGENT.search, lines) if match]
        code = int(told[-1][1]) if told else code
        ranks = lost[:1] or [int(match[2]) for match in told[-1:]]
        who = f"rank {ranks[0]} of {job.processes}" if ranks else f"one of its {job.processes} processes"
    how = f"was ended by signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"ended with exit code {code}"
    how += ", which the system sends where memory runs out" if code == -signal.SIGKILL else ""
    said = _last_words([line.strip() for line in said])
    return SpinRegError(
        f"{job.name} ended without a word.",
        where=job.out.removesuffix(".tmp"),
        why=f"{who} {how}" + (f"; it said last: {' | '.join(said)}"[:800] if said else ""),
        todo="run the same command again: what was finished stays, also of this stage; run.log has more of its words",
    )


def _last_words(lines: list[str]) -> list[str]:
    """The end of what it said; where Python saw a crash in native code, up to that, and where it was."""
    fatal = next((i for i, line in enumerate(lines) if line.startswith("Fatal Python error")), None)
    if fatal is None:
        return lines[-SHOWN:]
    place = [line for line in lines[fatal:] if line.startswith("File ")]
    return [*lines[max(0, fatal + 1 - SHOWN) : fatal + 1], *place[:1]]
