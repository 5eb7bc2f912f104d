"""What makes two runs, or two stages, the same: every setting is declared, and behaves as declared. No torch."""

import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, get_args

import pytest
from conftest import ROOT
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from spin_reg import config, overrides, sources, specs
from spin_reg.config import Config
from spin_reg.corpora import Jsonl
from spin_reg.fingerprint import digest, identity, plain
from spin_reg.plan import Sources, Stage, plan
from spin_reg.settings import Pretrained
from spin_reg.stage import PLACES

RESULT = "another value is another run: its name changes, and a stage"
RUNTIME = "how or where, never what: neither changes"
NAME = "replaces the run's name, and no stage"
PLACE = "where something lies: the name, and no stage, since what lies there has a hash"
LENGTH = "a longer run keeps its name and every stage of the shorter one"
JUDGED = "what is reported of iterates: no name and no stage but those that judge, and what they read of held-out rows"
ASKED = "evaluation.benchmarks=[{task:a}]"
MATCHED = "evaluation=exact_match"
JUDGE = "evaluation=mt_bench evaluation.judge.model=m evaluation.judge.base_url=http://here/v1"
PRICES = "evaluation.judge.price_in=1 evaluation.judge.price_out=1"
GROUP = "its keys stand for it"


class Row(NamedTuple):
    key: str
    effect: str
    value: str = ""  # another than the default
    given: str = ""  # what the key needs beside it, to be allowed or to matter
    only: str = ""  # the one option of the group that takes another value; else every option with this key is tried


