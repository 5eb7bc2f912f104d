"""The game through the real command on a model of a few thousand weights."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from conftest import SMALL, Command, read_jsonl, weights

from spin_reg.errors import NonFiniteError

Train = Callable[..., Path]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared by this module's runs, so that they share the SFT stage."""
    return tmp_path_factory.mktemp("outputs")


@pytest.mark.slow
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
        pytest.param(["loss=hinge"], marks=pytest.mark.slow),
        pytest.param(["loss=exponential"], marks=pytest.mark.slow),
        ["loss.length_norm=mean", "regularizer=none"],
        ["schedule.optimizer=rmsprop", "schedule.lr_scheduler=cosine", "schedule.weight_decay=0.01"],
        ["hardware.precision=bf16"],
        ["model.dtype=bfloat16"],
        pytest.param(["hardware.gradient_checkpointing=true"], marks=pytest.mark.slow),
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


@pytest.mark.slow
def test_gradient_checkpointing_changes_no_number(train: Train, tmp_path: Path) -> None:
    plain = train(outputs=tmp_path / "a")
    checkpointed = train("hardware.gradient_checkpointing=true", outputs=tmp_path / "b")
    assert weights(plain, 2) == weights(checkpointed, 2)


@pytest.mark.slow
def test_per_iteration_lists_reach_the_iteration(train: Train) -> None:
    root = train("schedule.learning_rate=[1e-2,1e-3]", "schedule.epochs=[1,2]", "schedule.lr_scheduler=constant")
    rows = [row for row in read_jsonl(root / "metrics.jsonl") if "train/loss" in row]
    assert [row["iteration"] for row in rows] == [0] * 3 + [1] * 6
    assert rows[2]["train/learning_rate"] == 1e-2 and rows[8]["train/learning_rate"] == 1e-3


@pytest.mark.slow
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
    alone = train("alpha=0.5", outputs=tmp_path / "alone")
    assert weights(alone, 2) == weights(roots[1], 2)
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
    assert "iteration 0, before its first step" in result.err and "train-0000" in result.err
    assert (tmp_path / "o/x/iteration-00/pairs.parquet").exists()
    assert not (tmp_path / "o/x/iterate-01/model").exists()
    assert "Traceback" in (tmp_path / "o/x/run.log").read_text()


def test_planned_runs_change_nothing(command: Command, tmp_path: Path) -> None:
    result = command("plan", *SMALL, f"outputs={tmp_path / 'o'}")
    assert result.code == 0 and "iteration-01/train" in result.out and "todo" in result.out
    assert list(tmp_path.iterdir()) == []


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


def test_held_out_margins_are_those_of_the_loss(train: Train) -> None:
    """With length_norm=mean each log-ratio is divided by its length, in evaluation as in training."""
    root = train("regularizer=none", "loss.length_norm=mean", "schedule.iterations=1", "schedule.beta=0.5")
    tables = {0: ["scores/heldout-real", "answers/heldout"], 1: ["scores/heldout-real-from-00"]}
    scores = {
        (k, row["sampled_from"], row["example_id"]): row["logprob"]
        for k, names in tables.items()
        for name in names
        for row in pq.read_table(root / f"iterate-{k:02d}/{name}/scores.parquet").to_pylist()
    }
    real = {row["example_id"]: len(row["real_ids"]) for row in pq.read_table(root / "data/heldout.parquet").to_pylist()}
    answers = pq.read_table(root / "iterate-00/answers/heldout/answers.parquet").to_pylist()
    deltas = []
    for row in answers:
        name = row["example_id"]
        gain = {j: scores[1, j, name] - scores[0, j, name] for j in (None, 0)}
        deltas.append(gain[None] / real[name] - gain[0] / len(row["generated_ids"]))
    found = json.loads((root / "iterate-01/evaluate/metrics.json").read_text())
    assert found["eval/margin"] == pytest.approx(0.5 * sum(deltas) / len(deltas))
