"""Runs that want the same stage at the same time: one makes it, the others take it over."""

import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from test_pipeline import run, stages, stub

from spin_reg import claims, known, rundir
from spin_reg.context import Context
from spin_reg.errors import Stopped
from spin_reg.plan import Stage


def no_wait() -> None:
    """Nothing to do meanwhile."""


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look often whether the other one is done."""
    monkeypatch.setattr(claims, "EVERY", 0.02)


def test_stages_that_two_runs_want_at_once_are_made_once(tmp_path: Path) -> None:
    plans = [stages("regularizer=none", "evaluation=none"), stages("alpha=0.5", "evaluation=none")]
    made: list[str] = []
    begun = threading.Barrier(2)

    def slow(stage: Stage, inputs: dict[str, Path], work: Path, context: Context) -> None:
        made.append(stage.fingerprint)
        time.sleep(0.01)
        stub(stage, inputs, work, context)

    def one(i: int) -> None:
        begun.wait()
        run(plans[i], tmp_path, f"run{i}", stage=slow)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(one, range(2)))
    assert set(made) == {stage.fingerprint for plan in plans for stage in plan}
    assert max(Counter(made).values()) == 1
    shared = {s.fingerprint for s in plans[0]} & {s.fingerprint for s in plans[1]}
    assert len(shared) > 5
    for name, plan in zip(("run0", "run1"), plans, strict=True):
        assert all(rundir.manifest(tmp_path / name / stage.folder) for stage in plan)
    assert not list((tmp_path / known.STAGES).glob(".*"))  # no lock outlives its stage


def test_who_waits_makes_the_stage_where_the_other_one_failed(tmp_path: Path) -> None:
    plan = stages("regularizer=none", "evaluation=none")[:1]
    working, told = threading.Event(), threading.Event()

    def fails(stage: Stage, inputs: dict[str, Path], work: Path, context: Context) -> None:
        working.set()
        assert told.wait(10)
        raise ValueError("it cannot")

    def first() -> None:
        with pytest.raises(ValueError, match="it cannot"):
            run(plan, tmp_path, "first", stage=fails)

    thread = threading.Thread(target=first)
    thread.start()
    assert working.wait(10)
    with claims.claimed(tmp_path, plan[0], poll=told.set):
        assert told.is_set() and rundir.manifest(tmp_path / "first" / plan[0].folder) is None
    thread.join()


def test_the_system_frees_what_a_killed_process_held_and_a_signal_ends_the_wait(tmp_path: Path) -> None:
    (stage,) = stages("regularizer=none", "evaluation=none")[:1]
    path = known.lock(tmp_path, stage)
    path.parent.mkdir()
    holder = "import filelock, sys, time; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); "
    holder += "print('held', flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", holder, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"

    def stop() -> None:
        raise Stopped("", where="", why="", todo="")

    with pytest.raises(Stopped), claims.claimed(tmp_path, stage, poll=stop):
        raise AssertionError("another process has it")
    process.send_signal(signal.SIGKILL)
    process.wait()
    with claims.claimed(tmp_path, stage, poll=no_wait):
        assert path.exists()