TABLE = [
    Row("alpha", RESULT, "0.25"),  # a shorthand for regularizer.alpha
    Row("dataset", RESULT, "jsonl", given="dataset.path=x.jsonl"),
    Row("dataset.fold_system", RESULT, "true"),
    Row("dataset.generated", RESULT, "published"),
    Row("dataset.heldout_share", RESULT, "0.2"),
    Row("dataset.max_dropped", RESULT, "0.2"),
    Row("dataset.max_prompt_tokens", RESULT, "17"),
    Row("dataset.max_response_tokens", RESULT, "33"),
    Row("dataset.num_heldout", RESULT, "9"),
    Row("dataset.num_prompts", RESULT, "9"),
    Row("dataset.parts", RESULT, "[{path: other.jsonl}]"),
    Row("dataset.path", PLACE, "other.jsonl"),
    Row("dataset.revision", RESULT, "main"),
    Row("dataset.seed", RESULT, "1"),
    Row("dataset.smoothing", RESULT, "0.01"),
    Row("dataset.split", RESULT, "test"),
    Row("dataset.subset", RESULT, "main"),
    Row("dataset.system_prompt", RESULT, "short"),
    Row("dataset.turns", RESULT, "first"),
    Row("dataset.unique", RESULT, "prompt"),
    Row("evaluation", JUDGED, "none"),
    Row("evaluation.apply_chat_template", JUDGED, "true", given=ASKED),
    Row("evaluation.benchmark_batch_size", RUNTIME, "3", given=ASKED),
    Row("evaluation.benchmarks", JUDGED, "[{task: a, num_fewshot: 5}]"),
    Row("evaluation.crossplay", JUDGED, "true"),
    Row("evaluation.enabled", JUDGED, "false"),
    Row("evaluation.exact_match", GROUP),
    Row("evaluation.exact_match.max_new_tokens", JUDGED, "9", given=MATCHED),
    Row("evaluation.exact_match.normalise", JUDGED, "false", given=MATCHED),
    Row("evaluation.exact_match.real_regex", JUDGED, "x(y)", given=MATCHED),
    Row("evaluation.exact_match.regex", JUDGED, "x(y)"),
    Row("evaluation.exact_match.temperature", JUDGED, "0.5", given=MATCHED),
    Row("evaluation.full_kl", JUDGED, "true"),
    Row("evaluation.full_kl_prompts", JUDGED, "9", given="evaluation.full_kl=true"),
    Row("evaluation.include_path", RUNTIME, "mine", given=ASKED),  # what its tasks hold counts: Sources.tasks
    Row("evaluation.judge", GROUP),
    Row("evaluation.judge.base_url", RUNTIME, "http://elsewhere/v1", given=JUDGE),
    Row("evaluation.judge.body", JUDGED, "{seed: 1}", given=JUDGE),
    Row("evaluation.judge.concurrency", RUNTIME, "3", given=JUDGE),
    Row("evaluation.judge.key_variable", RUNTIME, "OTHER_KEY", given=JUDGE),
    Row("evaluation.judge.max_calls", RUNTIME, "3", given=JUDGE),
    Row("evaluation.judge.max_cost", RUNTIME, "3", given=f"{JUDGE} {PRICES}"),
    Row("evaluation.judge.max_tokens", JUDGED, "3", given=JUDGE),
    Row("evaluation.judge.model", JUDGED, "n", given=JUDGE),
    Row("evaluation.judge.modes", JUDGED, "[single]", given=JUDGE),
    Row("evaluation.judge.price_in", RUNTIME, "3", given=JUDGE),
    Row("evaluation.judge.price_out", RUNTIME, "3", given=JUDGE),
    Row("evaluation.judge.prompts", RUNTIME, "p.yaml", given=JUDGE),  # what it says counts: Sources.mt_bench
    Row("evaluation.judge.repeats", JUDGED, "3", given=JUDGE),
    Row("evaluation.judge.retries", RUNTIME, "3", given=JUDGE),
    Row("evaluation.judge.temperature", JUDGED, "0.5", given=JUDGE),
    Row("evaluation.judge.timeout", RUNTIME, "3", given=JUDGE),
    Row("evaluation.limit", JUDGED, "9", given=ASKED),
    Row("evaluation.mt_bench", GROUP),
    Row("evaluation.mt_bench.limit", JUDGED, "3", given=JUDGE),
    Row("evaluation.mt_bench.max_new_tokens", JUDGED, "9", given=JUDGE),
    Row("evaluation.mt_bench.questions", RUNTIME, "other.jsonl", given=JUDGE),  # what they are counts, as of references
    Row("evaluation.mt_bench.references", RUNTIME, "r.jsonl", given=JUDGE),
    Row("evaluation.mt_bench.revision", RUNTIME, "main", given=JUDGE),
    Row("evaluation.mt_bench.split", RUNTIME, "test", given=JUDGE),
    Row("evaluation.mt_bench.subset", RUNTIME, "main", given=JUDGE),
    Row("evaluation.mt_bench.temperature", JUDGED, "0.5", given=JUDGE),
    Row("evaluation.mt_bench.temperatures", JUDGED, "{math: 0.5, other: 0.0}", given=JUDGE),
    Row("evaluation.num_samples", JUDGED, "3"),
    Row("generation", GROUP),
    Row("generation.backend", RESULT, "vllm"),
    Row("generation.batch_size", RUNTIME, "3"),
    Row("generation.max_new_tokens", RESULT, "9"),
    Row("generation.python", RUNTIME, "elsewhere", given="generation.backend=vllm"),
    Row("generation.temperature", RESULT, "0.9"),
    Row("generation.top_p", RESULT, "0.9"),
    Row("hardware", GROUP),
    Row("hardware.batch_tokens", RUNTIME, "300"),
    Row("hardware.deterministic", RUNTIME, "false"),
    Row("hardware.gradient_checkpointing", RUNTIME, "true"),
    Row("hardware.isolate", RUNTIME, "true"),
    Row("hardware.micro_batch_size", RUNTIME, "3"),  # but see the layout of bf16 in test_pipeline.py
    Row("hardware.precision", RESULT, "bf16"),
    Row("hardware.processes", RUNTIME, "2"),
    Row("hardware.score_batch_size", RUNTIME, "3"),
    Row("hardware.shard_size", RUNTIME, "3"),
    Row("hardware.sharding", RUNTIME, "full", given="hardware.processes=2"),
    Row("hardware.threads", RUNTIME, "1"),
    Row("keep_iterates", RUNTIME, "last"),
    Row("loss", RESULT, "ipo"),
    Row("loss.length_norm", RESULT, "mean", given="regularizer=none"),
    Row("loss.name", RESULT, "hinge"),
    Row("model", RESULT, "pretrained", given="model.name_or_path=m"),
    Row("model.chat_template", PLACE, "t.jinja"),
    Row("model.attn_implementation", RESULT, "eager"),
    Row("model.dtype", RESULT, "bfloat16"),
    Row("model.gguf_file", RESULT, "m.gguf"),
    Row("model.hidden_size", RESULT, "64"),
    Row("model.init_seed", RESULT, "1"),
    Row("model.lora", GROUP),
    Row("model.lora.alpha", RESULT, "3", given="model.lora.rank=4"),
    Row("model.lora.quantize", RESULT, "nf4", given="model.lora.rank=4"),
    Row("model.lora.rank", RESULT, "4"),
    Row("model.lora.target_modules", RESULT, "[q_proj]", given="model.lora.rank=4"),
    Row("model.name_or_path", PLACE, "n"),
    Row("model.num_heads", RESULT, "2"),
    Row("model.num_layers", RESULT, "2"),
    Row("model.revision", RESULT, "main"),
    Row("model.template_kwargs", RESULT, "{enable_thinking: false}"),
    Row("model.trust_remote_code", RESULT, "true", given=f"model.revision={'a' * 40} model.name_or_path=a/b"),
    Row("model.sft", GROUP),
    Row("model.sft.batch_size", RESULT, "3"),
    Row("model.sft.epochs", RESULT, "3"),
    Row("model.sft.learning_rate", RESULT, "0.1"),
    Row("objective", RUNTIME, "eval/kl_data"),
    Row("outputs", RUNTIME, "elsewhere"),
    Row("regularizer", RESULT, "none"),
    Row("regularizer.alpha", RESULT, "0.25"),
    Row("regularizer.history", RESULT, "3"),
    Row("regularizer.pairs", RESULT, "union"),
    Row("regularizer.reference", RESULT, "generator"),
    Row("run_name", NAME, "mine"),
    Row("schedule", RESULT, "pretrained"),
    Row("schedule.batch_size", RESULT, "3"),
    Row("schedule.beta", RESULT, "0.3"),
    Row("schedule.epochs", RESULT, "3"),
    Row("schedule.iterations", LENGTH, "5"),
    Row("schedule.learning_rate", RESULT, "0.1"),
    Row("schedule.lr_scheduler", RESULT, "cosine"),
    Row("schedule.max_grad_norm", RESULT, "0.5"),
    Row("schedule.optimizer", RESULT, "rmsprop"),
    Row("schedule.save_every", RUNTIME, "3"),
    Row("schedule.stop_when", RUNTIME, "{metric: eval/heldout_nll, worse: 2}"),  # as iterations, how far, never what
    Row("schedule.warmup_ratio", RESULT, "0.2"),
    Row("schedule.weight_decay", RESULT, "0.2"),
    Row("seed", RESULT, "1"),
    Row("tracker", RUNTIME, "none"),
    Row("tracker.entity", RUNTIME, "us"),
    Row("tracker.group", RUNTIME, "sweep"),
    Row("tracker.log_model", RUNTIME, "true"),
    Row("tracker.patience", RUNTIME, "3"),
    Row("tracker.name", RUNTIME, "tensorboard", only="base"),
    Row("tracker.project", RUNTIME, "mine"),
]

