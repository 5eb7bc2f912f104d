"""Training in several processes: who reads what, and that it comes to what one process comes to."""

import math
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL, Command, read_jsonl
from safetensors.torch import load_file
from test_processes import trap  # noqa: F401

from spin_reg import console, sharing
from spin_reg.errors import NonFiniteError

WORDS = [*SMALL, "schedule.iterations=1", "schedule.epochs=3", "schedule.batch_size=7", "schedule.learning_rate=1e-3"]
WORDS += ["schedule.save_every=2", "hardware.batch_tokens=48", "evaluation=none", "run_name=run"]
MODEL = "iterate-01/model"
STEPS = 3 * math.ceil(24 / 7)
LOSSES, WEIGHTS = 1e-5, 2e-6  # between numbers of processes: rounding of sums, and what AdamW and RMSprop make of it


def test_each_row_is_read_once_in_as_many_turns_by_every_rank() -> None:
    slots = [5, 40, 7, 7, 30, 12, 3, 44, 9]
    for world in (1, 2, 3, 5, 12):
        dealt = sharing.turns(range(9), slots.__getitem__, tokens=48, most=None, world=world)
        assert len(dealt) == world and len({len(micros) for micros in dealt}) == 1
        assert sorted(i for micros in dealt for micro in micros for i in micro) == list(range(9))
        assert all(sum(slots[i] for i in micro) <= 48 for micros in dealt for micro in micros)
        assert dealt == sharing.turns(range(9), slots.__getitem__, tokens=48, most=None, world=world)
    two = sharing.turns(range(9), slots.__getitem__, tokens=1000, most=None, world=2)
    read = [sum(slots[i] for micro in micros for i in micro) for micros in two]
    assert abs(read[0] - read[1]) <= max(slots)
    single = sharing.turns([3, 1, 2], slots.__getitem__, tokens=48, most=1, world=1)
    assert sorted(i for (i,) in single[0]) == [1, 2, 3]


def test_a_sum_of_shares_is_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    told = [{"loss": 1.25, "margin": -2.0}, {}, {"loss": 0.5, "margin": 3.0}]
    monkeypatch.setattr(sharing.ranks, "gathered", lambda value, poll=None: told)
    assert sharing.totals({}) == {"loss": 1.75, "margin": 1.0}


def test_what_one_rank_finds_all_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    found = NonFiniteError("A what.", where="a", why="b", todo="c")
    monkeypatch.setattr(sharing.ranks, "world", lambda: 2)
    monkeypatch.setattr(sharing.ranks, "gathered", lambda value, poll=None: [value, sharing.errors.told(found)])
    with pytest.raises(NonFiniteError, match="A what"):
        sharing.agreed(lambda: None)


def test_a_lone_process_has_all_of_it() -> None:
    p = torch.nn.Parameter(torch.arange(3.0))
    assert sharing.whole(p) is p and sharing.own(p) is p and not sharing.sharded(p)
    p.grad = torch.ones(3)
    sharing.add_up([p])
    assert p.grad.tolist() == [1, 1, 1]


def test_one_process_has_nobody_to_share_weights_with(command: Command, tmp_path: Path) -> None:
    result = command("train", *WORDS, f"outputs={tmp_path}", "hardware.sharding=full")
    assert result.code == 2 and "hardware.sharding=full" in result.err and not any(tmp_path.iterdir())


@pytest.fixture(scope="module")
def made(undisturbed: Callable[..., Path]) -> Path:
    """The run, made in one process."""
    return undisturbed(*WORDS)


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    """That run, with its training still to be done."""
    shutil.copytree(made, tmp_path / "outputs/run")
    shutil.rmtree(tmp_path / "outputs/run" / MODEL)
    return tmp_path / "outputs/run"


def near(root: Path, made: Path) -> None:
    """The same steps to 1e-5, the same files, and weights as near as is said."""
    steps = [(a, b) for a, b in zip(*(read_jsonl(r / "metrics.jsonl") for r in (root, made)), strict=True)]
    assert len(steps) >= STEPS
    for one, other in steps:
        assert set(one) == set(other)
        ties = abs(other.get("train/margin", 1.0)) < 1e-5  # at the start all margins are 0, but for rounding
        for key in set(one) - ({"train/accuracy"} if ties else set()):
            assert one[key] == pytest.approx(other[key], rel=LOSSES, abs=LOSSES), key
    names = {path.name for path in (made / MODEL).iterdir()}
    assert {path.name for path in (root / MODEL).iterdir()} == names
    for name in names & {"model.safetensors", "adapter_model.safetensors"}:
        ours, theirs = load_file(root / MODEL / name), load_file(made / MODEL / name)
        assert list(ours) == list(theirs)
        for key in ours:
            assert ours[key].dtype == theirs[key].dtype
            torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=WEIGHTS)


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["hardware.processes=2"],
        ["hardware.processes=2", "hardware.sharding=full"],
        ["hardware.processes=3", "hardware.sharding=full", "hardware.gradient_checkpointing=true"],
    ],
    ids=["two", "two sharded", "three sharded, checkpointing"],
)
def test_several_processes_train_as_one_does(words: list[str], made: Path, root: Path, command: Command) -> None:
    """Steps of 7, 7, 7 and 3 pairs, so that ranks have unequal shares, and one of three at times a row or none."""
    from transformers import AutoModelForCausalLM

    result = command("train", *WORDS, f"outputs={root.parent}", *words)
    assert result.code == 0, result.err
    near(root, made)
    model = AutoModelForCausalLM.from_pretrained(root / MODEL)
    assert type(model).__name__ == "LlamaForCausalLM" and model.lm_head.weight.shape == (261, 16)


@pytest.mark.slow
def test_an_adapter_over_a_sharded_base(
    made: Path, undisturbed: Callable[..., Path], command: Command, tmp_path: Path
) -> None:
    words = [word for word in WORDS if not word.startswith("model.")]
    words += ["model=pretrained", f"model.name_or_path={made / 'iterate-00/model'}", "model.lora.rank=2"]
    words += ["schedule.optimizer=adamw", "loss=sft", "hardware.precision=fp32"]
    alone = undisturbed(*words)
    shutil.copytree(alone, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / MODEL)
    both = ["hardware.processes=2", "hardware.sharding=full"]
    result = command("train", *words, f"outputs={tmp_path}", *both)
    assert result.code == 0, result.err
    near(tmp_path / "run", alone)


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["none", "full"])
def test_a_signal_stops_all_ranks_at_one_step_and_another_number_goes_on(
    sharding: str,
    made: Path,
    root: Path,
    command: Command,
    trap: Callable[..., None],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trap(
        "    after(fit._State, 'update', lambda state, row: time.sleep(0.5 * (row['step'] >= 5)))\n"
    )  # so it is in time
    words = ["train", *WORDS, f"outputs={root.parent}"]

    def progress(self: Any, done: int, total: int, unit: str) -> None:
        if (done, unit) == (5, "step"):
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(console.Screen, "progress", progress)
        result = command(*words, "hardware.processes=2", f"hardware.sharding={sharding}")
    assert result.code == 75 and "Stopped by SIGTERM" in result.err, result.err
    (kept,) = root.glob(f"{MODEL}.tmp/.scratch/checkpoint-*")
    assert 5 <= int(kept.name[-9:]) < STEPS
    trap()
    other = ["hardware.processes=2", "hardware.sharding=full"] if sharding == "none" else []
    assert command(*words, *other).code == 0
    near(root, made)
