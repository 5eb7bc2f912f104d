"""Stages in processes of their own: the same results, and whatever ends one of them is told and can be gone on from."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import SMALL, Command, weights

from spin_reg import console, processes

pytestmark = pytest.mark.slow  # a process that loads torch takes seconds
WORDS = [
    *SMALL,
    "schedule.iterations=1",
    "schedule.epochs=2",
    "evaluation=none",
    "run_name=run",
    "hardware.shard_size=8",
]
APART = "hardware.isolate=true"
ANSWERS, SCORES, MODEL = "iterate-00/answers/train-00", "iterate-00/scores/train-real", "iterate-01/model"

TRAP = """
import os, signal, sys, time
if "spin_reg.worker" in sys.orig_argv:
    from spin_reg import durable, fit
    count = [0]
    def after(owner, name, act):
        real = getattr(owner, name)
        def call(*args, **kwargs):
            result = real(*args, **kwargs)
            act(*args)
            return result
        setattr(owner, name, call)
"""
AT_THE_SECOND_SHARD = """
    def shard(path, content):
        count[0] += "shards" in str(path)
        if count[0] == 2:
            ACT
    after(durable, "write_bytes", shard)
"""


@pytest.fixture(scope="module")
def made(undisturbed: Callable[..., Path]) -> Path:
    """The run, made in one process, that nothing disturbed."""
    return undisturbed(*WORDS)


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "outputs/run")
    return tmp_path / "outputs/run"


@pytest.fixture
def trap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """What a worker does beside its work: code that Python runs as it starts."""

    def lay(code: str = "", act: str = "") -> None:
        (tmp_path / "trap").mkdir(exist_ok=True)
        (tmp_path / "trap/sitecustomize.py").write_text(TRAP + code.replace("ACT", act))

    lay()
    monkeypatch.syspath_prepend(str(tmp_path / "trap"))
    return lay


def again(root: Path, *folders: str) -> list[str]:
    """Words for a run whose stages in these folders are still to be made."""
    for folder in folders:
        shutil.rmtree(root / folder)
    return ["train", *WORDS, f"outputs={root.parent}", APART]


def same(one: Path, other: Path) -> bool:
    names = sorted(p.relative_to(one) for p in one.rglob("*.parquet"))
    return (
        names == sorted(p.relative_to(other) for p in other.rglob("*.parquet"))
        and all((one / name).read_bytes() == (other / name).read_bytes() for name in [*names, Path("metrics.jsonl")])
        and weights(one, 1) == weights(other, 1)
    )


def test_a_run_in_processes_of_their_own_holds_what_one_in_one_process_holds(
    made: Path, command: Command, tmp_path: Path
) -> None:
    result = command("train", *WORDS, f"outputs={tmp_path}", APART)
    assert result.code == 0, result.err
    assert same(tmp_path / "run", made)
    log = (tmp_path / "run/run.log").read_text()
    assert log.count("peak_memory") == 6


def test_a_crash_is_that_stages_failure_and_the_same_command_goes_on(
    made: Path, root: Path, command: Command, trap: Callable[..., None]
) -> None:
    act = "print('these were its words', flush=True); os.kill(os.getpid(), signal.SIGSEGV)"
    trap(AT_THE_SECOND_SHARD, act)
    words = again(root, ANSWERS)
    result = command(*words)
    assert result.code == 1 and len(result.err.splitlines()[-4:]) == 4
    what, where, why, todo = result.err.splitlines()[-4:]
    assert ANSWERS in what and str(root / ANSWERS) in where and "same command" in todo
    assert "signal 11 (SIGSEGV)" in why and "Fatal Python error" in why
    assert "these were its words" in (root / "run.log").read_text()
    shards = list((root / f"{ANSWERS}.tmp/.scratch/shards-of-8").iterdir())
    assert len(shards) == 2
    trap(AT_THE_SECOND_SHARD, "raise RuntimeError('one shard was left to be made')")
    assert command(*words).code == 0
    assert same(root, made)


def test_our_errors_arrive_as_themselves(root: Path, command: Command, trap: Callable[..., None]) -> None:
    raised = "from spin_reg.errors import NonFiniteError as E; raise E('A what.', where='a', why='b', todo='c')"
    trap(AT_THE_SECOND_SHARD, raised)
    result = command(*again(root, ANSWERS))
    assert result.code == 5
    assert result.err.splitlines()[-4:] == ["spin-reg: A what.", "  where: a", "  why:   b", "  to do: c"]


def test_other_errors_have_their_traceback_in_the_log(root: Path, command: Command, trap: Callable[..., None]) -> None:
    trap(AT_THE_SECOND_SHARD, "raise RuntimeError('oh no')")
    result = command(*again(root, ANSWERS))
    assert result.code == 1 and "RuntimeError" in result.err and "why:   oh no" in result.err
    assert "Traceback" in (root / "run.log").read_text() and "in shard" in (root / "run.log").read_text()


ALL_HAVE_IT = """
    def step(state, row):
        time.sleep(0.5 * (row["step"] >= 5))
        if row["step"] == 5:
            os.kill(os.getpid(), signal.SIGUSR1)  # it has one from the parent by now
            time.sleep(0.3)
    after(fit._State, "update", step)
