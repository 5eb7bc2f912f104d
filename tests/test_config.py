"""Every option composes; every mistake is answered with what, where, why and what to do, before torch is imported."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from conftest import ROOT, Command
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from spin_reg import config, estimate, overrides
from spin_reg.config import Config
from spin_reg.errors import ConfigError
from spin_reg.pace import human

CONF = ROOT / "conf"
GROUPS = [p.name for p in CONF.iterdir() if p.is_dir() and p.name != "experiment"]
OPTIONS = sorted(
    str(p.relative_to(CONF).with_suffix("")) for g in [*GROUPS, "experiment"] for p in CONF.glob(f"{g}/*.yaml")
)
MUST_GIVE = {
    "evaluation/mt_bench": ["evaluation.judge.model=m", "evaluation.judge.base_url=http://h/v1"],
    "model/pretrained": ["model.name_or_path=x"],
    "dataset/jsonl": ["dataset.path=x.jsonl"],
    "dataset/hub": ["dataset.path=a/b"],
    "dataset/mixture": ["dataset.parts=[{path:x.jsonl}]"],
}


def composed(*words: str, sweep: bool = False, given: Sequence[str] = ()) -> Config:
    config.register()
    overrides.register_help(CONF)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return config.load(compose("config", list(words)), sweep=sweep, given=given)


def test_all_options_are_seen() -> None:
    assert sorted(GROUPS) == sorted(config.GROUPS)
    assert len(OPTIONS) == len(list(CONF.rglob("*.yaml"))) - 1  # config.yaml


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_composes_and_loads(option: str) -> None:
    group, name = option.split("/")
    loaded = composed(f"{group}={name}", *MUST_GIVE.get(option, []))
    assert config.run_name(loaded)


def test_no_schema_shows_up_as_a_choice(command: Command) -> None:
    help_text = command("train", "--help").out
    assert "regularizer: base, fictitious_play, kl, mixture_of_two, none" in help_text
    assert "schema/regularizer" not in help_text.split("SETTINGS")[0]


def test_same_settings_same_folder() -> None:
    """Which settings make another: test_identity.py."""
    name = config.run_name(composed("regularizer=kl", "alpha=0.5"))
    assert name.startswith("tiny-toy-kl-alpha0.5-seed0-")
    assert config.run_name(composed("regularizer.alpha=0.5", "schedule.iterations=9", "evaluation=none")) == name


def test_a_list_whose_last_value_repeats_is_the_same_setting() -> None:
    assert config.run_name(composed("alpha=[0.1,0.5,0.5]")) == config.run_name(composed("alpha=[0.1,0.5]"))
    assert composed("schedule.beta=[0.1,0.1,5]").schedule.beta == [0.1, 0.1, 5.0]


BAD = [
    (["regularizer.alfa=0.3"], "regularizer.alpha"),
    (["beta=0.1"], "did you mean schedule.beta?"),
    (["lr=1e-5"], "schedule.learning_rate"),
    (["dataset=mixture", "dataset.parts=[{pth:a.jsonl}]"], "did you mean path"),
    (["evaluation.benchmarks=[{zz:a}]"], "did you mean task or num_fewshot?"),
    (["alpha=0,1"], "add -m to make a run of each"),
    (["seed=range(3)"], "add -m to make a run of each"),
    (["tracker=mlflow"], "tracker=tensorboard tracker.name=mlflow"),
    (["zzzz=1"], "`spin-reg train --help` lists all"),
    (["dataset.path=x.jsonl"], "add dataset=jsonl or dataset=hub"),
    (["model.lora.rank=8"], "add model=pretrained"),
    (["regularizer=fictitious_play", "regularizer.alpha=0.5"], "add regularizer=kl"),
    (["model=/some/where"], "model=pretrained model.name_or_path=/some/where"),
    (["dataset=a/b"], "dataset=hub dataset.path=a/b"),
    (["--alpha", "0.5"], "alpha=value"),
    (["alpha=0.5", "--verbose"], "There is no such flag"),
    (["regularizr=kl"], "regularizer"),
    (["scedule.beta=1"], "schedule.beta"),
    (["+schedule.betta=1"], "schedule.beta"),
    (["++schedule.betta=1"], "schedule.beta"),
    (["model.sft.epoch=1"], "model.sft.epochs"),
    (["regularizer=kll"], "regularizer=kl"),
    (["dataset=jsnl"], "dataset=jsonl"),
    (["loss=logistc"], "loss=logistic"),
    (["alpha"], "alpha=value"),
    (["alpha=2"], "0 to 1"),
    (["alpha=-0.1"], "0 to 1"),
    (["alpha=nan"], "0 to 1"),
    (["alpha=text"], "0 to 1"),
    (["alpha=[]"], "empty list"),
    (["alpha=0.5", "regularizer.alpha=0.4"], "give one of them"),
    (["regularizer=none", "alpha=0.5"], "takes no alpha"),
    (["regularizer=none", "regularizer.history=2"], "regularizer.history"),
    (["regularizer=kl", "regularizer.pairs=union"], "no effect"),
    (["regularizer=fictitious_play", "regularizer.history=0"], "from 1"),
    (["regularizer=mixture_of_two", "regularizer.reference=mean"], "regularizer.reference"),
    (["loss.length_norm=mean"], "normalised"),
    (["regularizer=fictitious_play", "regularizer.reference=geometric", "loss.length_norm=mean"], "normalised"),
    (["loss=sft", "regularizer=kl"], "no opponent"),
    (["loss=sft", "regularizer.alpha=0.3"], "no opponent"),
    (["alpha=0.5", "loss=sft"], "no opponent"),
    (["loss=sft", "schedule.beta=2"], "schedule.beta=2"),
    (["loss=sft", "loss.length_norm=mean"], "no opponent"),
    (["loss=sft", "generation.temperature=0.7"], "no opponent"),
    (["loss=sft", "evaluation.crossplay=true"], "no opponent"),
    (["schedule.beta=null"], "above 0"),
    (["schedule.learning_rate=0"], "above 0"),
    (["schedule.beta=[0.1,0]"], "above 0"),
    (["schedule.epochs=1.5"], "whole number"),
    (["schedule.iterations=0"], "from 1"),
    (["schedule.iterations=two"], "schedule.iterations"),
    (["schedule.optimizer=adam"], "schedule.optimizer"),
    (["generation.temperature=0"], "above 0"),
    (["generation.temperature=inf"], "above 0"),
    (["generation.top_p=1.1"], "up to 1"),
    (["hardware.precision=fp16"], "hardware.precision"),
    (["dataset=jsonl"], "dataset.path"),
    (["model=pretrained"], "model.name_or_path"),
    (["dataset.smoothing=0"], "full support"),
    (["dataset.num_prompts=null"], "num_prompts"),
    (["model.num_heads=3"], "model.hidden_size"),
    (["dataset=null"], "dataset=hub, jsonl"),
    (["-m", "alpha=2,3"], "0 to 1"),
    (["run_name=../elsewhere"], "one folder"),
    (["run_name=.hidden"], "one folder"),
    (["evaluation=ful"], "evaluation takes"),
    (["tracker.name=wandbb"], "tracker.name"),
]


@pytest.mark.parametrize(("words", "named"), BAD, ids=[" ".join(w) for w, _ in BAD])
def test_a_bad_setting_exits_2_names_the_way_out_and_leaves_nothing(
    words: list[str], named: str, command: Command, tmp_path: Path
) -> None:
    result = command("train", *words, f"outputs={tmp_path / 'o'}")
    assert result.code == 2, result.err
    assert named in result.err
    lines = [line.split(":")[0].strip() for line in result.err.splitlines()]
    assert lines[:4] == ["spin-reg", "where", "why", "to do"] and len(lines) == (8 if words[0] == "-m" else 4)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", ["-m seed=0,1 alpha=0.3", "seed=0,1 alpha=0.3 -m", "seed=0,1 --multirun alpha=0.3"])
def test_flags_may_stand_anywhere(words: str, command: Command, tmp_path: Path) -> None:
    result = command("plan", *words.split(), f"outputs={tmp_path / 'o'}")
    assert result.code == 0, result.err
    assert [seed in result.out for seed in ("alpha0.3-seed0-", "alpha0.3-seed1-", "seed2")] == [True, True, False]


@pytest.mark.parametrize("loss_ok", ["regularizer=none", "regularizer=fictitious_play", "alpha=0", "alpha=1"])
def test_length_norm_goes_with_normalised_references(loss_ok: str) -> None:
    assert composed(loss_ok, "loss.length_norm=mean").loss.length_norm == "mean"


def test_in_a_sweep_an_alpha_that_one_arm_does_not_take_is_let_pass(caplog: pytest.LogCaptureFixture) -> None:
    one, two = (composed("regularizer=none", f"alpha={alpha}", sweep=True) for alpha in (0.1, 0.5))
    assert config.run_name(one) == config.run_name(two)  # equal points run once
    assert "alpha=0.5 is ignored" in caplog.text


def test_what_acts_through_an_opponent_is_no_part_of_a_run_without_one(caplog: pytest.LogCaptureFixture) -> None:
    plainly = composed("loss=sft")
    assert config.run_name(plainly).startswith("tiny-toy-sft-seed0-")
    others = ["regularizer=none", "alpha=0.1", "schedule.beta=3", "generation.top_p=0.9", "evaluation.crossplay=true"]
    for word in others:
        assert composed("loss=sft", word, sweep=True, given=["loss=sft", word]) == plainly
        assert f"{word}: ignored here" in caplog.text
    assert len(caplog.records) == len(others)
    other = composed("loss=sft", "schedule.learning_rate=1e-3", given=["loss=sft", "schedule.learning_rate=1e-3"])
    assert config.run_name(other) != config.run_name(plainly) != config.run_name(composed())


def test_an_experiment_may_be_played_without_its_opponent() -> None:
    """Its regularizer was not typed: it stands there for the game."""
    words = ["experiment=alpha_spin", "loss=sft"]
    found, spin = composed(*words, given=words), composed("experiment=spin", "loss=sft")
    assert found == spin and found.regularizer is None


def test_a_game_needs_an_opponent() -> None:
    config.register()
    overrides.register_help(CONF)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        whole = compose("config", [])
    with pytest.raises(ConfigError, match="needs an opponent"):
        config.load(OmegaConf.merge(whole, {"regularizer": None}))


@pytest.mark.parametrize("words", [["--help"], ["train", "regularizer.alfa=1"], ["train", "--cfg", "job"], ["plan"]])
def test_what_needs_no_model_imports_no_torch(words: list[str], tmp_path: Path) -> None:
    code = (
        "import sys\nfrom spin_reg import cli\n"
        f"sys.argv = ['spin-reg', *{words!r}]\n"
        "try:\n    cli.main()\nexcept SystemExit: pass\n"
        "assert not {'torch', 'transformers', 'wandb'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_cfg_job_prints_the_composed_settings_and_nothing_is_made(command: Command, tmp_path: Path) -> None:
    result = command("train", "--cfg", "job", "alpha=0.25", f"outputs={tmp_path / 'o'}")
    assert result.code == 0 and "alpha: 0.25" in result.out
    assert list(tmp_path.iterdir()) == []


def test_unknown_verbs_and_no_words(command: Command) -> None:
    assert command().code == 0
    result = command("trian")
    assert result.code == 2 and "spin-reg train" in result.err


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("spin-reg tr", "train"),
        ("spin-reg train regularizer=", "regularizer=kl"),
        ("spin-reg train regularizer=kl schedule.be", "schedule.beta="),
        ("spin-reg plan dataset=js", "dataset=jsonl"),
    ],
)
def test_completion_offers_verbs_groups_and_keys(line: str, offered: str, tmp_path: Path) -> None:
    """A shell asks through COMP_LINE; the verb must not stand in the way of the composed keys."""
    script = "import sys\nfrom spin_reg import cli\nsys.argv = ['spin-reg', '-sc', 'query=bash']\ncli.main()"
    env = os.environ | {"COMP_LINE": line, "COMP_POINT": str(len(line))}
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, env=env)
    assert offered in done.stdout.split(), done.stderr


def test_golden_experiments() -> None:
    """The identity of every experiment stands in a file, so that an edit of a YAML shows what it changes."""
    golden = json.loads((ROOT / "tests" / "golden_experiments.json").read_text())
    names = sorted(p.stem for p in (CONF / "experiment").glob("*.yaml"))
    assert sorted(golden) == sorted(["default", *names])
    for name, expected in golden.items():
        words = [] if name == "default" else [f"experiment={name}"]
        assert config.identity_settings(composed(*words)) == expected, f"{name}: see CONTRIBUTING.md on golden files"


def test_a_reader_that_goes_away_is_no_failure_of_ours(tmp_path: Path) -> None:
    line = f"{sys.executable} -m spin_reg plan schedule.iterations=9 regularizer=fictitious_play | head -1"
    done = subprocess.run(line, shell=True, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.startswith("run ") and done.stderr == ""


def test_a_run_goes_on_when_nobody_reads_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    from spin_reg.console import Screen

    class Gone:
        def write(self, text: str) -> int:
            raise BrokenPipeError

        def flush(self) -> None:
            raise BrokenPipeError

        def isatty(self) -> bool:
            return False

    monkeypatch.setattr(sys, "stderr", Gone())
    screen = Screen()
    for _ in range(2):
        screen._line("one more")
    assert screen.console.quiet


OWN_EXPERIMENT = """\
# @package _global_
defaults:
  - override /model: pretrained
  - override /regularizer: kl