CHOSEN = {  # what an option needs to be composed, or for all its keys to matter
    "model=pretrained": ("model=pretrained", "model.name_or_path=m", "model.sft.epochs=1"),
    "dataset=jsonl": ("dataset=jsonl", "dataset.path=x.jsonl"),
    "dataset=hub": ("dataset=hub", "dataset.path=a/b"),
    "dataset=mixture": ("dataset=mixture", "dataset.parts=[{path:a.jsonl,weight:2},{path:b.jsonl}]"),
    "regularizer=kl": ("regularizer=kl", "regularizer.history=2"),
    "tracker=base": ("tracker=none",),
}
KNOWN = Sources(model="m", tokenizer="t", data="d")


@cache
def composed(words: tuple[str, ...]) -> DictConfig:
    config.register()
    overrides.register_help(ROOT / "conf")
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("config", ["schedule.iterations=4", *words])


@cache
def loaded(words: tuple[str, ...], *more: str) -> Config:
    """Settings from `words`, and `more` of them that choose no option (those need no composing, which is slow)."""
    return config.load(OmegaConf.merge(composed(words), OmegaConf.from_dotlist(list(more))))


def prints(settings: Config, known: Sources = KNOWN) -> dict[str, str]:
    return {stage.name: stage.fingerprint for stage in plan(settings, known)}


def has(kind: type, path: list[str]) -> bool:
    found = [f for f in fields(kind) if f.name == path[0]]
    if not found or len(path) == 1:
        return bool(found)
    return isinstance(found[0].type, type) and is_dataclass(found[0].type) and has(found[0].type, path[1:])


def cases() -> Iterator[tuple[Row, str]]:
    """Every row with every option of its group that has the key."""
    for row in TABLE:
        group, *path = row.key.split(".")
        if row.effect != GROUP:
            options = config.GROUPS[group] if path else {"": object}
            fitting = [name for name, kind in options.items() if not path or has(kind, path)]
            yield from ((row, f"{group}={name}" if path else "") for name in fitting if row.only in ("", name))