"""


def test_a_signal_reaches_the_worker_which_keeps_what_it_has_trained(
    made: Path,
    root: Path,
    command: Command,
    trap: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trap(ALL_HAVE_IT)
    words = again(root, MODEL)

    def progress(self: Any, done: int, total: int, unit: str) -> None:
        if (done, unit) == (4, "step"):
            os.kill(os.getpid(), signal.SIGUSR1)

    with monkeypatch.context() as patch:
        patch.setattr(console.Screen, "progress", progress)
        result = command(*words)
    assert result.code == 75 and "Stopped by SIGUSR1" in result.err, result.err
    (kept,) = root.glob(f"{MODEL}.tmp/.scratch/checkpoint-*")
    assert kept.name in ("checkpoint-000000004", "checkpoint-000000005")
    trap()
    assert command(*words).code == 0
    assert same(root, made)


def test_a_signal_that_comes_before_a_worker_can_hear_is_told_to_it_then(
    made: Path, root: Path, command: Command, trap: Callable[..., None]
) -> None:
    early = "    os.kill(os.getppid(), signal.SIGTERM)\n    time.sleep(0.5)\n"
    trap(early + "    after(durable, 'write_bytes', lambda path, content: time.sleep('shards' in str(path)))\n")
    words = again(root, ANSWERS)
    result = command(*words)
    assert result.code == 75 and "Stopped by SIGTERM" in result.err, result.err
    assert len(list(root.glob(f"{ANSWERS}.tmp/.scratch/shards-of-8/*"))) <= 1
    trap()
    assert command(*words).code == 0
    assert same(root, made)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


def within(seconds: float, true: Callable[[], bool]) -> bool:
    until = time.monotonic() + seconds
    while not true() and time.monotonic() < until:
        time.sleep(0.05)
    return true()


@pytest.mark.parametrize("how", ["killed", "asked twice"])
def test_no_worker_outlives_the_command(how: str, root: Path, trap: Callable[..., None], tmp_path: Path) -> None:
    busy = "__import__('hashlib').pbkdf2_hmac('sha256', b'', b'', 10**9)"
    trap(AT_THE_SECOND_SHARD, f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); {busy}")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path / "trap"), *sys.path])}
    words = [sys.executable, "-m", "spin_reg", *again(root, ANSWERS)]
    process = subprocess.Popen(words, env=environment, stderr=subprocess.DEVNULL)
    assert within(60, lambda: (tmp_path / "pid").exists() and bool((tmp_path / "pid").read_text()))
    worker = int((tmp_path / "pid").read_text())
    assert alive(worker)
    if how == "killed":
        process.kill()
    else:
        process.terminate()
        time.sleep(0.5)
        process.terminate()
    assert process.wait(10) == (-9 if how == "killed" else 75)
    assert within(3, lambda: not alive(worker))


SLOW = """
    from datetime import timedelta
    from torch import distributed
    begin = distributed.init_process_group
    distributed.init_process_group = lambda backend, **more: begin(backend, timeout=timedelta(seconds=4), **more)
    def slow(path, content):
        if "shards" in str(path):
            with open(f"{WHERE}/rank-{os.environ['RANK']}", "a") as stream:
                stream.write(f"{int(path.name[:9])} ")
            time.sleep(7 * (os.environ["RANK"] == "1" and "answers" in str(path)))
    after(durable, "write_bytes", slow)
