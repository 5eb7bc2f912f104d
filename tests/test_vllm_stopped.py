"""Signals to the whole command while vLLM is at work: it stops, nothing of vLLM stays, and the next call goes on."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from conftest import ROOT
from fake_vllm import REAL, base, interpreter, needs_vllm

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="who is there is read from Linux's /proc"),
]
ANSWERS = "run/iterate-00/answers/train-00"
LEFT = 5.0  # seconds that vLLM has to see that nobody is there any more
ENGINES = ["stand-in", pytest.param("real", marks=needs_vllm)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights so small that any token follows any other, so that answers are long."""
    folder = tmp_path_factory.mktemp("model")
    base(folder, positions=1024, spread=0.02)
    return folder


Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(model: Path, tmp_path: Path) -> Start:
    """A run that an engine draws for, as the leader of a process group, as a terminal starts it."""
    python = interpreter(tmp_path / "fake")

    def begin(engine: str, *more: str, fake: str = "") -> "subprocess.Popen[str]":
        words = ["tracker=none", "model=pretrained", f"model.name_or_path={model}", "dataset.num_prompts=64"]
        words += ["dataset.num_heldout=4", "schedule.iterations=1", "schedule.epochs=1", "evaluation=none"]
        words += ["hardware.threads=1", "hardware.shard_size=16", "generation=vllm", "generation.batch_size=4"]
        words += [f"generation.max_new_tokens={400 if engine == 'real' else 40}"]  # the stand-in waits where it is told
        words.append(f"generation.python={REAL if engine == 'real' else python}")
        return subprocess.Popen(
            [sys.executable, "-m", "spin_reg", "train", *words, f"outputs={tmp_path}", "run_name=run", *more],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env=os.environ | {"PYTHONPATH": str(ROOT), "FAKE": fake, "TOLD": str(tmp_path / "told"), **mark(tmp_path)},
        )

    return begin


def mark(folder: Path) -> dict[str, str]:
    """What all processes of a test have in their environment, whoever their parent and whatever their group."""
    return {"SPIN_REG_TEST": str(folder)}


def there(folder: Path) -> dict[int, str]:
    """The processes of a test that are alive, and their words."""
    ((name, value),) = mark(folder).items()
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "cmdline").read_bytes()  # a process that has ended has none
            if words and f"{name}={value}\0".encode() in (entry / "environ").read_bytes():
                found[int(entry.name)] = words.replace(b"\0", b" ").decode(errors="replace")
        except (OSError, ValueError):  # no process, or one that has just ended
            continue
    return found


def shards(folder: Path) -> list[Path]:
    return sorted((folder / f"{ANSWERS}.tmp/.scratch/shards-of-16").glob("*.parquet"))


def awaited(process: "subprocess.Popen[str]", true: Callable[[], bool]) -> None:
    while not true():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)


def asked(folder: Path) -> int:
    """How many prompts the stand-in was asked for."""
    told = [json.loads(line) for line in (folder / "told").read_text().splitlines()]
    return sum("seed" in row for row in told)


def drawing(folder: Path) -> bool:
    return bool(shards(folder)) and any("vllm_child" in words for words in there(folder).values())


def stopped(process: "subprocess.Popen[str]", number: signal.Signals, folder: Path) -> None:
    """It has stopped by the signal, at a safe point, and nobody is left."""
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 75, said
    assert f"Stopped by {number.name}" in said and "no safe point" not in said and "Traceback" not in said
    assert there(folder) == {}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("number", "send", "more"),
    [
        (signal.SIGINT, os.killpg, []),
        (signal.SIGTERM, os.kill, []),
        (signal.SIGTERM, os.killpg, ["hardware.isolate=true"]),
        (signal.SIGINT, os.kill, ["hardware.processes=2"]),
    ],
    ids=["SIGINT-group", "SIGTERM-alone", "SIGTERM-group-isolated", "SIGINT-alone-of-two"],
)
def test_a_signal_while_vllm_draws_stops_the_run_and_the_next_call_goes_on(
    number: signal.Signals, send: Callable[[int, int], None], more: list[str], engine: str, start: Start, tmp_path: Path
) -> None:
    """The stand-in hangs in the third shard of four."""
    process = start(engine, *more, fake="hang32")
    awaited(process, lambda: drawing(tmp_path) and (engine == "real" or asked(tmp_path) == 48))
    send(process.pid, number)
    stopped(process, number, tmp_path)
    kept = shards(tmp_path)
    assert len(kept) == 2 if engine == "stand-in" else 1 <= len(kept) < 4
    rows = [row for path in kept for row in pq.read_table(path).to_pylist()]
    process = start(engine, *more)
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 0 and there(tmp_path) == {}, said
    answers = pq.read_table(tmp_path / ANSWERS / "answers.parquet").to_pylist()
    assert len(answers) == 64
    assert [row["generated_ids"] for row in rows] == [row["generated_ids"] for row in answers[: len(rows)]]
    if engine == "stand-in":
        assert asked(tmp_path) == 48 + 32, "what was whole is not drawn again"


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("how", ["two signals", "kill"])
def test_vllm_goes_where_the_command_is_ended_at_once(how: str, engine: str, start: Start, tmp_path: Path) -> None:
    process = start(engine, fake="hang16")
    awaited(process, lambda: drawing(tmp_path))
    for number in [signal.SIGKILL] if how == "kill" else [signal.SIGINT, signal.SIGINT]:
        os.kill(process.pid, number)
        time.sleep(0.05)  # else the two could come as one
    assert process.wait(60) == (-9 if how == "kill" else 75)
    until = time.monotonic() + LEFT
    while there(tmp_path) and time.monotonic() < until:
        time.sleep(0.05)
    assert there(tmp_path) == {}


@pytest.mark.parametrize("engine", ENGINES)
def test_a_signal_while_vllm_loads_stops_the_run(engine: str, start: Start, tmp_path: Path) -> None:
    process = start(engine, fake="hang0")
    awaited(process, lambda: any("vllm_child" in words for words in there(tmp_path).values()))
    os.killpg(process.pid, signal.SIGINT)
    stopped(process, signal.SIGINT, tmp_path)


def test_a_signal_while_an_interpreter_is_asked_what_it_has_is_no_fault_of_its(start: Start, tmp_path: Path) -> None:
    """A terminal sends Ctrl-C to it too; that it ended of that must not be told as an error."""
    process = start("stand-in", fake="mute")
    awaited(process, lambda: any("device_count" in words for words in there(tmp_path).values()))
    os.killpg(process.pid, signal.SIGINT)
    stopped(process, signal.SIGINT, tmp_path)
