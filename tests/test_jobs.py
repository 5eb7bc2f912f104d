"""A stage goes into a file and comes back as exactly what it was, and so does an error. No torch."""

import json
from dataclasses import dataclass
from typing import Any, get_args

import pytest
from conftest import ROOT
from hydra import compose, initialize_config_dir

from spin_reg import config, errors, jobs, launched, overrides, processes, specs, worker
from spin_reg.fingerprint import digest, identity
from spin_reg.jobs import Job, read, written
from spin_reg.plan import Sources, plan
from spin_reg.settings import Hardware

PLANS: list[tuple[str, ...]] = [
    (),
    (
        "regularizer=fictitious_play",
        "evaluation=full",
        "evaluation.exact_match.regex='#### (.*)'",
        "hardware.threads=2",
    ),
    ("regularizer=kl", "regularizer.history=2", "regularizer.pairs=reuse", "alpha=0.25", "loss=hinge"),
    (
        "model=pretrained",
        "model.name_or_path=m",
        "dataset=jsonl",
        "dataset.path=x.jsonl",
        "dataset.generated=published",
    ),
    (
        *("model=pretrained", "model.name_or_path=m", "model.lora.rank=4", "model.lora.target_modules=[q_proj,v_proj]"),
        *("model.template_kwargs={enable_thinking:false,depth:{a:[1,2.5,null]}}", "hardware.precision=bf16"),
        *("dataset=mixture", "dataset.parts=[{path:a.jsonl,weight:2},{path:b/c}]", "model.sft.epochs=1"),
    ),
    (
        *("loss=sft", "evaluation=mt_bench", "evaluation.judge.model=m", "evaluation.judge.base_url=http://here/v1"),
        *("evaluation.mt_bench.temperatures={writing:0.5}", "evaluation.benchmarks=[{task:a,num_fewshot:2}]"),
        "evaluation.judge.body={seed:1,stop:[x]}",
    ),
]


def stages(words: tuple[str, ...]) -> list[Any]:
    config.register()
    overrides.register_help(ROOT / "conf")
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        settings = config.load(compose("config", ["tracker=none", *words]))
    return plan(settings, Sources(model="m", tokenizer="t", data="d"))


@pytest.fixture(scope="module")
def planned() -> list[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config, "find_spec", lambda name: object())  # whichever optional packages are installed
        return [stage for words in PLANS for stage in stages(words)]


def test_every_kind_of_stage_comes_back_as_it_was(planned: list[Any]) -> None:
    assert {stage.kind for stage in planned} == {spec.kind for spec in get_args(specs.Spec)}
    for stage in planned:
        text = json.dumps(written(stage.spec), allow_nan=False)
        again = read(specs.Spec, json.loads(text))
        assert again == stage.spec and type(again) is type(stage.spec)
        assert repr(again) == repr(stage.spec)  # tuples are tuples again, enums enums, floats floats
        assert digest(identity(again)) == digest(identity(stage.spec))
        job = Job(stage.name, stage.spec, {"data": "/x"}, "/out", threads=3, processes=2)
        assert read(Job, json.loads(json.dumps(written(job)))) == job


@dataclass
class Stranger:
    k: int


@pytest.mark.parametrize(
    ("hint", "value"),
    [
        (specs.Spec, {"is": "Stranger", "k": 1}),
        (Job, {"is": "Stranger", "k": 1}),
        (int, "1"),
        (int, True),
        (int | None, "x"),
        (tuple[int, ...], ["x"]),
        (specs.Split, "nowhere"),
    ],
)
def test_what_is_of_another_type_is_refused(hint: Any, value: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        read(hint, value)


@pytest.mark.parametrize("value", [{1: 2}, Stranger, object(), {"a": {1, 2}}])
def test_what_would_not_come_back_is_not_written(value: Any) -> None:
    with pytest.raises(TypeError):
        jobs.written(value)


def test_a_launcher_that_starts_fewer_processes_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(errors.SpinRegError, match="has started 1"):
        worker.together(2)


def test_errors_of_every_kind_come_back_as_they_were() -> None:
    for kind in (errors.SpinRegError, *errors.SpinRegError.__subclasses__()):
        error = kind("a", where="b", why="c", todo="d")
        found = errors.heard(errors.told(error))
        assert type(found) is kind and str(found) == str(error)


def test_settings_that_speak_of_other_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launched._here, "world", 4)
    for settings in (Hardware(processes=3), Hardware(isolate=True)):
        with pytest.raises(errors.ConfigError, match="a launcher has started 4"):
            processes.check(settings)
    processes.check(Hardware(processes=4))
    processes.check(Hardware())