"""


def test_two_processes_answer_and_score_as_one_does_and_wait_longer_than_a_collective_may(
    made: Path, root: Path, command: Command, trap: Callable[..., None], tmp_path: Path
) -> None:
    trap(SLOW.replace("{WHERE}", str(tmp_path)))
    result = command(*again(root, ANSWERS, SCORES), "hardware.processes=2")
    assert result.code == 0, result.err
    assert same(root, made)
    dealt = [(tmp_path / f"rank-{i}").read_text().split() for i in range(2)]
    assert dealt == [["0", "16"] * 2, ["8"] * 2]
    assert "took" in (root / "run.log").read_text()


def test_a_killed_rank_is_named_soon_and_another_number_of_processes_goes_on(
    made: Path, root: Path, command: Command, trap: Callable[..., None]
) -> None:
    first = AT_THE_SECOND_SHARD.replace("== 2", "== 1")
    killed = "print(time.time(), 'words of rank 1', flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    trap(first.replace("count[0] == 1", "count[0] == 1 and os.environ['RANK'] == '1'"), killed)
    words = again(root, ANSWERS)
    result = command(*words, "hardware.processes=2")
    ended = time.time()
    assert result.code == 1
    what, _, why, _ = result.err.splitlines()[-4:]
    assert ANSWERS in what and "rank 1 of 2 was ended by signal 9 (SIGKILL)" in why and why.endswith("words of rank 1")
    (began,) = re.findall(r"([\d.]+) words of rank 1$", (root / "run.log").read_text(), flags=re.M)[:1]
    assert ended - float(began) < 10
    trap()
    assert command(*words[:-1]).code == 0
    assert same(root, made)


def test_a_signal_stops_all_ranks_and_one_process_goes_on(
    made: Path,
    root: Path,
    command: Command,
    trap: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trap("    after(durable, 'write_bytes', lambda path, content: time.sleep('shards' in str(path)))\n")
    words = again(root, ANSWERS)
    sent: list[int] = []

    def progress(self: Any, done: int, total: int, unit: str) -> None:
        if not sent:
            sent.append(done)
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(console.Screen, "progress", progress)
        result = command(*words, "hardware.processes=2")
    assert result.code == 75 and "Stopped by SIGTERM" in result.err, result.err
    assert sent and not (root / ANSWERS).exists()
    assert command(*words[:-1]).code == 0
    assert same(root, made)


def test_what_one_rank_raises_ends_the_others(root: Path, command: Command, trap: Callable[..., None]) -> None:
    raised = "from spin_reg.errors import NonFiniteError as E; raise E('A what.', where='a', why='b', todo='c')"
    trap(AT_THE_SECOND_SHARD.replace("== 2", "== 1 and os.environ['RANK'] == '1'"), raised)
    result = command(*again(root, ANSWERS), "hardware.processes=2")
    assert result.code == 5 and result.err.splitlines()[-4] == "spin-reg: A what."


@pytest.mark.parametrize(
    ("said", "looks"), [({}, processes.LOOKS), ({"GOMP_SPINCOUNT": "7"}, 7), ({"OMP_WAIT_POLICY": "PASSIVE"}, 0)]
)
def test_idle_threads_leave_their_core_to_other_runs_where_nobody_says_otherwise(
    said: dict[str, str], looks: int, tmp_path: Path
) -> None:
    """As the OpenMP that PyTorch loads reports it."""
    left = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    words = [sys.executable, "-m", "spin_reg", "train", *WORDS, f"outputs={tmp_path}"]
    env = left | said | {"OMP_DISPLAY_ENV": "VERBOSE"}
    told = subprocess.run(words, env=env, capture_output=True, text=True, check=True).stderr
    if "GOMP_SPINCOUNT" not in told:
        pytest.skip("PyTorch has another OpenMP here")
    assert set(re.findall(r"GOMP_SPINCOUNT = '(\d+)'", told)) == {str(looks)}
