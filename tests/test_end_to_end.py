"""The game through the real command on a model of a few thousand weights."""

import hashlib
import json
import math
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from conftest import ROOT, SMALL, Command, read_jsonl

from spin_reg import fit, launch
from spin_reg.errors import NonFiniteError

Train = Callable[..., Path]

ARMS = {
    "none": ["regularizer=none"],
    "kl": ["regularizer=kl", "alpha=0.5"],
    "kl-window": ["regularizer=kl", "alpha=0.3", "regularizer.history=2", "regularizer.pairs=union"],
    "kl-generator": ["regularizer=kl", "regularizer.history=null", "regularizer.reference=generator"],
    "fictitious": ["regularizer=fictitious_play"],
    "fictitious-reuse": ["regularizer=fictitious_play", "regularizer.pairs=reuse"],
    "mixture": ["regularizer=mixture_of_two"],
    "mixture-as-released": ["regularizer=mixture_of_two", "regularizer.reference=last", "regularizer.pairs=union"],
    "mixture-geometric": ["regularizer=mixture_of_two", "regularizer.reference=geometric"],
    "base": ["regularizer=base"],
}


def weights(root: Path, k: int) -> str:
    return hashlib.sha256((root / f"iterate-{k:02d}/model/model.safetensors").read_bytes()).hexdigest()


