"""loss=sft, the control arm without an opponent: SFT goes on in the schedule of the game."""

import json
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from conftest import ROOT, SMALL, Command, read_jsonl, weights
from torch import Tensor
from transformers import AutoModelForCausalLM

from spin_reg import fit
from spin_reg.fingerprint import digest

SCHEDULE = ["schedule.epochs=[1,2]", "schedule.batch_size=7", "schedule.warmup_ratio=0.3", "schedule.weight_decay=0.1"]
NEEDS_AN_OPPONENT = {"margin", "accuracy", "gap", "misalignment", "heldout_generated_logprob"}
Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def arms(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The game and the control arm, two points of one sweep; neither takes the alpha."""
    from spin_reg import cli

    outputs = tmp_path_factory.mktemp("arms")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        words = [*SMALL, *SCHEDULE, "loss=logistic,sft", "regularizer=none", "alpha=0.5", f"outputs={outputs}"]
        patch.setattr(sys, "argv", ["spin-reg", "train", "-m", *words])
        cli.main()
    assert not end.value.code
    (game,), (alone,) = outputs.glob("tiny-toy-none-seed0-*"), outputs.glob("tiny-toy-sft-seed0-*")
    return game, alone


def steps(root: Path) -> Rows:
    return [row for row in read_jsonl(root / "metrics.jsonl") if "train/loss" in row]


def test_it_takes_the_steps_of_the_game_at_the_same_rates(arms: tuple[Path, Path]) -> None:
    where = [[(r["iteration"], r["step"], r["train/learning_rate"]) for r in steps(root)] for root in arms]
    assert where[0] == where[1] and len(where[0]) == 4 + 2 * 4
    assert set(steps(arms[1])[0]) == {"iteration", "step", "train/loss", "train/grad_norm", "train/learning_rate"}


def test_nothing_is_made_for_an_opponent(arms: tuple[Path, Path]) -> None:
    game, alone = arms
    made = {path.parent.relative_to(alone).as_posix() for path in alone.rglob("stage.json")}
    assert {"data", "iterate-00/model", "iterate-01/model", "iterate-02/model", "iterate-02/evaluate"} <= made
    assert not any("train" in name.rpartition("/")[2] or name.startswith("iteration-") for name in made)
    assert {path.parent for path in game.rglob("stage.json")} >= {game / "iteration-00", game / "iteration-01"}
    assert not list(alone.rglob("selfcheck.json"))


def test_the_plan_shows_it(command: Command, tmp_path: Path) -> None:
    result = command("plan", *SMALL, "loss=sft", f"outputs={tmp_path / 'o'}")
    stages = [line.split()[1] for line in result.out.splitlines() if line.startswith("  todo")]
    assert result.code == 0 and {"iteration-00/train", "iteration-01/train", "iterate-02/evaluate"} <= set(stages)
    assert not [name for name in stages if "/pairs" in name or "/answers/train" in name or "/scores/train" in name]
    assert "pairs" not in result.out and not (tmp_path / "o").exists()


def test_the_base_and_its_evaluation_are_shared_with_the_game(arms: tuple[Path, Path]) -> None:
    game, alone = arms
    for name in ("iterate-00/model/model.safetensors", "iterate-00/evaluate/metrics.json"):
        assert (game / name).samefile(alone / name)
    assert weights(game, 1) != weights(alone, 1)


def test_all_is_reported_that_needs_no_opponent(arms: tuple[Path, Path]) -> None:
    game, alone = (
        {r["iterate"]: set(r) for r in read_jsonl(root / "metrics.jsonl") if "iterate" in r} for root in arms
    )
    assert list(game) == list(alone) == [0, 1, 2]
    missing = {f"eval/{name}{end}" for name in NEEDS_AN_OPPONENT for end in ("", "_se")}
    for k in alone:
        assert game[k] - missing == alone[k]
    assert {"eval/kl_data", "eval/kl_to_previous", "eval/heldout_nll"} <= alone[2]
    assert json.loads((arms[1] / "iterate-02/evaluate/crossplay.json").read_text()) == []


def test_heldout_likelihood_rises(arms: tuple[Path, Path]) -> None:
    change = [json.loads((arms[1] / f"iterate-{k:02d}/evaluate/metrics.json").read_text()) for k in (0, 1, 2)]
    nll = [values["eval/heldout_nll"] for values in change]
    assert nll[2] < nll[1] < nll[0] and change[2]["eval/kl_data"] < change[0]["eval/kl_data"]


def mean_nll(model: Any, rows: Rows) -> Tensor:
    """Nats a token, one row after the other, from full logits."""
    total = torch.zeros((), dtype=torch.float64)
    for row in rows:
        ids, start = row["prompt_ids"] + row["real_ids"], len(row["prompt_ids"])
        logprobs = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
        total = total - sum(logprobs[i - 1, ids[i]] for i in range(start, len(ids)))
    return total / sum(len(row["real_ids"]) for row in rows)


@pytest.mark.parametrize("t", [0, 1])
def test_an_iteration_by_hand(t: int, arms: tuple[Path, Path]) -> None:
    """A plain loop from the saved iterate t gives every loss, every norm, and iterate t + 1."""
    root, rate, epochs = arms[1], 1e-2, (1, 2)[t]
    rows = pq.read_table(root / "data/train.parquet").to_pylist()
    batches: list[Rows] = []
    for epoch in range(epochs):
        ordered = sorted(rows, key=lambda row, epoch=epoch: digest([0, "order", t, epoch, row["example_id"]]))
        batches += [ordered[i : i + 7] for i in range(0, len(ordered), 7)]
    model = AutoModelForCausalLM.from_pretrained(root / f"iterate-{t:02d}/model").eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.1)
    warmup = {4: 2, 8: 3}[len(batches)]  # ceil(0.3 n)
    for step, (batch, logged) in enumerate(zip(batches, [r for r in steps(root) if r["iteration"] == t], strict=True)):
        rest = (len(batches) - step) / (len(batches) - warmup)
        optimizer.param_groups[0]["lr"] = rate * (step / warmup if step < warmup else rest)
        optimizer.zero_grad()
        loss = mean_nll(model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        assert logged["train/loss"] == pytest.approx(loss.item(), abs=1e-5)
        assert logged["train/grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    saved = AutoModelForCausalLM.from_pretrained(root / f"iterate-{t + 1:02d}/model")
    gaps = [(a - b).abs().max().item() for a, b in zip(model.parameters(), saved.parameters(), strict=True)]
    assert max(gaps) < 1e-4


def test_another_road_gives_the_same_first_loss(
    arms: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(arms[1], copy)

    def verify() -> str:
        monkeypatch.setattr(sys, "argv", ["verify.py", str(copy)])
        runpy.run_path(str(ROOT / "scripts" / "verify.py"), run_name="__main__")
        return capsys.readouterr().out

    assert verify().count("first loss off") == 2
    path = copy / "iterate-02/model/metrics.jsonl"
    first, *rest = read_jsonl(path)
    path.chmod(0o644)
    path.write_text("\n".join(json.dumps(row) for row in [first | {"train/loss": first["train/loss"] + 0.01}, *rest]))
    with pytest.raises(SystemExit, match="does not agree"):
        verify()


def test_a_point_of_a_sweep_is_taken_up_with_what_it_ignored(arms: tuple[Path, Path], command: Command) -> None:
    for root in arms:
        result = command("resume", str(root))
        assert result.code == 0 and "finished" in result.err and "ignored" in result.err


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


def test_killed_inside_an_iteration_it_goes_on_to_the_same_weights(
    arms: tuple[Path, Path], command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = fit._gradients, [0]

    def dies(*args: Any, **kwargs: Any) -> fit.Metrics:
        calls[0] += 1
        if calls[0] == 2 + 4 + 4:  # SFT, the first iteration, and into the second
            raise Killed
        return real(*args, **kwargs)

    monkeypatch.setattr(fit, "_gradients", dies)
    words = [*SMALL, *SCHEDULE, "loss=sft", "schedule.save_every=1", "evaluation=none", f"outputs={tmp_path}"]
    with pytest.raises(Killed):
        command("train", *words)
    assert command("train", *words).code == 0
    assert calls[0] == 2 + 4 + 8 + 1  # no finished step was made twice
    (root,) = tmp_path.glob("tiny-toy-sft-*")
    assert weights(root, 2) == weights(arms[1], 2) and root.name == arms[1].name


@pytest.mark.slow
@pytest.mark.parametrize("keep", ["all", "last"])
def test_an_adapter_goes_on_with_sft_too(keep: str, command: Command, arms: tuple[Path, Path], tmp_path: Path) -> None:
    """Over the game's own base, saved as an ordinary model."""
    base = arms[0] / "iterate-00/model"
    own = ["model=pretrained", f"model.name_or_path={base}", "model.lora.rank=2", "schedule.epochs=4", "run_name=run"]
    words = [*(word for word in SMALL if not word.startswith("model.")), *own, f"outputs={tmp_path}"]
    result = command("train", *words, "loss=sft", f"keep_iterates={keep}")
    assert result.code == 0, result.err
    root = tmp_path / "run"
    assert (root / "iterate-02/model/adapter_model.safetensors").exists()
    assert (root / "iterate-01/model/adapter_model.safetensors").exists() == (keep == "all")
    nll = [
        json.loads((root / f"iterate-{k:02d}/evaluate/metrics.json").read_text())["eval/heldout_nll"] for k in (0, 2)
    ]
    assert nll[1] < nll[0]
