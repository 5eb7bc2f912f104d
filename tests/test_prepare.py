"""`plan --prepare`: the data of a run alone, made as `train` makes them, and what other verbs then say of the run."""

import json
import os
import runpy
import shutil
import signal
import time
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, SMALL, Command, Result

from spin_reg import console, launch, rundir, space, tracking, versions

SFT = ["loss=sft", "evaluation=none", "schedule.iterations=1"]  # nothing is drawn: tokens are those of the real answers


def words(outputs: Path, *more: str) -> list[str]:
    return [*SMALL, f"outputs={outputs}", "run_name=run", *more]


def said(result: Result) -> dict[str, Any]:
    assert result.code == 0, result.err
    found: dict[str, Any] = json.loads(result.out)  # and nothing else stands there
    return found


def status(command: Command, root: Path) -> dict[str, Any]:
    (found,) = said(command("status", str(root), "--json"))["runs"]
    return dict(found)


def read(root: Path) -> int:
    """Tokens of a finished run, counted row by row."""
    script = runpy.run_path(str(ROOT / "scripts/estimates.py"))
    made = script["records"](root)
    folders = {stage["fingerprint"]: folder for folder, stage in made.items()}
    return sum(script["tokens"](folder, stage, folders) for folder, stage in made.items())


def test_the_first_plan_says_how_much_the_run_then_reads(command: Command, tmp_path: Path) -> None:
    mine = words(tmp_path, *SFT)
    bounds, people = said(command("plan", *mine, "--json")), command("plan", *mine).out
    assert not bounds["tokens"]["measured"] and "at most" in people and "--prepare" in people
    assert list(tmp_path.iterdir()) == []
    result = command("plan", "--prepare", *mine, "--json")
    found = said(result)
    assert "[1/" in result.err and found["tokens"]["measured"] and found["disk"]["measured"]
    assert {stage["name"]: stage["status"] for stage in found["stages"]}["data"] == "done"
    assert command("train", *mine).code == 0
    counted = read(tmp_path / "run")
    assert 0.8 < found["tokens"]["trained"] / counted < 1.2 < 2 < bounds["tokens"]["trained"] / counted


