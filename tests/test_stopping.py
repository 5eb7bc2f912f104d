"""Signals: a run stops soon, wherever it is, loses nothing that was finished, and says how to go on."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import SMALL, Command, weights

from spin_reg import fit, runner
from spin_reg.context import Context
from spin_reg.stages import generate, score

Train = Callable[..., Path]
KINDS = ["prepare", "sft", "generate", "score", "pairs", "train", "evaluate"]
SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]
WORDS = [*SMALL, "regularizer=fictitious_play", "schedule.epochs=2", "run_name=run"]


@pytest.fixture(scope="module", autouse=True)
def shards_of_eight() -> Iterator[None]:
    """So that a stage of 24 rows has three."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate, "SHARD", 8)
        patch.setattr(score, "SHARD", 8)
        yield


@pytest.fixture(scope="module")
def straight(undisturbed: Callable[..., Path]) -> Path:
    """The run that nothing disturbed."""
    return undisturbed(*WORDS)


def same(one: Path, other: Path) -> bool:
    metrics = (one / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes()
    tables = sorted(p.relative_to(one) for p in one.rglob("*.parquet"))
    return (
        metrics
        and tables == sorted(p.relative_to(other) for p in other.rglob("*.parquet"))
        and all((one / p).read_bytes() == (other / p).read_bytes() for p in tables)
        and weights(one, 2) == weights(other, 2)
    )


@pytest.mark.parametrize(
    ("kind", "number"),
    [
        pytest.param(kind, SIGNALS[i % 3], marks=[] if kind in ("generate", "score", "train") else pytest.mark.slow)
        for i, kind in enumerate(KINDS)
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_a_signal_in_any_stage_stops_the_run_and_the_same_command_goes_on(
    kind: str,
    number: signal.Signals,
    straight: Path,
    command: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real, steps = runner.run_stage, [0]

    def disturbed(stage: Any, inputs: dict[str, Path], work: Path, context: Context) -> None:
        """The signal comes as the second unit of a stage's work is done, or (no units) as it begins."""
        calls = [0]

        def progress(done: int, total: int, unit: str) -> None:
            calls[0] += 1
            if calls[0] == 2:
                os.kill(os.getpid(), number)
            context.progress(done, total, unit)

        if stage.kind == kind and kind in ("prepare", "pairs", "evaluate"):
            os.kill(os.getpid(), number)
        own = stage.kind == kind and kind in ("sft", "generate", "score", "train")
        real(stage, inputs, work, Context(progress if own else context.progress, context.log, context.poll))

    update = fit._State.update

    def counted(self: Any, row: dict[str, Any]) -> None:
        steps[0] += 1
        update(self, row)

    monkeypatch.setattr(fit._State, "update", counted)
    with monkeypatch.context() as patch:
        patch.setattr(runner, "run_stage", disturbed)
        result = command("train", *WORDS, f"outputs={tmp_path}")
    assert result.code == 75, result.err
    lines = result.err.splitlines()
    assert f"Stopped by {number.name}" in result.err and "spin-reg resume" in lines[-1]
    assert "Traceback" not in result.err
    assert command("train", *WORDS, f"outputs={tmp_path}").code == 0
    assert same(tmp_path / "run", straight)
    assert steps[0] == 2 + 2 * 2 * 3  # SFT and two iterations of two epochs: no finished step was made twice


def held(code: str, words: list[str], tmp_path: Path) -> subprocess.Popen[str]:
    """The command in a process of its own, after `code` has laid its trap."""
    script = f"import sys, time\n{code}\nfrom spin_reg import cli\nsys.argv = ['spin-reg', *{words!r}]\ncli.main()\n"
    return subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True, cwd=tmp_path)


BUSY = """
from spin_reg import fit
from spin_reg.stages import generate, score
generate.SHARD = score.SHARD = 8
from spin_reg.fit import _State
real = _State.update
def update(self, row):
    real(self, row)
    if row["iteration"] == 0 and row["step"] == 4:
        print("busy", file=sys.stderr, flush=True)
        WAIT
_State.update = update
"""


KERNEL = BUSY.replace("WAIT", "__import__('hashlib').pbkdf2_hmac('sha256', b'', b'', 10**9)")  # native, for minutes


def started(process: "subprocess.Popen[str]", word: str) -> None:
    assert process.stderr is not None
    for line in process.stderr:
        if word in line:
            return
    raise AssertionError("the command ended before it came to the trap")


@pytest.mark.slow
def test_a_second_signal_ends_the_process_at_once_and_the_folder_is_whole(
    straight: Path, command: Command, tmp_path: Path
) -> None:
    process = held(KERNEL, ["train", *WORDS, f"outputs={tmp_path}"], tmp_path)
    started(process, "busy")
    process.send_signal(signal.SIGINT)
    started(process, "second signal")
    process.send_signal(signal.SIGINT)
    began = time.monotonic()
    assert process.wait(timeout=30) == 75
    assert time.monotonic() - began < 5
    assert "resume" in process.communicate()[1]
    assert command("train", *WORDS, f"outputs={tmp_path}").code == 0
    assert same(tmp_path / "run", straight)


@pytest.mark.slow
def test_where_no_loop_polls_the_process_ends_in_time_and_keeps_every_finished_step(
    straight: Path, command: Command, tmp_path: Path
) -> None:
    process = held(KERNEL, ["train", *WORDS, f"outputs={tmp_path}"], tmp_path)
    started(process, "busy")
    process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    assert process.wait(timeout=30) == 75
    assert time.monotonic() - began < 10
    assert "resume" in process.communicate()[1]
    (kept,) = tmp_path.glob("run/iterate-01/model.tmp/.scratch/checkpoint-*")
    assert kept.name == "checkpoint-000000004"
    assert command("train", *WORDS, f"outputs={tmp_path}").code == 0
    assert same(tmp_path / "run", straight)


@pytest.mark.slow
def test_a_sweep_that_is_stopped_begins_no_other_point(command: Command, tmp_path: Path) -> None:
    words = ["train", "-m", *SMALL, "alpha=0,0.5,1", f"outputs={tmp_path}"]
    process = held(BUSY.replace("WAIT", "time.sleep(2)"), words, tmp_path)
    started(process, "busy")
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=30) == 75
    assert len(list(tmp_path.glob("*/run.json"))) == 1
    assert command(*words).code == 0
    assert len(list(tmp_path.glob("*/iterate-02/model"))) == 3


def test_handlers_are_put_back(command: Command, tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    assert command("train", *SMALL, "schedule.iterations=1", f"outputs={tmp_path}").code == 0
    assert [signal.getsignal(number) for number in SIGNALS] == before
