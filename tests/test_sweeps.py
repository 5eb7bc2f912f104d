"""Sweeps: what is told, at once and at the end; points in other processes; a search for an objective; a Slurm job."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, SMALL, Command, Result, weights
from test_status import lines, metric, runs

from spin_reg import survey, sweeps
from spin_reg.rundir import manifest

Swept = tuple[Path, Result]


def needs(*modules: str) -> pytest.MarkDecorator:
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"an extra is not here: {', '.join(missing)}")


def spin_reg(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    call = [sys.executable, "-m", "spin_reg", *words]
    return subprocess.run(call, cwd=cwd, env=env, capture_output=True, text=True, timeout=500)


def made(place: Path) -> Counter[str]:
    """How often each stage was made, over all runs, by fingerprint."""
    found: Counter[str] = Counter()
    for root in runs(place):
        folders = {piece["name"]: piece["folder"] for piece in json.loads((root / survey.PLAN).read_text())}
        for name in re.findall(r"(\S+): took ", (root / "run.log").read_text()):
            record = manifest(root / folders[name])
            assert record is not None
            found[record["fingerprint"]] += 1
    return found


def test_a_sweep_ends_with_a_table_of_its_points(swept: Swept) -> None:
    place, result = swept
    assert result.code == 0, result.err
    rows = lines(result.out.strip("\n"))
    assert [row["point"] for row in rows] == [f"alpha={a} seed={s}" for a in ("0", "0.5") for s in (0, 1)]
    assert {row["result"] for row in rows} == {"done"} and [row["run"] for row in rows] == [r.name for r in runs(place)]
    for row, root in zip(rows, runs(place), strict=True):
        assert row["heldout_nll"] == f"{metric(root, 2, 'heldout_nll'):.3f}" and row["iterates"] == "3"
        assert row["reused"].startswith(f"{len(survey.taken(root))}/")
    assert rows[0]["reused"].startswith("0/") and not rows[2]["reused"].startswith("0/")
    assert max(made(place).values()) == 1


def test_a_failed_point_is_told_the_others_are_made_and_the_same_command_skips_those(
    command: Command, tmp_path: Path
) -> None:
    words = ["train", "-m", *SMALL, "schedule.iterations=1", "alpha=2,0.5", f"outputs={tmp_path / 'o'}"]
    result = command(*words, "objective=eval/kl_data")
    assert result.code == 2 and "0 to 1" in result.err and "1 of 2 failed; mend what is named above" in result.err
    rows = lines(result.out.strip("\n"))
    assert [(row["point"], row["result"]) for row in rows] == [("alpha=2", "failed"), ("alpha=0.5", "done")]
    (root,) = runs(tmp_path / "o")
    assert float(rows[1]["objective"]) == pytest.approx(metric(root, 1, "kl_data"), rel=1e-3)
    assert [row["result"] for row in lines(command(*words).out.strip("\n"))] == ["failed", "was finished"]
    assert sorted(path.name for path in (tmp_path / "o").iterdir()) == [".stages", root.name]


def test_a_point_that_fails_on_its_way_is_shown_as_far_as_it_came_and_a_finished_one_in_one_line(
    command: Command, tmp_path: Path
) -> None:
    small = [word for word in SMALL if not word.startswith("schedule.learning_rate")]
    words = ["train", "-m", *small, "schedule.iterations=1", "schedule.learning_rate=1e-2,1e38", f"outputs={tmp_path}"]
    first, again = command(*words), command(*words)
    for result, said in ((first, "done"), (again, "was finished")):
        assert result.code == 5, result.err
        good, bad = lines(result.out.strip("\n"))
        assert (good["result"], bad["result"], bad["iterates"]) == (said, "failed", "1")
        assert (tmp_path / bad["run"] / "iterate-00/evaluate").is_dir() and bad["run"] != good["run"]
    assert first.err.count("\nmodel ") == 1 and "\nmodel " not in again.err and "is finished" in again.err


def test_a_plan_of_a_sweep_ends_with_what_all_points_take_together(command: Command, tmp_path: Path) -> None:
    words = [*SMALL, f"outputs={tmp_path}", "schedule.iterations=2", "evaluation=none"]
    result = command("plan", "-m", *words, "regularizer=none,kl", "alpha=0,0.5")
    assert result.code == 0, result.err
    assert result.out.count(": as above") == 1
    total = result.out[result.out.index("all 3 runs (4 points, some of them equal): ") :]
    spin, other = (planned(command("plan", *words, word, "--json")) for word in ("regularizer=none", "alpha=0.5"))
    own = {"iterate-00/scores/train-01-from-01", "iteration-01/pairs", "iteration-01/train"}  # till then all are SPIN
    made = list(spin.values()) + [other[name] for name in own]
    assert f"{len(made)} stages to make" in total
    assert sum(stage["tokens"] for stage in made) == 18816
    assert "tokens: at most 1.54k drawn, 3.46k scored, 13.8k trained on (144 pairs)" in total


def planned(result: Result) -> dict[str, dict[str, Any]]:
    assert result.code == 0, result.err
    return {stage["name"]: stage for stage in json.loads(result.out)["stages"]}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["objective=eval/length_auc"], "eval/heldout_nll"),
        (["objective=eval/task/acc"], "does not ask for the task"),
        (["objective=eval/kl_data", "evaluation=none"], "nothing is evaluated"),
        (["objective=eval/kl_data", "dataset=jsonl", "dataset.path=x"], "toy alone"),
        (["-m", "hydra/launcher=joblibb"], "hydra/launcher"),
    ],
)
def test_what_cannot_be_swept_for_is_refused(words: list[str], said: str, command: Command, tmp_path: Path) -> None:
    result = command("train", *words, f"outputs={tmp_path / 'o'}")
    assert result.code == 2 and said in result.err, result.err
    assert not (tmp_path / "o").exists()


@pytest.mark.skipif(importlib.util.find_spec("hydra_plugins") is not None, reason="a plugin is here")
def test_a_launcher_that_is_not_here_names_its_extra(command: Command) -> None:
    result = command("train", "-m", "hydra/launcher=submitit_slurm", "alpha=0,1")
    assert result.code == 2 and "pip install spin-reg[submitit]" in result.err


def test_words_of_a_sweep() -> None:
    words = ["-m", "tracker=none", "alpha=0,0.5", "seed=range(3)", "dataset.path='a,b'", "hydra/launcher=joblib"]
    assert sweeps.group(words) == "alpha=0,0.5 seed=range(3)" and sweeps.group(words[1:]) is None
    assert sweeps.fixed(words) == {"tracker", "dataset.path"}
    long = ["-m", f"run_name={','.join(f'run{i}' for i in range(50))}"]
    name = sweeps.group(long)
    assert name is not None and len(name) <= 128 and name != sweeps.group([*long, "seed=0,1"])
    optuna = sweeps.added(["-m", "hydra/sweeper=optuna", "objective=eval/stop_rate"], Path("a'b"))
    assert "hydra.sweeper.direction=maximize" in optuna and r"hydra.sweep.dir='a\'b'" in optuna
    assert not any("direction" in w for w in sweeps.added(["hydra/sweeper=optuna", "objective=eval/kl_off"], Path("p")))
    assert sweeps.added(["hydra.sweep.dir=mine"], Path("p")) == []


@pytest.mark.slow
def test_wandb_groups_the_points(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from spin_reg import tracking

    groups: list[str | None] = []

    class Noted:
        first, place = 0, ""

        def __init__(self, root: Path, tracker: object, settings: dict[str, object]) -> None:
            groups.append(settings["tracker.group"])  # type: ignore[arg-type]

        def log(self, index: int, row: dict[str, object]) -> None:
            pass

        def close(self, exit_code: int) -> None:
            pass

    monkeypatch.setattr(tracking, "WandbMirror", Noted)
    monkeypatch.setattr(tracking, "_load", lambda tracker: None)
    words = [*SMALL, "tracker=wandb", "evaluation=none", "schedule.iterations=1", f"outputs={tmp_path}"]
    words.remove("tracker=none")
    assert command("train", "-m", *words, "alpha=0,0.5").code == 0
    assert command("train", "-m", *words, "alpha=0,1", "tracker.group=mine").code == 0
    assert command("train", *words, "seed=1").code == 0
    assert groups == ["alpha=0,0.5"] * 2 + ["mine"] + [None]  # alpha = 0 was finished


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        pytest.param(["joblib", "hydra.launcher.n_jobs=2"], marks=needs("joblib", "hydra_plugins")),
        pytest.param(["submitit_local", "hydra.launcher.timeout_min=9"], marks=needs("submitit", "hydra_plugins")),
        pytest.param(["ray", "+hydra.launcher.ray.init.num_cpus=2"], marks=needs("ray", "hydra_plugins")),
    ],
    ids=lambda words: words[0],
)
def test_parallel_points_are_the_same_runs_and_pay_for_no_stage_twice(
    launcher: list[str], swept: Swept, tmp_path: Path
) -> None:
    words = ["train", "-m", *SMALL, "alpha=0,0.5,2", f"outputs={tmp_path / 'o'}", f"hydra/launcher={launcher[0]}"]
    result = spin_reg(*words, *launcher[1:], cwd=tmp_path)
    assert result.returncode == 2, result.stderr
    told = result.stderr
    assert "point 2 (alpha=2): failed" in told and "0 to 1" in told and "point 0 (alpha=0): done" in told
    rows = lines(result.stdout.strip("\n"))
    assert [row["result"] for row in rows] == ["done", "done", "failed"]
    assert max(made(tmp_path / "o").values()) == 1
    for mine, theirs in zip(runs(tmp_path / "o"), runs(swept[0])[::2], strict=True):
        assert mine.name == theirs.name and weights(mine, 2) == weights(theirs, 2)
    assert not (tmp_path / "o" / sweeps.FOLDER).exists()


@pytest.mark.slow
@needs("joblib", "hydra_plugins")
def test_a_signal_to_the_command_stops_its_workers_and_the_same_command_goes_on(tmp_path: Path) -> None:
    words = ["train", "-m", *SMALL, "dataset.num_prompts=512", "schedule.epochs=40", "alpha=0,0.5,1"]
    words += [f"outputs={tmp_path / 'o'}", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    call = [sys.executable, "-m", "spin_reg", *words]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(call, cwd=tmp_path, env=env, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("o/*/iterate-01/model.tmp")) and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert not any((root / ".owner.json").exists() for root in runs(tmp_path / "o"))


@pytest.mark.slow
@needs("optuna", "hydra_plugins")
def test_optuna_searches_for_the_objective(tmp_path: Path) -> None:
    words = ["train", "-m", *SMALL, "hydra/sweeper=optuna", "hydra.sweeper.n_trials=3", "hydra.sweeper.n_jobs=1"]
    words += ["alpha=interval(0,1)", "schedule.beta=tag(log,interval(0.1,10))", f"outputs={tmp_path / 'o'}"]
    words += [f"hydra.sweep.dir={tmp_path / 'sweep'}"]
    assert "Optuna needs an objective" in spin_reg(*words, cwd=tmp_path).stderr
    result = spin_reg(*words, "objective=eval/heldout_nll", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    found = (tmp_path / "sweep/optimization_results.yaml").read_text()
    best = float(re.findall(r"best_value: (\S+)", found)[0])
    assert best == min(metric(root, 2, "heldout_nll") for root in runs(tmp_path / "o"))
    assert len(lines(result.stdout.strip("\n"))) == 3


@pytest.mark.parametrize(("signalled", "requeued"), [("USR1", True), ("TERM", False), (None, False)])
def test_the_slurm_job_requeues_itself_only_when_its_time_is_up(
    signalled: str | None, requeued: bool, tmp_path: Path
) -> None:
    """The job's script with a command that ends as spin-reg does, and a stand-in for Slurm's scontrol."""
    end = "trap 'sleep 0.1; exit 75' USR1 TERM\necho \"$@\" >words\ntouch begun\n"
    end += "exit 3\n" if signalled is None else "while :; do sleep 0.02; done\n"
    for name, text in {"spin-reg": end, "scontrol": 'echo "$@" >requeued\n'}.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}")
        (tmp_path / name).chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "17"}
    job = subprocess.Popen(
        ["bash", str(ROOT / "scripts/sweep.sbatch"), "train", "-m", "alpha=0,1"], cwd=tmp_path, env=env
    )
    while not (tmp_path / "begun").exists():
        time.sleep(0.01)
    if signalled is not None:
        job.send_signal(getattr(signal, f"SIG{signalled}"))
    assert job.wait(timeout=20) == (3 if signalled is None else 75)
    assert (tmp_path / "words").read_text() == "train -m alpha=0,1\n"
    assert (tmp_path / "requeued").exists() == requeued
    if requeued:
        assert (tmp_path / "requeued").read_text() == "requeue 17\n"