@pytest.fixture
def verify(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[[Path], str]:
    """scripts/verify.py, which shares no code with the package; returns what it prints, or why it fails."""

    def run(root: Path) -> str:
        monkeypatch.setattr(sys, "argv", ["verify.py", str(root), "--rows", "48"])
        try:
            runpy.run_path(str(ROOT / "scripts" / "verify.py"), run_name="__main__")
        except SystemExit as failure:
            return f"failed: {failure}"
        return capsys.readouterr().out

    return run


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared by this module's runs, so that they share the SFT stage."""
    return tmp_path_factory.mktemp("outputs")


@pytest.mark.parametrize("arm", ARMS)
def test_another_road_gives_the_same_references_first_loss_and_first_margin(
    arm: str, train: Train, outputs: Path, verify: Callable[[Path], str]
) -> None:
    root = train(*ARMS[arm], "schedule.iterations=3", name=arm, outputs=outputs)
    assert verify(root).count("reference off") == 3


def test_a_swapped_reference_is_seen_by_the_other_road(
    train: Train, outputs: Path, tmp_path: Path, verify: Callable[[Path], str]
) -> None:
    root = train(*ARMS["kl"], "schedule.iterations=3", name="kl", outputs=outputs)
    copy = tmp_path / "copy"
    shutil.copytree(root, copy)
    run = json.loads((copy / "run.json").read_text())
    run["settings"]["regularizer.alpha"] = [0.4]
    (copy / "run.json").write_text(json.dumps(run))
    assert verify(copy).startswith("failed: the stored references")


def test_iteration_0_is_the_same_for_every_regularizer_bit_for_bit(train: Train, outputs: Path) -> None:
    roots = [train(*words, "schedule.iterations=3", name=arm, outputs=outputs) for arm, words in ARMS.items()]
    assert len({weights(root, 1) for root in roots}) == 1
    assert len({(root / "iteration-00/pairs.parquet").read_bytes() for root in roots}) == 1
    assert len({weights(root, 3) for root in roots}) == len(roots)  # and then they part


def test_identities_hold_bit_for_bit_without_sharing_a_stage(train: Train, tmp_path: Path) -> None:
    """alpha = 0 is SPIN, a history of one is SPIN: run apart, in folders that cannot share."""
    spin = train("regularizer=none", outputs=tmp_path / "a")
    for i, words in enumerate((["alpha=0"], ["regularizer=fictitious_play", "regularizer.history=1"])):
        other = train(*words, outputs=tmp_path / str(i))
        assert weights(other, 2) == weights(spin, 2)
        assert (other / "metrics.jsonl").read_bytes() == (spin / "metrics.jsonl").read_bytes()


def test_plain_spin_begins_every_iteration_at_log_2(train: Train, outputs: Path) -> None:
    root = train(*ARMS["none"], "schedule.iterations=3", name="none", outputs=outputs)
    first = [row for row in read_jsonl(root / "metrics.jsonl") if row["step"] == 1 and "train/loss" in row]
    assert len(first) == 3
    for row in first:
        assert math.isclose(row["train/loss"], math.log(2), abs_tol=1e-6)
        assert abs(row["train/margin"]) < 1e-5


def test_the_run_folder_holds_what_it_promises(train: Train, outputs: Path) -> None:
    root = train(*ARMS["fictitious"], "schedule.iterations=3", name="fictitious", outputs=outputs)
    for name in ("run.json", "config.yaml", "run.log", "metrics.jsonl"):
        assert (root / name).stat().st_size > 0
    for k in range(4):
        assert (root / f"iterate-{k:02d}/model/model.safetensors").exists()
        metrics = json.loads((root / f"iterate-{k:02d}/evaluate/metrics.json").read_text())
        wanted = {"heldout_nll", "kl_data", "kl_data_se", "kl_off", "kl_to_base", "length_mean"}
        wanted |= {"margin", "accuracy", "kl_to_previous"} if k else set()
        assert {f"eval/{name}" for name in wanted} <= set(metrics)
        assert k or not {"eval/margin", "eval/accuracy"} & set(metrics)
    table = pq.read_table(root / "iteration-02/pairs.parquet")
    assert table.column_names[:8] == [
        *("example_id", "prompt_ids", "real_ids", "generated_ids", "sampled_from", "finish_reason"),
        *("reference_real_logprob", "reference_generated_logprob"),
    ]
    rows = table.to_pylist()
    assert len(rows) == 24 and {row["sampled_from"] for row in rows} == {0, 1, 2}
    end = rows[0]["real_ids"][-1]
    for row in rows:
        assert row["real_ids"].count(end) == 1 and row["real_ids"][-1] == end
        assert row["generated_ids"].count(end) == (row["finish_reason"] == "stop")
        assert (row["generated_ids"][-1] == end) == (row["finish_reason"] == "stop")


def test_union_pairs_every_prompt_with_every_iterate_and_reuse_asks_for_fewer_answers(
    train: Train, outputs: Path
) -> None:
    union = train(*ARMS["mixture-as-released"], "schedule.iterations=3", name="mixture-as-released", outputs=outputs)
    rows = pq.read_table(union / "iteration-02/pairs.parquet").to_pylist()
    assert len(rows) == 48 and {row["sampled_from"] for row in rows} == {1, 2}
    reuse = train(*ARMS["fictitious-reuse"], "schedule.iterations=3", name="fictitious-reuse", outputs=outputs)
    answers = [len(pq.read_table(p)) for p in sorted(reuse.glob("iterate-*/answers/train-*/answers.parquet"))]
    assert answers[0] == 24 and all(0 < n < 24 for n in answers[1:])
    kept = {
        (row["example_id"], tuple(row["generated_ids"]))
        for t in (1, 2)
        for row in pq.read_table(reuse / f"iteration-{t:02d}/pairs.parquet").to_pylist()
        if row["sampled_from"] == 0
    }
    first = {
        (row["example_id"], tuple(row["generated_ids"]))
        for row in pq.read_table(reuse / "iteration-00/pairs.parquet").to_pylist()
    }
    assert kept and kept <= first


def test_the_same_command_again_answers_at_once_without_torch(train: Train, outputs: Path) -> None:
    root = train(*ARMS["none"], "schedule.iterations=3", name="none", outputs=outputs)
    words = ["train", *SMALL, *ARMS["none"], "schedule.iterations=3", f"outputs={outputs}", "run_name=none"]
    code = (
        f"import sys\nfrom spin_reg import cli\nsys.argv = ['spin-reg', *{words!r}]\n"
        "try:\n    cli.main()\nexcept SystemExit as end:\n    assert not end.code\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "finished" in done.stderr and str(root) in done.stderr.replace("\n", "")


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


def test_micro_batches_change_nothing_but_rounding(train: Train, tmp_path: Path) -> None:
    """1 x 8 = 8 x 1: the same trajectory of losses."""
    runs = [
        train(f"hardware.micro_batch_size={size}", f"hardware.score_batch_size={size}", outputs=tmp_path / str(size))
        for size in (1, 8)
    ]
    one, eight = ([row for row in read_jsonl(root / "metrics.jsonl") if "train/loss" in row] for root in runs)
    assert len(one) == len(eight) == 12
    for a, b in zip(one, eight, strict=True):
        assert math.isclose(a["train/loss"], b["train/loss"], abs_tol=2e-4)


@pytest.mark.parametrize(
    "words",
    [
        ["loss=ipo", "schedule.beta=0.1"],
        ["loss=hinge"],
        ["loss=exponential"],
        ["loss.length_norm=mean", "regularizer=none"],
        ["schedule.optimizer=rmsprop", "schedule.lr_scheduler=cosine", "schedule.weight_decay=0.01"],
        ["hardware.precision=bf16"],
        ["model.dtype=bfloat16"],
        ["hardware.gradient_checkpointing=true"],
        ["generation.temperature=0.8", "generation.top_p=0.9"],
        ["evaluation=none"],
        ["alpha=[0.1,0.9]", "schedule.learning_rate=[1e-2,1e-3]", "schedule.beta=[0.1,5]", "schedule.epochs=[1,2]"],
    ],
    ids=" ".join,
)
def test_every_option_runs(words: list[str], train: Train, outputs: Path) -> None:
    iterations = 2 if "[" in words[0] else 1
    name = "option-" + "".join(c for c in "".join(words) if c.isalnum())
    root = train(f"schedule.iterations={iterations}", *words, name=name, outputs=outputs)
    rows = [row for row in read_jsonl(root / "metrics.jsonl") if "train/loss" in row]
    assert {row["iteration"] for row in rows} == set(range(iterations))
    assert all(math.isfinite(row["train/loss"]) for row in rows)


def test_gradient_checkpointing_changes_no_number(train: Train, tmp_path: Path) -> None:
    plain = train(outputs=tmp_path / "a")
    checkpointed = train("hardware.gradient_checkpointing=true", outputs=tmp_path / "b")
    assert weights(plain, 2) == weights(checkpointed, 2)


def test_per_iteration_lists_reach_the_iteration(train: Train) -> None:
    root = train("schedule.learning_rate=[1e-2,1e-3]", "schedule.epochs=[1,2]", "schedule.lr_scheduler=constant")
    rows = [row for row in read_jsonl(root / "metrics.jsonl") if "train/loss" in row]
    assert [row["iteration"] for row in rows] == [0] * 3 + [1] * 6
    assert rows[2]["train/learning_rate"] == 1e-2 and rows[8]["train/learning_rate"] == 1e-3


def test_a_sweep_shares_iteration_0_and_equals_two_runs(command: Command, train: Train, tmp_path: Path) -> None:
    place = tmp_path / "sweep"
    result = command("train", "-m", *SMALL, "alpha=0,0.5", f"outputs={place}")
    assert result.code == 0, result.err
    roots = sorted(p.parent for p in place.glob("*/run.json"))
    assert len(roots) == 2
    assert (
        roots[0]
        .joinpath("iterate-01/model/model.safetensors")
        .samefile(roots[1].joinpath("iterate-01/model/model.safetensors"))
    )
    for alpha, root in zip(("0", "0.5"), roots, strict=True):
        alone = train(f"alpha={alpha}", outputs=tmp_path / alpha)
        assert weights(alone, 2) == weights(root, 2)
    shutil.rmtree(roots[0])
    assert len(weights(roots[1], 1)) == 64  # what was shared stays when the other run goes
    assert command("train", *SMALL, "alpha=0.5", f"outputs={place}").code == 0


def test_a_non_finite_loss_stops_at_once_names_rows_and_exits_5(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from spin_reg import losses
    from spin_reg.stages import train as stage

    monkeypatch.setitem(losses.LOSSES, "logistic", lambda delta, beta: delta * torch.nan)
    assert stage.LOSSES is losses.LOSSES
    result = command("train", *SMALL, f"outputs={tmp_path / 'o'}", "run_name=x")
    assert result.code == NonFiniteError.exit_code == 5
    assert "iteration 0, step 1 of" in result.err and "train-0000" in result.err
    assert (tmp_path / "o/x/iteration-00/pairs.parquet").exists()
    assert not (tmp_path / "o/x/iterate-01/model").exists()
    assert "Traceback" in (tmp_path / "o/x/run.log").read_text()


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


def test_planned_runs_change_nothing(command: Command, tmp_path: Path) -> None:
    result = command("plan", *SMALL, f"outputs={tmp_path / 'o'}")
    assert result.code == 0 and "iteration-01/train" in result.out and "todo" in result.out
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_exits_75_and_says_how_to_go_on(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(launch.runner, "run_stage", interrupted)
    result = command("train", *SMALL, f"outputs={tmp_path / 'o'}")
    assert result.code == 75 and "same command again" in result.err


def test_evaluation_is_added_to_a_finished_run(train: Train, command: Command, tmp_path: Path) -> None:
    straight = train("regularizer=mixture_of_two", outputs=tmp_path / "a")
    root = train("regularizer=mixture_of_two", "evaluation=none", outputs=tmp_path / "b")
    assert not list(root.glob("iterate-*/evaluate"))
    before = weights(root, 2)
    result = command("evaluate", str(root), "evaluation=default")
    assert result.code == 0, result.err
    assert weights(root, 2) == before
    assert (root / "metrics.jsonl").read_bytes() == (straight / "metrics.jsonl").read_bytes()


@pytest.mark.slow
def test_killed_for_real_at_any_time_the_same_command_ends_at_the_same_bytes(train: Train, tmp_path: Path) -> None:
    """Signal 9 after ever longer waits, until a call gets through."""
    straight = train("schedule.save_every=1", "regularizer=fictitious_play", name="run", outputs=tmp_path / "a")
    words = [
        *SMALL,
        "schedule.save_every=1",
        "regularizer=fictitious_play",
        f"outputs={tmp_path / 'b'}",
        "run_name=run",
    ]
    call = [sys.executable, "-m", "spin_reg", "train", *words]
    killed, wait = 0, 5.0
    while True:
        process = subprocess.Popen(call, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            assert process.wait(timeout=wait) == 0
            break
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            killed, wait = killed + 1, wait + 0.4
    assert killed >= 2
    root = tmp_path / "b" / "run"
    for k in (0, 1, 2):
        assert weights(root, k) == weights(straight, k)
    assert (root / "metrics.jsonl").read_bytes() == (straight / "metrics.jsonl").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("regularizer", ["none", "kl", "fictitious_play", "mixture_of_two"])
def test_on_the_defaults_every_iterate_is_at_least_as_near_the_data_as_the_base(
    regularizer: str, command: Command, tmp_path_factory: pytest.TempPathFactory
) -> None:
    outputs = tmp_path_factory.getbasetemp() / "defaults"  # shared, so that the base is fitted once
    words = [f"regularizer={regularizer}", "tracker=none", f"outputs={outputs}", f"run_name={regularizer}"]
    assert command("train", *words).code == 0
    files = sorted((outputs / regularizer).glob("iterate-*/evaluate/metrics.json"))
    kl = [json.loads(path.read_text())["eval/kl_data"] for path in files]
    assert len(kl) == 4 and all(value <= kl[0] for value in kl[1:]), kl


def test_status_lists_runs_and_how_far_they_are(train: Train, command: Command, tmp_path: Path) -> None:
    train(name="one")
    (tmp_path / "outputs/one/iterate-02/model").rename(tmp_path / "outputs/one/iterate-02/model.tmp")
    shown = command("status", str(tmp_path / "outputs")).out
    assert "one" in shown and "iterate-02/model" in shown
    assert command("status", str(tmp_path / "nowhere")).code == 2
