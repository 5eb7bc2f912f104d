"""A single run's settings are composed once, and the page too: nothing but the time may tell it from Hydra's way."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import Command
from hydra._internal.hydra import Hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from spin_reg import cli, single

MODE = Hydra.get_mode  # before a fixture takes it away
OURS = [(), ("alpha=0.5", "seed=1"), ("regularizer=base", "run_name=hydra"), ("~experiment",)]
BAD = [("model=tinny",), ("alpha=0,1",), ("seed=x",), ("alpha=[0",), ("schedule.iteration=1",)]


@pytest.mark.parametrize("words", [*OURS, *BAD])
def test_settings_of_ours_are_plain(words: tuple[str, ...]) -> None:
    assert single.plain(words)


@pytest.mark.parametrize(
    "word", ["-m", "--run", "--cfg", "hydra.mode=MULTIRUN", "+hydra.mode=RUN", "hydra/launcher=basic", "~hydra.mode"]
)
def test_what_speaks_to_hydra_is_not(word: str) -> None:
    assert not single.plain(["alpha=0.5", word])


@pytest.mark.parametrize("words", OURS[:3])
def test_the_task_is_given_what_hydra_would_give(words: tuple[str, ...]) -> None:
    given: list[list[str]] = []

    def task(cfg: Any) -> None:
        given.append([OmegaConf.to_yaml(cfg), OmegaConf.to_yaml(HydraConfig.instance().cfg)])

    assert cli._compose("spin-reg", list(words), task) == 0
    assert cli._compose("spin-reg", [*words, "--run"], task) == 0  # a flag: Hydra's way
    ours, hydras = given
    assert ours == hydras


def test_only_what_speaks_to_hydra_is_composed_for_its_mode(
    command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)  # Hydra's folder for a sweep
    asked: list[list[str]] = []

    def mode(self: Hydra, config_name: str | None, overrides: list[str]) -> Any:
        asked.append(list(overrides))
        return MODE(self, config_name, overrides)

    monkeypatch.setattr(Hydra, "get_mode", mode)
    assert command("plan", "alpha=0.5").out.count("run ") == 1
    assert not asked
    assert command("plan", "alpha=0,0.5", "hydra.mode=MULTIRUN").out.count("run outputs/") == 2
    assert asked == [["alpha=0,0.5", "hydra.mode=MULTIRUN"]]


def test_an_experiment_that_sweeps_by_itself_does(
    command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(Hydra, "get_mode", MODE)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(cli.conf_dir(), tmp_path / "conf")
    sweep = "# @package _global_\nhydra:\n  mode: MULTIRUN\n  sweeper:\n    params:\n      alpha: 0,0.5\n"
    (tmp_path / "conf/experiment/strengths.yaml").write_text(sweep)
    monkeypatch.setattr(cli, "conf_dir", lambda: tmp_path / "conf")
    assert command("plan", "experiment=strengths").out.count("run outputs/") == 2


@pytest.mark.parametrize("words", BAD)
def test_errors_are_the_same(command: Command, words: tuple[str, ...]) -> None:
    ours = command("plan", *words)
    assert ours.code == 2 and ours == command("plan", *words, "--run")


def test_the_page_is_the_one_that_hydra_would_print(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Hydra, "list_all_config_groups", lambda self, parent="": [])  # seconds, and not on the page
    hydras = command("plan", "alpha=0.5", "--help", "--run")
    monkeypatch.setattr(Hydra, "app_help", lambda *args, **kwargs: pytest.fail("Hydra's way"))
    assert command("plan", "alpha=0.5", "--help") == hydras
    assert hydras.code == 0 and "\nalpha: 0.5\n" in hydras.out


@pytest.mark.parametrize("words", BAD[:2])
def test_a_page_of_settings_that_do_not_compose_is_the_same_error(command: Command, words: tuple[str, ...]) -> None:
    ours = command("train", "-h", *words)
    assert ours.code == 2 and ours == command("train", "-h", *words, "--run")


@pytest.mark.parametrize(
    ("word", "idle"), [("plan", ("asyncio", "jinja2", "pandas", "rich")), ("--help", ("hydra", "spin_reg.specs"))]
)
def test_what_is_not_needed_is_not_loaded(word: str, idle: tuple[str, ...], tmp_path: Path) -> None:
    """Each takes some 10 ms or more: judges and tables are for runs, and stages took a third of the page's time."""
    code = (
        f"import sys\nfrom spin_reg import cli\nsys.argv = ['spin-reg', {word!r}]\n"
        f"try: cli.main()\nexcept SystemExit: print([m for m in {idle!r} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.splitlines()[-1] == "[]", done.stdout