def test_every_key_is_declared_once_and_every_declared_key_is_one() -> None:
    declared = [row.key for row in TABLE]
    assert {row.key for row in TABLE if row.effect == PLACE} == PLACES.keys()
    assert sorted(declared) == sorted(set(declared))
    assert sorted(declared) == config.all_keys()
    groups = {row.key for row in TABLE if row.effect == GROUP}
    assert {row.key for row, _ in cases()} == set(declared) - groups
    assert all(any(key.startswith(f"{group}.") for key in declared) for group in groups)


@pytest.fixture(autouse=True)
def every_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a key changes is asked here, whichever optional packages are installed."""
    monkeypatch.setattr(config, "find_spec", lambda name: object())


@pytest.mark.parametrize(("row", "option"), list(cases()), ids=[f"{o} {r.key}".strip() for r, o in cases()])
def test_every_key_does_what_it_is_declared_to_do(row: Row, option: str) -> None:
    given = tuple(row.given.split())
    if row.key in config.GROUPS:  # another option of the group
        before, after = loaded(()), loaded((f"{row.key}={row.value}", *given))
    else:
        place = (ROOT / "conf" / option.replace("=", "/")).with_suffix(".yaml")
        words = CHOSEN.get(option, (option,) if option and place.exists() else ()) + given
        before, after = loaded(words), loaded(words, f"{row.key}={row.value}")
    assert plain(before) != plain(after), "the row gives the value that stands there already"
    names = config.run_name(before), config.run_name(after)
    old, new = prints(before), prints(after)
    if row.effect == RESULT:
        assert names[0] != names[1] and set(new.values()) - set(old.values())
    elif row.effect == PLACE:
        assert names[0] != names[1] and old == new and row.key in PLACES
    elif row.effect == NAME:
        assert names[1] == row.value and old == new
    else:
        assert names[0] == names[1]
        if row.effect == RUNTIME:
            assert old == new
        if row.effect == LENGTH:
            assert old != new and old.items() <= new.items()
        if row.effect == JUDGED:
            assert old != new
            changed = {name for name in new if name in old and new[name] != old[name]}
            judged = {name for name in new if re.search("/evaluate$|/benchmarks/|mt_bench/", name)}
            assert changed <= judged
            read = ("/scores/heldout", "/answers/heldout-", "/divergence/")
            assert all(any(part in name for part in read) or name in judged for name in new.keys() - old.keys())


def test_alpha_is_a_shorthand() -> None:
    short, long = loaded((), "alpha=0.25"), loaded((), "regularizer.alpha=0.25")
    assert config.run_name(short) == config.run_name(long) and prints(short) == prints(long)


def own(stage: Stage) -> str:
    """What a stage says of itself, without what it needs."""
    return digest([stage.spec.kind, stage.spec.version, identity(stage.spec)])


@pytest.mark.parametrize(
    ("word", "kinds"),
    [
        ("dataset.max_prompt_tokens=17", {"prepare"}),
        ("dataset.max_response_tokens=33", {"prepare", "generate"}),  # the default of generation.max_new_tokens
        ("generation.max_new_tokens=9", {"generate"}),
        ("generation.temperature=0.9", {"generate", "evaluate"}),  # other cross-play entries have their tables anyway
        ("model.dtype=bfloat16", {"sft", "generate", "score", "train"}),
        ("model.attn_implementation=eager", {"sft", "generate", "score", "train"}),
        ("hardware.precision=bf16", {"sft", "generate", "score", "train"}),
        ("dataset.seed=1", {"prepare"}),
        ("seed=1", {"sft", "generate", "train"}),
        ("schedule.beta=0.3", {"train", "evaluate"}),
        ("loss.name=hinge", {"train"}),
        ("alpha=0.25", {"pairs", "train", "evaluate"}),
    ],
)
def test_a_setting_is_part_of_the_stages_it_acts_in(word: str, kinds: set[str]) -> None:
    stages = {stage.name: stage for stage in plan(loaded(()), KNOWN)}
    both = [stage for stage in plan(loaded((), word), KNOWN) if stage.name in stages]
    assert {stage.kind for stage in both if own(stage) != own(stages[stage.name])} == kinds


@pytest.mark.parametrize("spec", get_args(specs.Spec), ids=lambda spec: spec.kind)
@pytest.mark.parametrize("model", [(), ("model=pretrained", "model.name_or_path=m")], ids=["tiny", "pretrained"])
def test_a_new_version_remakes_the_stages_of_its_kind_and_what_comes_after(
    spec: Any, model: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    published = ("dataset=jsonl", "dataset.path=x.jsonl", "dataset.generated=published")
    asked = (ASKED, "evaluation.full_kl=true", *JUDGE.split())
    settings = loaded((*model, *(published if spec.kind == "published" else ()), *asked))
    stages, old = plan(settings, KNOWN), prints(settings)
    touched: set[str] = set()
    for stage in stages:  # in the order in which they are made
        if stage.kind == spec.kind or touched & {need.name for need in stage.needs.values()}:
            touched.add(stage.name)
    monkeypatch.setattr(spec, "version", spec.version + 1)
    new = prints(settings)
    assert {name for name in new if new[name] != old[name]} == touched
    assert bool(touched) == (spec.kind != ("base" if not model else "sft"))


FILES = {  # of a model's folder, and the first stages that a changed byte makes anew
    "tokenizer.json": {"data", "iterate-00/base"},
    "tokenizer_config.json": {"data", "iterate-00/base"},
    "tokenizer.model": {"data", "iterate-00/base"},
    "sentencepiece.bpe.model": {"data", "iterate-00/base"},
    "tekken.json": {"data", "iterate-00/base"},
    "special_tokens_map.json": {"data", "iterate-00/base"},
    "added_tokens.json": {"data", "iterate-00/base"},
    "vocab.json": {"data", "iterate-00/base"},
    "merges.txt": {"data", "iterate-00/base"},
    "chat_template.jinja": {"data", "iterate-00/base"},
    "chat_template.json": {"data", "iterate-00/base"},
    "generation_config.json": {"data", "iterate-00/base"},
    "config.json": {"data", "iterate-00/base"},
    "model.safetensors": {"iterate-00/base"},
    "model-00001-of-00002.safetensors": {"iterate-00/base"},
    "model.safetensors.index.json": {"iterate-00/base"},
    "README.md": set(),
    "pytorch_model.bin": set(),
}


def roots(folder: Path, data: Path) -> tuple[dict[str, str], dict[str, str]]:
    """All fingerprints of a plan over a model's folder and a data file, and those of its stages that need no other."""
    words = ("model=pretrained", "model.name_or_path=m", "dataset=jsonl", "dataset.path=x.jsonl")
    model, dataset = Pretrained(name_or_path=str(folder)), Jsonl(path=str(data))
    hashes = sources.model_sha256(model), sources.tokenizer_sha256(model), sources.data_sha256(dataset)
    stages = plan(loaded(words), Sources(*hashes))
    return {s.name: s.fingerprint for s in stages}, {s.name: s.fingerprint for s in stages if not s.needs}


