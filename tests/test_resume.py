"""Runs that were cut, extended, damaged or changed, through the real command."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import SMALL, Command, weights

from spin_reg import console, fit, iterates, launch, rundir, runner
from spin_reg.errors import DamagedError
from spin_reg.settings import Sharding
from spin_reg.stage import Stage

Train = Callable[..., Path]


def test_the_same_command_again_answers_at_once_without_torch(train: Train) -> None:
    root = train("regularizer=none", "schedule.iterations=1")
    words = ["train", *SMALL, "regularizer=none", "schedule.iterations=1", f"outputs={root.parent}", "run_name=run"]
    code = (
        f"import sys\nfrom spin_reg import cli\nsys.argv = ['spin-reg', *{words!r}]\n"
        "try:\n    cli.main()\nexcept SystemExit as end:\n    assert not end.code\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "finished" in done.stderr and str(root) in done.stderr.replace("\n", "")


@pytest.mark.slow
def test_a_folder_that_was_only_just_begun_is_taken_up(train: Train, tmp_path: Path) -> None:
    (tmp_path / "outputs/run").mkdir(parents=True)
    (tmp_path / "outputs/run/.lock").touch()
    assert (train("schedule.iterations=1") / "iterate-01/model").is_dir()


def test_a_folder_of_someone_else_is_left_alone(command: Command, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/thesis.tex").write_text("x")
    result = command("train", *SMALL, f"outputs={tmp_path}", "run_name=run")
    assert result.code == 2 and "not a run of ours" in result.err
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["thesis.tex"]


def test_an_outputs_that_cannot_be_made_is_told_in_four_lines(command: Command, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = command("train", *SMALL, f"outputs={tmp_path / 'file' / 'outputs'}")
    assert result.code == 1 and len(result.err.splitlines()) == 4 and "could not be written" in result.err


@pytest.mark.slow
def test_more_iterations_go_on_from_the_last(train: Train, command: Command, tmp_path: Path) -> None:
    root = train("regularizer=none", "schedule.iterations=1")
    first = weights(root, 1)
    assert command("resume", str(root), "schedule.iterations=2").code == 0
    assert "finished" in command("resume", str(root)).err  # it knows what it was told last
    straight = train("regularizer=none", "schedule.iterations=2", outputs=tmp_path / "other")
    assert weights(root, 1) == first == weights(straight, 1)
    assert weights(root, 2) == weights(straight, 2)
    assert (root / "metrics.jsonl").read_bytes() == (straight / "metrics.jsonl").read_bytes()


def test_other_settings_on_an_old_folder_are_refused_by_name(train: Train, command: Command) -> None:
    root = train("schedule.iterations=1")
    before = sorted((p, p.stat().st_mtime_ns) for p in root.rglob("*"))
    result = command("resume", str(root), "schedule.batch_size=4")
    assert result.code == 2 and "schedule.batch_size: 8 -> 4" in result.err
    assert sorted((p, p.stat().st_mtime_ns) for p in root.rglob("*")) == before


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


@pytest.mark.slow
def test_stopped_inside_training_and_resumed_is_the_uninterrupted_run(
    train: Train, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = train("schedule.save_every=2", "schedule.epochs=3", outputs=tmp_path / "straight")
    real, calls = fit._gradients, [0]

    def dies(*args: object, **kwargs: object) -> fit.Metrics:
        calls[0] += 1
        if calls[0] in (6, 12, 21):  # each one step past a checkpoint
            raise Killed
        return real(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(fit, "_gradients", dies)
    words = [
        "train",
        *SMALL,
        "schedule.save_every=2",
        "schedule.epochs=3",
        f"outputs={tmp_path / 'cut'}",
        "run_name=run",
    ]
    for _ in range(3):
        with pytest.raises(Killed):
            command(*words)
    assert command(*words).code == 0
    assert calls[0] == 2 + 2 * 9 + 3 + 3  # two SFT steps, two times nine, three that died, and one repeated for each
    cut = tmp_path / "cut" / "run"
    assert weights(cut, 2) == weights(straight, 2)
    assert (cut / "metrics.jsonl").read_bytes() == (straight / "metrics.jsonl").read_bytes()
    assert not list(cut.rglob("checkpoint-*")) and not list(cut.rglob("*.tmp"))


def test_a_flipped_byte_is_found_before_use(train: Train, command: Command) -> None:
    root = train("schedule.iterations=1")
    path = root / "iterate-01/model/model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.chmod(0o644)
    path.write_bytes(content)
    result = command("resume", str(root), "schedule.iterations=2")
    assert result.code == 1 and "model.safetensors" in result.err and "delete" in result.err


def test_a_second_owner_is_refused(train: Train, command: Command) -> None:
    from spin_reg import rundir

    root = train("schedule.iterations=1")
    with rundir.owned(root):
        result = command("resume", str(root), "schedule.iterations=2")
    assert result.code == 4 and "pid" in result.err


def test_an_interrupt_exits_75_and_says_how_to_go_on(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(launch.runner, "run_stage", interrupted)
    result = command("train", *SMALL, f"outputs={tmp_path / 'o'}")
    assert result.code == 75 and "same command again" in result.err


@pytest.mark.slow
def test_evaluation_is_added_to_a_finished_run(train: Train, command: Command, tmp_path: Path) -> None:
    straight = train("regularizer=mixture_of_two", outputs=tmp_path / "a")
    root = train("regularizer=mixture_of_two", "evaluation=none", outputs=tmp_path / "b")
    assert not list(root.glob("iterate-*/evaluate"))
    before = weights(root, 2)
    result = command("evaluate", str(root), "evaluation=default")
    assert result.code == 0, result.err
    assert weights(root, 2) == before
    assert (root / "metrics.jsonl").read_bytes() == (straight / "metrics.jsonl").read_bytes()


def _written(path: Path) -> int | None:
    return path.stat().st_mtime_ns if path.exists() else None


@pytest.mark.slow
def test_killed_for_real_at_any_time_the_same_command_ends_at_the_same_bytes(train: Train, tmp_path: Path) -> None:
    """Signal 9 ever later after its first stage began, until a call gets through."""
    straight = train("schedule.save_every=1", "regularizer=fictitious_play", name="run", outputs=tmp_path / "a")
    words = [
        *SMALL,
        "schedule.save_every=1",
        "regularizer=fictitious_play",
        f"outputs={tmp_path / 'b'}",
        "run_name=run",
    ]
    call = [sys.executable, "-m", "spin_reg", "train", *words]
    root = tmp_path / "b" / "run"
    log = root / "run.log"
    killed, wait = 0, 0.2
    while True:
        before = _written(log)
        process = subprocess.Popen(call, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and _written(log) == before:  # imports, which take seconds
            time.sleep(0.02)
        try:
            assert process.wait(timeout=wait) == 0
            break
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            killed, wait = killed + 1, wait + 0.4
    assert killed >= 2
    for k in (0, 1, 2):
        assert weights(root, k) == weights(straight, k)
    assert (root / "metrics.jsonl").read_bytes() == (straight / "metrics.jsonl").read_bytes()


@pytest.mark.slow
def test_metrics_that_were_lost_are_put_together_again(train: Train) -> None:
    root = train("schedule.iterations=1")
    whole = (root / "metrics.jsonl").read_bytes()
    for damage in (whole[:-40], b"", None):
        (root / "metrics.jsonl").unlink()
        if damage is not None:
            (root / "metrics.jsonl").write_bytes(damage)
        train("schedule.iterations=1")
        assert (root / "metrics.jsonl").read_bytes() == whole


@pytest.mark.slow
def test_asking_for_fewer_iterations_takes_nothing_away(train: Train, command: Command) -> None:
    root = train("schedule.iterations=2")
    whole = (root / "metrics.jsonl").read_bytes()
    train("schedule.iterations=1", "evaluation.num_samples=2")
    assert (root / "metrics.jsonl").read_bytes() == whole
    assert "finished" in command("resume", str(root), "evaluation.num_samples=2").err


@pytest.mark.slow
def test_to_evaluate_what_was_never_begun_is_refused(command: Command, tmp_path: Path) -> None:
    result = command("evaluate", *SMALL, f"outputs={tmp_path / 'o'}")
    assert result.code == 2 and "This is no run" in result.err and not (tmp_path / "o").exists()


def test_evaluate_needs_no_word_but_the_run(train: Train, command: Command) -> None:
    root = train("evaluation=none", "schedule.iterations=1")
    assert command("evaluate", str(root)).code == 0
    assert (root / "iterate-01/evaluate/metrics.json").exists()
    assert command("evaluate", "--help").code == 0 and command("resume", "--help").code == 0


@pytest.mark.parametrize("content", ['{"a"', "[]"])
def test_a_damaged_record_is_named_and_hides_no_other_run(content: str, train: Train, command: Command) -> None:
    bad, good = train("schedule.iterations=1", name="bad"), train("schedule.iterations=1", name="good")
    (bad / "run.json").write_text(content)
    result = command("resume", str(bad))
    assert result.code == 1 and "run.json" in result.err and len(result.err.splitlines()) == 4
    shown = command("status", str(good.parent)).out
    assert "damaged" in shown and "good" in shown


@pytest.mark.slow
def test_a_run_is_resumed_from_anywhere(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a=1").mkdir()
    rows = "\n".join(f'{{"prompt": "{i}?", "response": "{i}!"}}' for i in range(40))
    (tmp_path / "a=1/mine.jsonl").write_text(rows)
    monkeypatch.chdir(tmp_path / "a=1")
    words = [word for word in SMALL if "iterations" not in word]
    own = ["dataset=jsonl", "dataset.path=mine.jsonl", "run_name=run", "schedule.iterations=1"]
    assert command("train", *words, *own).code == 0
    monkeypatch.chdir(tmp_path)
    result = command("resume", "a=1/outputs/run", "schedule.iterations=2")
    assert result.code == 0, result.err
    assert (tmp_path / "a=1/outputs/run/iterate-02/model").is_dir()
    for verb, place in (("evaluate", "a=1/outputs/run"), ("gc", "a=1/outputs")):
        monkeypatch.chdir(tmp_path)  # the command goes to where the run was begun
        assert command(verb, place).code == 0


@pytest.mark.slow
def test_a_disk_that_is_full_while_weights_are_saved_exits_6(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Safetensors reports it as an error of its own, with the system's as text."""
    from safetensors import SafetensorError
    from transformers import LlamaForCausalLM

    def full(*args: object, **kwargs: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr(LlamaForCausalLM, "save_pretrained", full)
        result = command("train", *SMALL, f"outputs={tmp_path}", "run_name=run")
    assert result.code == 6 and "No space left" in result.err
    assert command("train", *SMALL, f"outputs={tmp_path}", "run_name=run").code == 0


def test_a_disk_that_is_full_while_data_are_read_exits_6(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows lie in a file of the system's temporary folder meanwhile."""
    rows = [{"prompt": f"{i}?", "response": f"{i}!"} for i in range(40)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "mine.parquet")

    def full(*given: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pa.ipc, "new_file", full)
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for kind in ("parquet", "jsonl"):
        words = [*SMALL, "dataset=jsonl", f"dataset.path={tmp_path}/mine.{kind}", f"outputs={tmp_path / 'o'}"]
        result = command("train", *words)
        assert result.code == 6 and "The disk is full" in result.err, result.err


def test_a_folder_that_keeps_no_locks_is_named(train: Train, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    from filelock import FileLock

    root = train("schedule.iterations=1")

    def none(*given: object, **words: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(FileLock, "acquire", none)
    result = command("resume", str(root), "schedule.iterations=2")
    assert result.code == 1 and "could not be written" in result.err and str(root / ".lock") in result.err


def test_what_a_killed_save_left_half_written_is_no_part_of_a_stage(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = iterates.save

    def killed(loaded: Any, folder: Path, *more: Any) -> None:
        (folder / ".tmpAbC123").write_bytes(b"half of the weights")
        save(loaded, folder, *more)

    monkeypatch.setattr(iterates, "save", killed)
    root = train("schedule.iterations=1")
    assert not list(root.rglob(".tmp*")) and (root / "iterate-01/model/model.safetensors").exists()


def test_a_copy_that_goes_while_it_is_looked_at_is_damaged(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = train("schedule.iterations=1") / "iterate-01/model"
    found = rundir.manifest(folder)
    monkeypatch.setattr(rundir, "check_sizes", lambda folder, found: None)
    (folder / "model.safetensors").unlink()
    with pytest.raises(DamagedError, match="missing"):
        rundir.check_hashes(folder, found)


@pytest.mark.slow
def test_other_package_versions_are_told_when_a_run_goes_on(train: Train, command: Command) -> None:
    from spin_reg import durable

    root = train("schedule.iterations=1")
    saved = durable.read_record(root / "run.json")
    saved["versions"]["transformers"] = "4.0"
    durable.write_record(root / "run.json", saved)
    result = command("resume", str(root), "schedule.iterations=2")
    assert result.code == 0 and "versions differ from those this run began with: transformers 4.0 ->" in result.err


@pytest.mark.slow
def test_the_version_of_what_trains_is_recorded_where_it_does(
    train: Train, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of DeepSpeed, which the environment may not have, from when on a run trains by it; later it is compared."""
    from spin_reg import durable, processes, versions

    def alone(stage: Stage, *rest: Any) -> None:
        if hasattr(stage.spec, "hardware"):
            hardware = replace(stage.spec.hardware, sharding=Sharding.none)
            stage = replace(stage, spec=replace(stage.spec, hardware=hardware))
        runner.run_stage(stage, *rest)

    root = train("schedule.iterations=1")
    first = durable.read_record(root / "run.json")["versions"]
    assert "deepspeed" not in first
    there, told = versions.metadata.version, ["0.19.8"]
    monkeypatch.setattr(versions.metadata, "version", lambda name: told[0] if name == "deepspeed" else there(name))
    monkeypatch.setattr(processes, "run_with", lambda hardware: alone)
    monkeypatch.setattr(processes, "find_spec", lambda name: object())
    zero = ["hardware=deepspeed", "hardware.threads=1"]
    for iterations, words in ((1, []), (2, zero), (2, []), (3, zero)):
        result = command(
            "train", *SMALL, f"outputs={root.parent}", "run_name=run", *words, f"schedule.iterations={iterations}"
        )
        assert result.code == 0, result.err
        found = durable.read_record(root / "run.json")["versions"]
        assert found == (first if iterations == 1 else {**first, "deepspeed": "0.19.8"})
        told[0] = "0.19.8" if iterations == 1 else "0.19.9"
    assert "versions differ from those this run began with: deepspeed 0.19.8 -> 0.19.9" in result.err


@pytest.mark.slow
def test_a_record_says_what_was_typed_and_where_its_settings_are_read(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first command, verb and all; the last one's settings, and the folder that paths among them are relative to,
    from which `resume` reads them: a second call in another folder reads what lies there.
    """
    from spin_reg import durable

    rows = [{"prompt": f"p{i}", "response": f"r{i}"} for i in range(40)]
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "my.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [word for word in SMALL if word != "schedule.iterations=2"]
    words += ["dataset=jsonl", "dataset.path=my.jsonl", "evaluation=none", "loss=sft"]
    words += [f"outputs={tmp_path / 'o'}", "run_name=run"]
    monkeypatch.chdir(tmp_path / "a")
    assert command("train", *words, "schedule.iterations=1").code == 0
    path = tmp_path / "o/run/run.json"
    before = durable.read_record(path)
    assert before["command"] == ["spin-reg", "train", *words, "schedule.iterations=1"]
    assert before["cwd"] == str(tmp_path / "a")
    monkeypatch.chdir(tmp_path / "b")
    assert command("train", *words, "schedule.iterations=2").code == 0
    (tmp_path / "a/my.jsonl").unlink()
    monkeypatch.chdir(tmp_path)
    result = command("resume", str(tmp_path / "o/run"), "schedule.iterations=3")
    assert result.code == 0, result.err
    after = durable.read_record(path)
    assert after["command"] == before["command"] and after["cwd"] == str(tmp_path / "b")
    assert "schedule.iterations=3" in after["overrides"]


@pytest.mark.parametrize(
    ("words", "used"),
    [
        ([], []),
        (["model.lora.rank=2"], ["peft"]),
        (["model.lora.rank=2", "model.lora.quantize=nf4"], ["peft", "bitsandbytes"]),
        (["model.gguf_file=x.gguf"], ["gguf"]),
    ],
)
def test_packages_that_only_some_models_need_are_recorded_for_them(
    words: list[str], used: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From when on something that loads the model is still to be made; not for the data alone."""
    from types import SimpleNamespace

    from test_config import composed

    from spin_reg import config, specs
    from spin_reg.plan import Sources, plan

    monkeypatch.setattr(config, "find_spec", lambda package: package)  # whether they are here or not
    settings = composed("model=pretrained", "model.name_or_path=m", "dataset=jsonl", "dataset.path=x.jsonl", *words)
    todo = plan(settings, Sources(model="m", tokenizer="t", data="d"))
    data = [stage for stage in todo if isinstance(stage.spec, specs.PrepareSpec)]
    for some, known in ((todo, used), (data, [])):
        planned: Any = SimpleNamespace(config=settings, todo=some)
        assert launch._also(planned) == known


def test_a_run_with_settings_of_ones_own_is_found_by_every_verb(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where they lie is remembered, relative to where it was typed or not."""
    preset = tmp_path / "own conf/experiment/mine.yaml"
    preset.parent.mkdir(parents=True)
    preset.write_text("# @package _global_\nschedule: {beta: 7}\n")
    monkeypatch.chdir(tmp_path)
    words = [*SMALL, "schedule.iterations=1", "experiment=mine", "run_name=run", "dataset.max_response_tokens=8"]
    made = command("train", "--config-dir", "own conf", *words)
    assert made.code == 0, made.err
    monkeypatch.chdir("/")
    run = str(tmp_path / "outputs/run")
    calls = [["resume", run], ["evaluate", run], ["gc", run], ["sample", run, "--prompt", "A1"]]
    calls += [["export", run, "--to", str(tmp_path / "taken")], ["resume", run, "schedule.iterations=2"]]
    for call in calls:
        monkeypatch.chdir("/")
        done = command(*call)
        assert done.code == 0, (call, done.err)
    assert "beta: 7" in Path(run, "config.yaml").read_text().replace("- 7.0", "beta: 7")


def test_what_a_run_says_at_its_end_can_be_typed_where_the_command_was(
    train: Train, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = train("schedule.iterations=1", "evaluation=none")
    (tmp_path / "aside").mkdir()
    for place, shown in ((tmp_path, "outputs/run"), (tmp_path / "aside", str(root)), (root.parent, "run")):
        monkeypatch.chdir(place)
        said = command("resume", os.path.relpath(root))
        assert f"spin-reg resume {shown} schedule.iterations=3" in said.err.replace("\n", " "), said.err


def test_an_evaluation_of_a_run_that_was_stopped_does_not_call_it_finished(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[int] = []

    def progress(self: Any, done: int, total: int, unit: str) -> None:
        if unit == "step" and (tmp_path / "o/run/iterate-01/model").exists() and not sent:
            sent.append(done)
            os.kill(os.getpid(), signal.SIGTERM)

    words = [*SMALL, "schedule.iterations=3", "run_name=run", f"outputs={tmp_path / 'o'}"]
    with monkeypatch.context() as patch:
        patch.setattr(console.Screen, "progress", progress)
        assert command("train", *words).code == 75
    said = command("evaluate", str(tmp_path / "o/run"))
    assert said.code == 0 and "finished" not in said.err and "1 of 3 iterates are made" in said.err
    assert f"spin-reg resume {tmp_path / 'o/run'}\n" in said.err
    assert command("resume", str(tmp_path / "o/run")).code == 0
    assert "is finished" in command("evaluate", str(tmp_path / "o/run")).err


def test_a_terminal_that_cannot_show_a_letter_is_no_failure(train: Train) -> None:
    made = train("schedule.iterations=1", "evaluation=none")
    root = made.rename(made.with_name("caf\u00e9"))
    words = [sys.executable, "-m", "spin_reg", "ls", str(root.parent)]
    done = subprocess.run(words, env={**os.environ, "PYTHONIOENCODING": "ascii"}, capture_output=True)
    assert done.returncode == 0 and b"caf\\xe9" in done.stdout, done.stderr
