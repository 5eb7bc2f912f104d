"""The real command in this process, and settings small enough for a second."""

import gc
import hashlib
import json
import os
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two workers on two cores: more threads would only wait for each other

ROOT = Path(__file__).resolve().parent.parent

SMALL = [
    "tracker=none",
    "model.hidden_size=16",
    "model.num_layers=1",
    "model.num_heads=2",
    "model.sft.epochs=1",
    "model.sft.learning_rate=1e-2",
    "dataset.num_prompts=24",
    "dataset.num_heldout=8",
    "schedule.batch_size=8",
    "schedule.learning_rate=1e-2",
    "schedule.iterations=2",
    "hardware.threads=1",
]


def pytest_collection_finish() -> None:
    """What is imported stays: the garbage collector need not walk it again and again, which took a twentieth."""
    gc.collect()
    gc.freeze()


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


Command = Callable[..., Result]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two things that cost much here and change nothing: fsync (no test cuts the power), and that Hydra, where a
    word speaks to it, composes all settings twice, the first time only to read `hydra.mode`; without it the flag -m
    decides.
    """
    from hydra._internal.hydra import Hydra

    from spin_reg import durable

    monkeypatch.setattr(durable, "sync", lambda path: None)
    monkeypatch.setattr(Hydra, "get_mode", lambda self, config_name, overrides: None)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """`spin-reg WORDS...` through its real entry point."""
    from spin_reg import cli

    def run(*words: str) -> Result:
        monkeypatch.setattr(sys, "argv", ["spin-reg", *words])
        capsys.readouterr()
        try:
            cli.main()
        except SystemExit as end:
            captured = capsys.readouterr()
            return Result(int(end.code or 0), captured.out, captured.err)
        raise AssertionError("the command must end with an exit code")

    return run


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A run for the tests of a module to compare with: `undisturbed(words...)` returns its folder."""

    def run(*words: str) -> Path:
        from spin_reg import cli

        outputs = tmp_path_factory.mktemp("undisturbed")
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
            patch.setattr(sys, "argv", ["spin-reg", "train", *words, f"outputs={outputs}"])
            cli.main()
        assert not end.value.code
        return outputs / "run"

    return run


@pytest.fixture(scope="session")
def swept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """A small sweep over alpha and seed, made once: its outputs, and what the command said. Nobody may change it."""
    from spin_reg import cli, durable

    outputs = tmp_path_factory.mktemp("swept")
    words = ["train", "-m", *SMALL, "alpha=0,0.5", "seed=0,1", f"outputs={outputs}"]
    out, err = StringIO(), StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(durable, "sync", lambda path: None)
        patch.setattr(sys, "argv", ["spin-reg", *words])
        with pytest.raises(SystemExit) as end:
            cli.main()
    return outputs, Result(int(end.value.code or 0), out.getvalue(), err.getvalue())


@pytest.fixture
def train(command: Command, tmp_path: Path) -> Callable[..., Path]:
    """A small run that must succeed; returns its folder."""

    def run(*words: str, name: str = "run", outputs: Path | None = None) -> Path:
        place = outputs or tmp_path / "outputs"
        result = command("train", *SMALL, f"outputs={place}", f"run_name={name}", *words)
        assert result.code == 0, result.err
        return place / name

    return run


def read_all(dataset: Any) -> tuple[list[Any], int]:
    """Every row of a data set that counts, as a conversation, and how many rows repeat an earlier one."""
    from spin_reg import index

    with index.opened(dataset) as found:
        return [found.example(i) for i in range(len(found))], sum(found.duplicates)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def weights(root: Path, k: int) -> str:
    """SHA-256 of the weights of an iterate."""
    return hashlib.sha256((root / f"iterate-{k:02d}/model/model.safetensors").read_bytes()).hexdigest()