def test_where_the_data_are_nothing_is_made(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this run, or in another one of the folder."""
    mine = words(tmp_path, *SFT)
    first = command("plan", "--prepare", *mine)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    monkeypatch.setattr(launch, "execute", lambda *args, **kwargs: pytest.fail("it is there"))
    again = command("plan", *mine, "--prepare")
    assert (again.code, again.out, again.err) == (0, first.out, "") and "--prepare" not in again.out
    other = command("plan", "--prepare", *words(tmp_path, *SFT), "run_name=other")
    assert other.out.splitlines()[1].split()[:2] == ["reuse", "data"], other.out
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.mark.slow
def test_a_run_that_was_only_prepared_is_told_as_that(command: Command, tmp_path: Path) -> None:
    mine, root = words(tmp_path, *SFT), tmp_path / "run"
    assert command("plan", "--prepare", *mine).code == 0
    seen = status(command, root)
    assert (seen["state"], seen["error"], seen["stage"]) == ("prepared", None, None)
    assert (seen["iterates"], seen["stages_done"], seen["owner"]) == (0, 1, None)
    (listed,) = said(command("ls", str(tmp_path), "--json"))["runs"]
    assert (listed["metrics"], listed["problem"]) == ({}, None)
    assert command("report", str(root)).code == 0 and (root / "report.html").exists()
    assert "nothing to do" not in command("evaluate", str(root)).err
    assert status(command, root)["state"] == "prepared"
    assert command("gc", str(tmp_path)).code == 0
    assert command("resume", str(root)).code == 0 and (root / "iterate-01/model").is_dir()
    assert status(command, root)["state"] == "finished"
    assert "prepared" not in json.loads((root / "run.json").read_text())


@pytest.mark.slow
def test_a_run_that_was_prepared_first_is_the_one_that_was_not(command: Command, tmp_path: Path) -> None:
    """Records of stages and metrics to the byte."""
    roots = []
    for name in ("straight", "prepared"):
        mine = words(tmp_path / name, "regularizer=fictitious_play")
        if name == "prepared":
            assert command("plan", "--prepare", *mine).code == 0
        assert command("train", *mine).code == 0
        roots.append(tmp_path / name / "run")
    one, other = ({path.relative_to(root): path for path in root.rglob("*") if path.is_file()} for root in roots)
    assert one.keys() == other.keys()
    for path in one:
        if path.name in ("stage.json", "metrics.jsonl", ".plan.json", "config.yaml") or path.suffix == ".parquet":
            same = one[path].read_bytes() == other[path].read_bytes()
            assert same or path.name == "config.yaml", path  # which names its folder
    records = [json.loads((root / "run.json").read_text()) for root in roots]
    assert records[0].keys() == records[1].keys() and records[0]["settings"] == records[1]["settings"]


@pytest.mark.slow
def test_a_run_that_was_only_prepared_may_have_fewer_iterations(command: Command, tmp_path: Path) -> None:
    """What was played stays part of a run; nothing was."""
    many, few = (words(tmp_path, *SFT[:2], f"schedule.iterations={n}") for n in (5, 1))
    assert command("plan", "--prepare", *many).code == 0
    assert "iteration-04" in command("plan", *many).out
    assert "iteration-01" not in command("plan", *few).out
    assert command("train", *few).code == 0
    assert status(command, tmp_path / "run")["state"] == "finished"
    assert not (tmp_path / "run/iterate-02").exists()
    assert command("plan", "--prepare", *many).code == 0  # its data are there
    assert json.loads((tmp_path / "run/run.json").read_text())["iterations"] == 1


@pytest.mark.slow
def test_the_data_of_a_run_that_was_played_are_left_to_it(command: Command, tmp_path: Path) -> None:
    """What is on its record may hang on settings that are no part of what it is."""
    mine, root = words(tmp_path, *SFT), tmp_path / "run"
    assert command("train", *mine).code == 0
    kept = {path: path.read_bytes() for path in root.rglob("*") if path.is_file() and path.parent.name != "data"}
    shutil.rmtree(root / "data")
    result = command("plan", "--prepare", "--json", *mine, "schedule.iterations=4")
    assert (result.code, result.out) == (2, "") and "not played yet" in result.err and "spin-reg resume" in result.err
    assert kept == {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    assert command("resume", str(root)).code == 0 and status(command, root)["state"] == "finished"


def test_a_run_begins_when_it_is_played(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its record is of what played it; and it is no longer called prepared, though it ended without a word."""
    mine, root = words(tmp_path, *SFT), tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(versions, "here", lambda also=(): {"torch": "of the preparation"})
        assert command("plan", "--prepare", *mine, "schedule.iterations=5").code == 0
    prepared = json.loads((root / "run.json").read_text())
    assert prepared["versions"] == {"torch": "of the preparation"}
    assert prepared["command"] == ["spin-reg", "plan", "--prepare", *mine, "schedule.iterations=5"]
    monkeypatch.setattr(launch, "_run", lambda *args, **kwargs: pytest.fail("a kill"))
    with pytest.raises(pytest.fail.Exception):
        command("train", *mine)
    record = json.loads((root / "run.json").read_text())
    assert record["versions"] == versions.here() and record["command"] == ["spin-reg", "train", *mine]
    assert status(command, root)["state"] == "interrupted"


def test_a_tracker_does_not_hear_of_it(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "_load", lambda tracker: pytest.fail("it is no run"))
    mine = ["tracker=wandb" if word == "tracker=none" else word for word in words(tmp_path, *SFT)]
    assert command("plan", "--prepare", *mine).code == 0
    assert not (tmp_path / "run/wandb").exists()


def test_data_that_are_no_good_leave_nothing(command: Command, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"prompt": "a", "response": "b"}\n{"prompt": 3}\n')
    mine = words(tmp_path / "o", "dataset=jsonl", f"dataset.path={tmp_path / 'x.jsonl'}")
    planned, trained = command("plan", "--prepare", *mine), command("train", *mine)
    assert planned.code == trained.code == 3 and planned == trained
    assert not (tmp_path / "o").exists()


@pytest.mark.slow
def test_an_owner_a_full_disk_and_other_settings_are_told_as_by_train(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, root = words(tmp_path, *SFT), tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(space, "free", lambda folder: 1000)
        full = command("plan", "--prepare", *mine)
    assert full.code == 6 and not root.exists()
    with monkeypatch.context() as patch:
        patch.setattr(space, "free", lambda folder: 200_000)  # for the data it is enough
        assert command("plan", "--prepare", *mine).code == 0
        assert command("train", *mine).code == 6
    shutil.rmtree(root / "data")
    with rundir.owned(root):
        busy = command("plan", "--prepare", *mine)
    assert busy.code == 4 and "pid" in busy.err
    other = command("plan", "--prepare", *mine, "seed=1")
    assert other.code == 2 and "seed: 0 -> 1" in other.err


@pytest.mark.parametrize(("at", "number"), [(0, signal.SIGINT), (1, signal.SIGTERM)])
def test_it_is_stopped_as_train_is(
    at: int, number: signal.Signals, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the look at the data, and as they are made."""
    calls = count()

    def stage(self: console.Screen, *told: Any) -> None:
        if next(calls) == at:
            os.kill(os.getpid(), number)
            time.sleep(0.2)  # till it is heard

    mine = words(tmp_path, *SFT)
    with monkeypatch.context() as patch:
        patch.setattr(console.Screen, "stage", stage)
        patch.setattr(console.Screen, "finished", lambda *told: None)
        result = command("plan", "--prepare", "--json", *mine)
    assert (result.code, result.out) == (75, "") and f"Stopped by {number.name}" in result.err
    assert "run the same command again" in result.err and "resume" not in result.err
    assert command("plan", "--prepare", *mine).code == 0
    assert status(command, tmp_path / "run")["state"] == "prepared"


@pytest.mark.slow
def test_the_points_of_a_sweep_make_their_data_once(command: Command, tmp_path: Path) -> None:
    result = command("plan", "-m", "--prepare", *SMALL, f"outputs={tmp_path}", "alpha=0,0.5", "evaluation=none")
    assert result.code == 0, result.err
    each, total = result.out.split("all 2 runs: ")
    assert each.count("tokens: about") == 2 and "tokens: about" in total and len(list(tmp_path.glob("*/data"))) == 1
    assert "the same stage lies in" in result.out
