"""Signals: a run stops soon, wherever it is, loses nothing that was finished, and says how to go on."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import SMALL, Command, weights

from spin_reg import console, fit, runner, stopping
from spin_reg.context import Context
from spin_reg.stages import generate, score

Train = Callable[..., Path]
KINDS = ["prepare", "sft", "generate", "score", "pairs", "train", "evaluate"]
SIGNALS = list(stopping.SIGNALS)
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
        pytest.param(kind, SIGNALS[i % len(SIGNALS)], marks=[] if kind == "train" else pytest.mark.slow)
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


def big(path: Path) -> list[str]:
    """Words for a run on a file of more rows than are read between two looks for a signal."""
    rows = [{"prompt": f"question {i}", "response": f"answer {i}"} for i in range(600)]
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text(json.dumps(rows) if path.suffix == ".json" else "\n".join(map(json.dumps, rows)))
    return [
        "train",
        *SMALL,
        "dataset=jsonl",
        f"dataset.path={path}",
        "schedule.iterations=1",
        "generation.max_new_tokens=4",
    ]


@pytest.mark.parametrize(
    ("ending", "at", "number"),
    [
        ("jsonl", (0, "byte"), signal.SIGINT),
        ("jsonl", (20, "row"), signal.SIGTERM),
        ("json", (256, "row"), signal.SIGUSR1),
        ("parquet", (0, "row"), signal.SIGTERM),
        ("parquet", (20, "row"), signal.SIGINT),
    ],
)
def test_a_signal_while_the_data_are_looked_at_leaves_nothing_behind(
    ending: str, at: tuple[int, str], number: int, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the file is read, and as its rows are tokenised: no run folder, no temporary file, and no word of a resume."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    words = [*big(tmp_path / f"x.{ending}"), f"outputs={tmp_path / 'outputs'}"]
    told: list[tuple[int, str]] = []

    def progress(self: Any, done: int, total: int, unit: str) -> None:
        told.append((done, unit))
        if told[-1] == at:
            os.kill(os.getpid(), number)
            time.sleep(0.2)  # till it is heard

    with monkeypatch.context() as patch:
        patch.setattr(console.Screen, "progress", progress)
        result = command(*words)
    assert told[-1] == at, "what was asked for came late, or not at all"
    assert result.code == 75 and f"Stopped by {signal.Signals(number).name}" in result.err
    assert "run the same command again" in result.err and "resume" not in result.err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tmp", f"x.{ending}"]
    assert not list((tmp_path / "tmp").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("signals", [1, 2])
def test_data_that_are_read_by_native_code_hold_no_signal_up_and_leave_nothing(signals: int, tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    trap = f"""
import tempfile
tempfile.tempdir = {str(tmp_path / "tmp")!r}
from spin_reg import rows
real = rows._parsed
def parsed(content):
    if b"question 300" in content:
        print("busy", file=sys.stderr, flush=True)
        __import__("hashlib").pbkdf2_hmac("sha256", b"", b"", 10**9)
    return real(content)
rows._parsed = parsed
"""
    process = held(trap, [*big(tmp_path / "x.jsonl"), f"outputs={tmp_path / 'outputs'}"], tmp_path)
    started(process, "busy")
    assert any((tmp_path / "tmp").iterdir())
    for _ in range(signals):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
    began = time.monotonic()
    assert process.wait(timeout=30) == 75
    assert time.monotonic() - began < (10 if signals == 1 else 3)
    assert process.communicate()[1].endswith("to go on: run the same command again\n")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tmp", "x.jsonl"]
    assert not list((tmp_path / "tmp").iterdir())


def test_how_far_the_look_at_the_data_is_is_told_in_lines_where_there_is_no_terminal(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "EVERY", 0.0)
    words = [*big(tmp_path / "x.jsonl"), f"outputs={tmp_path / 'outputs'}", "dataset.num_prompts=8", "evaluation=none"]
    result = command(*words)
    size = (tmp_path / "x.jsonl").stat().st_size
    lines = [line for line in result.err.splitlines() if "] data  " in line]
    assert result.code == 0 and f"data  byte 0/{size}, about " in lines[0] and "data  row 16/600, about " in lines[-2]


def test_a_terminal_has_a_bar_for_the_look_at_the_data(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    words = [*big(tmp_path / "x.jsonl"), f"outputs={tmp_path / 'outputs'}", "dataset.num_prompts=8", "evaluation=none"]
    for name, value in {"TERM": "xterm", "COLUMNS": "120"}.items():
        monkeypatch.setenv(name, value)
    shown = Terminal()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", shown)
        assert command(*words).code == 0
    bare = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.getvalue())
    assert re.search(r"\[1/6\] data .* 16/600 rows", bare), bare


def test_the_time_left_is_that_of_what_is_counted_now(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes that took 100 s say nothing of the rows that come after them."""
    clock = [0.0]
    monkeypatch.setattr(console, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    said: list[str] = []
    screen = console.Screen()
    monkeypatch.setattr(screen, "_line", said.append)
    for seconds, done, total, unit in [(50, 400, 1000, "byte"), (50, 900, 1000, "byte"), (20, 10, 100, "row")]:
        clock[0] += seconds
        screen.progress(done, total, unit)
    assert [line.rpartition("about ")[2] for line in said] == ["75 s left", "11 s left", "180 s left"]


def test_handlers_are_put_back(command: Command, tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    assert command("train", *SMALL, "schedule.iterations=1", f"outputs={tmp_path}").code == 0
    assert [signal.getsignal(number) for number in SIGNALS] == before
