"""Damage through the real command: named before use, made again where it is a cache, refused where it is a source."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, SMALL, Command, weights
from faults import Counter, Killed, before_calls

from spin_reg import durable, fit, rundir, sampling, scorer, tables
from spin_reg.errors import NonFiniteError, SelfCheckError
from spin_reg.specs import CHECKED
from spin_reg.stages import generate
from spin_reg.stages import train as train_stage

Train = Callable[..., Path]
WORDS = [*SMALL, "regularizer=mixture_of_two", "schedule.save_every=1", "run_name=run"]


@pytest.fixture(scope="module")
def made(undisturbed: Callable[..., Path]) -> Path:
    """A run of two iterations that nothing disturbed."""
    return undisturbed(*WORDS)


def damaged(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.chmod(0o644)
    path.write_bytes(content if how == "flip" else content[:-3])


@pytest.mark.parametrize("how", ["flip", pytest.param("cut", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("iterate-01/model/model.safetensors", True),
        ("iterate-00/model/tokenizer.json", True),
        ("run.json", True),
        ("iteration-01/pairs.parquet", False),
        ("iterate-01/scores/train-01-real-from-00/scores.parquet", False),
        ("iterate-00/answers/train-00/stage.json", False),
        ("iterate-02/evaluate/metrics.json", False),
        ("metrics.jsonl", False),
    ],
)
def test_a_damaged_file_is_named_and_made_again_or_refused(
    name: str, source: bool, how: str, made: Path, command: Command, tmp_path: Path
) -> None:
    root = tmp_path / "run"
    shutil.copytree(made, root)
    damaged(root / name, how)
    words = [*WORDS, f"outputs={tmp_path}", "schedule.iterations=2"]
    result = command("train", *words)
    if source:
        assert result.code == 1 and str(root / name) in result.err and len(result.err.splitlines()) == 4
        return
    assert result.code == 0, result.err
    assert f"{root / name} is damaged" in result.err.replace("\n", "")
    for path in [root / name, root / "metrics.jsonl"]:
        assert path.read_bytes() == (made / path.relative_to(root)).read_bytes()


def test_a_config_that_was_damaged_is_written_again(made: Path, command: Command, tmp_path: Path) -> None:
    """config.yaml is for people: a run reads run.json."""
    shutil.copytree(made, tmp_path / "run")
    damaged(tmp_path / "run/config.yaml", "cut")
    result = command("train", *WORDS, f"outputs={tmp_path}")
    assert result.code == 0 and f"{tmp_path / 'run/config.yaml'} is damaged" in result.err.replace("\n", "")
    text = (tmp_path / "run/config.yaml").read_text()
    assert text.replace(str(tmp_path), "X") == (made / "config.yaml").read_text().replace(str(made.parent), "X")


@pytest.mark.parametrize("k", range(1, 9))
def test_a_run_that_is_cut_as_it_begins_is_taken_up(k: int, command: Command, tmp_path: Path) -> None:
    """Before any stage: the folder, its owner, its record, its settings."""
    with before_calls(Counter(at=k)), pytest.raises(Killed):
        command("train", *WORDS, f"outputs={tmp_path}")
    result = command("plan", *WORDS, f"outputs={tmp_path}")
    assert result.code == 0, result.err


@pytest.mark.slow
@pytest.mark.parametrize("file", ["optimizer.safetensors"])  # the other two in test_fit.py
def test_damaged_training_state_is_passed_over(
    file: str, made: Path, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(self: Any, row: dict[str, Any]) -> None:
        if row["iteration"] == 1 and row["step"] == 3:
            raise Killed
        real(self, row)

    real = fit._State.update
    with monkeypatch.context() as patch:
        patch.setattr(fit._State, "update", dies)
        with pytest.raises(Killed):
            command("train", *WORDS, f"outputs={tmp_path}")
    (state,) = (tmp_path / "run/iterate-02/model.tmp/.scratch").glob("checkpoint-*")
    damaged(state / file, "flip")
    result = command("train", *WORDS, f"outputs={tmp_path}")
    assert result.code == 0 and f"{state / file} is damaged" in result.err.replace("\n", "")
    assert weights(tmp_path / "run", 2) == weights(made, 2)


def test_only_a_missing_or_damaged_shard_is_made_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[Any] = [
        {"example_id": str(i), "sampled_from": None, "logprob": float(i), "token_logprobs": None} for i in range(10)
    ]
    calls: list[list[str]] = []

    def make(some: Any, ready: Any) -> Any:
        calls.append([row["example_id"] for row in some])
        return list(some)

    def table(stop: int | None = None) -> None:
        def done(so_far: int, total: int) -> None:
            if stop is not None and so_far >= stop:
                raise Killed

        tables.in_shards(rows, make, out=tmp_path, into={"x.parquet": tables.SCORES}, size=3, done=done)

    with pytest.raises(Killed):
        table(stop=9)
    assert len(calls) == 3
    damaged(next((tmp_path / durable.SCRATCH / "shards-of-3").glob("000000003-*")), "flip")
    table()
    assert calls[3:] == [["3", "4", "5"], ["9"]] and "is damaged" in caplog.text
    assert list(tables.read(tmp_path / "x.parquet")) == rows


def test_a_call_that_goes_on_with_shards_of_another_size_takes_no_row_twice(tmp_path: Path) -> None:
    rows: list[Any] = [
        {"example_id": str(i), "sampled_from": None, "logprob": float(i), "token_logprobs": None} for i in range(10)
    ]
    told: list[int] = []

    def table(size: int, stop: int) -> None:
        def done(so_far: int, total: int) -> None:
            told.append(so_far)
            if so_far >= stop:
                raise Killed

        tables.in_shards(
            rows, lambda some, ready: list(some), out=tmp_path, into={"x.parquet": tables.SCORES}, size=size, done=done
        )

    with pytest.raises(Killed):
        table(size=4, stop=8)
    table(size=3, stop=11)
    assert list(tables.read(tmp_path / "x.parquet")) == rows
    assert told == [4, 8, 3, 6, 9, 10]


@pytest.mark.slow
def test_a_step_that_is_not_finite_keeps_the_state_before_it(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second iteration's second step: exit 5, its rows named, one step kept, nothing published."""
    real, calls = train_stage.pair_terms, [0]

    def spoilt(model: Any, rows: Any, *args: Any) -> Any:
        terms = real(model, rows, *args)
        if torch.is_grad_enabled():
            calls[0] += 1
            if calls[0] == 8:
                terms["loss"] = terms["loss"] * torch.inf
        return terms

    monkeypatch.setattr(train_stage, "pair_terms", spoilt)
    words = [word for word in WORDS if "save_every" not in word]
    result = command("train", *words, f"outputs={tmp_path}")
    assert result.code == NonFiniteError.exit_code == 5 and "iteration 1, step 2 of 6" in result.err.replace("\n", " ")
    kept = [p.name for p in (tmp_path / "run/iterate-02/model.tmp/.scratch").glob("checkpoint-*")]
    assert kept == ["checkpoint-000000001"] and not (tmp_path / "run/iterate-02/model").exists()
    monkeypatch.setattr(train_stage, "pair_terms", real)
    assert command("train", *words, f"outputs={tmp_path}").code == 0