model: {name_or_path: x}
alpha: 0.3
seed: 7
"""


def test_an_experiment_may_set_any_key_and_the_command_line_still_wins(tmp_path: Path) -> None:
    shutil.copytree(CONF, tmp_path / "conf")
    (tmp_path / "conf/experiment/own.yaml").write_text(OWN_EXPERIMENT)
    config.register()
    with initialize_config_dir(str(tmp_path / "conf"), version_base="1.3"):
        found = config.load(compose("config", ["experiment=own"]))
        assert (found.seed, found.alpha) == (7, 0.3) and config.run_name(found).startswith("x-toy-kl-alpha0.3-seed7-")
        assert found.schedule.optimizer == "rmsprop"  # the model's own schedule, of the model that the experiment chose
        found = config.load(compose("config", ["experiment=own", "seed=1", "alpha=0.1"]))
    assert (found.seed, found.alpha) == (1, 0.1)


def test_a_plan_for_programs_says_what_the_one_for_people_says(command: Command, tmp_path: Path) -> None:
    words = ["tracker=none", "schedule.iterations=1", f"outputs={tmp_path}", "run_name=run"]
    shown, said = command("plan", *words), command("plan", "--json", *words)
    assert (shown.code, said.code) == (0, 0), said.err
    (found,) = [json.loads(line) for line in said.out.splitlines()]
    assert found["run"] == str(tmp_path / "run") and not found["finished"] and not (tmp_path / "run").exists()
    for stage in found["stages"]:
        tokens = f"{estimate.count(stage['tokens'])} tokens +" if stage["tokens"] else ""
        costs = f"{tokens}{human(stage['disk'])}"
        line = rf"^  {stage['status']} +{stage['name']} +{costs}  {re.escape(stage['reason'])}$"
        assert re.search(line, shown.out, flags=re.M), (line, shown.out)
    assert len(found["stages"]) == shown.out.count("  todo ") and found["tokens"]["drawn"] > 0
    assert found["disk"]["peak"] > 0 and found["time"]["seconds"] == 0