@pytest.mark.parametrize("name", [*FILES, "data file"])
def test_one_changed_byte_of_a_file_is_another_stage(name: str, tmp_path: Path) -> None:
    folder, data = tmp_path / "base", tmp_path / "x.jsonl"
    folder.mkdir()
    for file in (*(folder / name for name in FILES), data):
        file.write_bytes(b'{"weight_map": {"a": "1.safetensors"}}')  # each passes for what it is named
    before, first = roots(folder, data)
    assert set(first) == {"data", "iterate-00/base"}
    path = data if name == "data file" else folder / name
    path.write_bytes(b'{"weight_map": {"a": "2.safetensors"}}')
    after, second = roots(folder, data)
    expected = {"data"} if name == "data file" else FILES[name]
    assert {stage for stage in first if first[stage] != second[stage]} == expected
    last = "iteration-03/train"
    assert (before[last] != after[last]) == bool(expected)


def test_a_file_added_to_a_models_folder_or_renamed_is_another_model(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / name).write_bytes(b"{}")
    model = Pretrained(name_or_path=str(tmp_path))
    seen = {(sources.model_sha256(model), sources.tokenizer_sha256(model))}
    (tmp_path / "chat_template.jinja").write_bytes(b"x")
    seen.add((sources.model_sha256(model), sources.tokenizer_sha256(model)))
    (tmp_path / "chat_template.jinja").rename(tmp_path / "chat_template.json")
    seen.add((sources.model_sha256(model), sources.tokenizer_sha256(model)))
    assert len({weights for weights, _ in seen}) == len({tokenizer for _, tokenizer in seen}) == 3