def test_logits_that_are_not_finite_name_their_prompts() -> None:
    logits = torch.zeros(3, 5)
    logits[1, 2] = torch.nan
    logits[2] = -torch.inf
    drawn, _ = sampling.pick(logits, torch.tensor([0.5, 0.5, 0.5]).double(), temperature=1.0, top_p=1.0)
    assert drawn.tolist()[1:] == [-1, -1] and drawn[0] >= 0


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_give_no_answers_and_no_scores(
    number: float, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = generate.iterates.load

    def spoilt(*args: Any, **kwargs: Any) -> Any:
        loaded = real(*args, **kwargs)
        with torch.no_grad():
            loaded.model.lm_head.weight[3] = number
        return loaded

    monkeypatch.setattr(generate.iterates, "load", spoilt)
    result = command("train", *SMALL, f"outputs={tmp_path}", "run_name=run")
    assert result.code == 5 and "heldout-0000" in result.err
    assert not list(tmp_path.glob("run/iterate-00/answers/*/answers.parquet"))
    generate.iterates.forget()


REFERENCES = {"none": [], "base": [], "kl": ["alpha=0.5"], "fictitious_play": []}


@pytest.mark.parametrize(
    "regularizer", [pytest.param(name, marks=[] if name == "kl" else pytest.mark.slow) for name in REFERENCES]
)
def test_every_iteration_begins_with_the_self_check(regularizer: str, train: Train) -> None:
    root = train(f"regularizer={regularizer}", *REFERENCES[regularizer])
    for k in (1, 2):
        found = json.loads((root / f"iterate-{k:02d}/model/selfcheck.json").read_text())
        assert found["rows"] == CHECKED and found["largest_gap"] <= 1e-5
        assert found["margin"] == pytest.approx(found["expected_margin"], abs=1e-4)
        if k == 1 or regularizer == "none":
            assert found["expected_margin"] == 0 and found["loss"] == pytest.approx(0.693147, abs=1e-4)
        else:
            assert abs(found["expected_margin"]) > 1e-2


@pytest.mark.parametrize("fault", ["reference", "policy", "positions", "dropout"])
def test_a_wrong_reference_model_layout_or_mode_stops_the_run_and_names_the_rows(
    fault: str, made: Path, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_load, real_pack, real_pairs = train_stage.iterates.load, scorer.pack, train_stage.tables.read

    def load(folder: Path, *args: Any, **kwargs: Any) -> Any:
        if fault == "policy" and kwargs.get("exclusive"):
            folder = made / "iterate-00/model"  # where iterate 1 belongs
        return real_load(folder, *args, **kwargs)

    def pack(groups: Any, device: Any) -> Any:
        packed = real_pack(groups, device)
        if fault == "positions" and any(len(group.answers) > 1 for group in groups):  # in training, not in scoring
            packed.position_ids.add_(torch.arange(packed.position_ids.shape[1], device=device) // 4)
        return packed

    def read(path: Path, *more: Path, **kwargs: Any) -> Any:
        rows = real_pairs(path, *more, **kwargs)
        if fault == "reference" and path.name == "pairs.parquet":
            return [row | {"reference_real_logprob": row["reference_real_logprob"] + 0.01} for row in rows]
        return rows

    def terms(model: Any, *args: Any) -> Any:
        if fault == "dropout":
            for layer in model.modules():
                if hasattr(layer, "attention_dropout"):
                    layer.attention_dropout = 0.5
            model.train()
        return real_terms(model, *args)

    real_terms = train_stage.pair_terms
    monkeypatch.setattr(train_stage.iterates, "load", load)
    monkeypatch.setattr(scorer, "pack", pack)
    monkeypatch.setattr(train_stage.tables, "read", read)
    monkeypatch.setattr(train_stage, "pair_terms", terms)
    first = "schedule.iterations=2" if fault == "policy" else "schedule.iterations=1"
    words = [word for word in WORDS if "iterations" not in word]
    result = command("train", *words, first, f"outputs={tmp_path}")
    assert result.code == SelfCheckError.exit_code == 1
    assert "does not give the stored log-probs of iterate" in result.err and "train-0000" in result.err
    assert not (tmp_path / f"run/iterate-{2 if fault == 'policy' else 1:02d}/model").exists()


def test_a_second_process_is_refused_with_host_pid_and_age_before_anything_heavy(made: Path, tmp_path: Path) -> None:
    """And the lock of a process that was killed is free."""
    shutil.copytree(made, tmp_path / "run")
    hold = (
        "import sys, pathlib\nfrom spin_reg import rundir\n"
        "with rundir.owned(pathlib.Path(sys.argv[1])):\n    print('held', flush=True)\n    sys.stdin.read()\n"
    )
    words = [word for word in WORDS if "iterations" not in word]
    again = (
        "import sys\nfrom spin_reg import cli\n"
        f"sys.argv = ['spin-reg', 'train', *{words!r}, 'schedule.iterations=3', 'outputs={tmp_path}']\n"
        "try:\n    cli.main()\nfinally:\n    assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(tmp_path / "run")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout is not None and owner.stdout.readline() == "held\n"
        second = subprocess.run([sys.executable, "-c", again], capture_output=True, text=True)
        assert second.returncode == 4, second.stderr
        assert f"pid {owner.pid}, for " in second.stderr and "on host" in second.stderr
        owner.kill()
    with rundir.owned(tmp_path / "run"):
        pass


def test_an_interrupted_stage_can_write_its_files_again(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who is not root cannot open a read-only file: none may be one before its stage is sealed."""
    real = rundir.durable.write_record

    def dies(path: Path, value: dict[str, Any]) -> None:
        if path.parent.name == "model.tmp":
            raise Killed
        real(path, value)

    monkeypatch.setattr(rundir.durable, "write_record", dies)
    with pytest.raises(Killed):
        command("train", *WORDS, f"outputs={tmp_path}")
    files = [path for path in (tmp_path / "run/iterate-00/model.tmp").rglob("*") if path.is_file()]
    assert len(files) > 3 and all(path.stat().st_mode & 0o200 for path in files)


@pytest.mark.slow
def test_a_log_that_cannot_be_written_ends_nothing(made: Path, command: Command, tmp_path: Path) -> None:
    shutil.copytree(made, tmp_path / "run")
    (tmp_path / "run/run.log").unlink()
    (tmp_path / "run/run.log").symlink_to("/dev/full")
    words = [word for word in WORDS if "iterations" not in word]
    result = command("train", *words, "schedule.iterations=3", f"outputs={tmp_path}")
    assert result.code == 0 and "Logging error" not in result.err


def test_what_goes_while_it_is_taken_over_is_made_instead(
    made: Path, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(made.parent, tmp_path / "outputs")
    real = rundir.check_hashes

    def goes(folder: Path, found: Any) -> None:
        real(folder, found)
        if folder.name == "model" and folder.is_relative_to(tmp_path / "outputs/run"):
            rundir.drop_weights(folder)

    monkeypatch.setattr(rundir, "check_hashes", goes)
    words = [word for word in WORDS if not word.startswith("run_name")]
    assert command("train", *words, f"outputs={tmp_path / 'outputs'}", "run_name=other").code == 0
    assert weights(tmp_path / "outputs/other", 2) == weights(made, 2)


@pytest.mark.slow
def test_a_damaged_entry_of_the_index_is_passed_over(made: Path, command: Command, tmp_path: Path) -> None:
    shutil.copytree(made.parent, tmp_path / "outputs")
    for path in (tmp_path / "outputs/.stages").iterdir():
        path.write_bytes(b"\xe9\xff../" + path.read_bytes())
    words = [word for word in WORDS if "iterations" not in word]
    assert command("train", *words, "schedule.iterations=3", f"outputs={tmp_path / 'outputs'}").code == 0


@pytest.mark.slow
@pytest.mark.parametrize("words", [["faults", "--points", "25"], ["killer", "--minutes", "0.5"]], ids=lambda w: w[0])
def test_tortured_at_random_points_and_times(words: list[str]) -> None:
    """The seed is printed; `scripts/torture.py` takes it back."""
    done = subprocess.run([sys.executable, str(ROOT / "scripts/torture.py"), *words], capture_output=True, text=True)
    print(done.stdout, done.stderr)
    assert done.returncode == 0 and "survived" in done.stdout
