"""What `plan` says a run may take, against brute force; and the presets that people begin with."""

import json
import os
import random
import re
import runpy
import statistics
from functools import partial
from pathlib import Path

import pytest
from conftest import ROOT, Command
from hydra import compose, initialize_config_dir
from transformers import LlamaConfig, LlamaForCausalLM

from spin_reg import (
    amounts,
    config,
    estimate,
    launch,
    launched,
    models,
    overrides,
    processes,
    remedies,
    sizes,
    space,
    tables,
)
from spin_reg.plan import Sources, plan
from spin_reg.schedules import at
from spin_reg.settings import Pretrained, Tiny
from spin_reg.specs import Split
from spin_reg.stage import Stage

PRESETS = ("spin", "alpha_spin", "fictitious_play", "mixture_of_two", "small_lora")
ROWS = {Split.train: 100, Split.heldout: 10}
OWN = ["model=pretrained", "model.name_or_path=m", "dataset=jsonl", "dataset.path=x.jsonl", "evaluation=none"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tokenizer = models.byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=4096,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def loaded(*words: str) -> config.Config:
    config.register()
    overrides.register_help(ROOT / "conf")
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return config.load(compose("config", list(words)))


def work(*words: str) -> estimate.Work:
    """Of a run on 100 prompts and 10 held-out ones, 7 + 5 tokens at most, three iterations."""
    limits = ["dataset.max_prompt_tokens=7", "dataset.max_response_tokens=5", "schedule.epochs=1"]
    settings = loaded(*OWN, *limits, *words)
    have = amounts.limits(settings.dataset, ROWS)
    return estimate.work(plan(settings, Sources(model="m", tokenizer="t", data="d")), have)


def test_tokens_of_plain_spin() -> None:
    """N answers an iteration, scored as they are drawn; the real ones by the same iterate; N pairs trained on, each
    prompt read once. At another temperature an iterate's own answers are scored too, beside the real ones.
    """
    trained = 3 * 100 * (7 + 2 * 5)
    found = work("regularizer=none")
    assert found == estimate.Work(drawn=3 * 100 * 5, scored=3 * 100 * 12, trained=trained, pairs=300)
    found = work("regularizer=none", "generation.temperature=0.9")
    assert found == estimate.Work(drawn=3 * 100 * 5, scored=3 * 100 * (7 + 2 * 5), trained=trained, pairs=300)


def test_tokens_without_an_opponent() -> None:
    """Every prompt is read once with its real answer; nothing is drawn or scored, and there are no pairs."""
    found = work("loss=sft")
    assert found == estimate.Work(drawn=0, scored=0, trained=3 * 100 * 12, pairs=0)
    assert "pairs" not in found.words() and "(300 pairs)" in work("regularizer=none").words()


def test_tokens_of_fictitious_play() -> None:
    """N answers and N (t + 2) log-probs at iteration t: the window's t + 1 iterates' of N answers, and the newest's of
    the N real ones; N of them come with the answers. A draw's answers are counted as equal shares.
    """
    found = work("regularizer=fictitious_play")
    assert found.drawn == pytest.approx(3 * 100 * 5, rel=0.01)
    shared = 7 * 100 * (1 / 2 + 2 / 3)  # the newest reads a prompt once, with its real and an older answer
    assert found.scored == pytest.approx(12 * 100 * sum(t + 1 for t in range(3)) - shared, rel=0.01)
    assert (found.pairs, found.trained) == (300, 3 * 100 * (7 + 2 * 5))


def test_tokens_of_fictitious_play_that_reuses() -> None:
    """N/(t + 1) answers and 3N - N/(t + 1) log-probs at iteration t, of which N/(t + 1) come with the answers. The
    newest reads the prompts of the answers that stay once, with the real ones.
    """
    found = work("regularizer=fictitious_play", "regularizer.pairs=reuse")
    assert found.drawn == pytest.approx(5 * sum(100 / (t + 1) for t in range(3)), rel=0.01)
    read = sum(12 * (300 - 200 / (t + 1)) - 7 * 100 * (1 - 1 / (t + 1)) for t in range(3))
    assert found.scored == pytest.approx(read, rel=0.01)
    assert found.pairs == 300


def test_union_trains_on_every_iterates_answers() -> None:
    assert work("regularizer=mixture_of_two", "regularizer.pairs=union").pairs == 100 + 200 + 200


def test_widths_are_those_of_the_model(base: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(base)
    found = sizes.shape(Pretrained(name_or_path=str(base)))
    layer = model.model.layers[0]
    assert found == sizes.Shape(
        layers=len(model.model.layers),
        hidden=model.lm_head.in_features,
        inner=layer.mlp.up_proj.out_features,
        cached=layer.self_attn.k_proj.out_features,
        vocabulary=model.lm_head.out_features,
    )
    tiny = models.start(Tiny()).model
    assert sizes.shape(Tiny()) == sizes.Shape(
        4, 128, tiny.model.layers[0].mlp.up_proj.out_features, 128, tiny.lm_head.out_features
    )


def memory(base: Path, *words: str) -> int:
    """Bytes of the heaviest training stage over this model."""
    settings = loaded("model=pretrained", f"model.name_or_path={base}", "dataset=jsonl", "dataset.path=x.jsonl", *words)
    stages = plan(settings, Sources(model="m", tokenizer="t", data="d"))
    return estimate.memory(stages, settings.model).by_kind["train"].total


@pytest.mark.slow
def test_adapters_and_small_batches_take_less_memory(base: Path) -> None:
    many = "hardware.batch_tokens=8192"
    less = ("hardware.micro_batch_size=1", "hardware.gradient_checkpointing=true", "model.lora.rank=1")
    assert all(memory(base, many, word) < memory(base, many) for word in less) and memory(base) < memory(base, many)


CHECKPOINTED = "hardware.gradient_checkpointing=true"
TIGHT = {  # what is heaviest, and then helped by what
    "gradient_checkpointing": ("hardware.batch_tokens=8192", "generation.batch_size=4"),
    "batch_tokens": ("hardware.batch_tokens=8192", "generation.batch_size=4", CHECKPOINTED),
    "batch_size": ("hardware.batch_tokens=512", "generation.batch_size=512", CHECKPOINTED),
}


@pytest.mark.parametrize("name", TIGHT)
def test_the_setting_that_is_named_makes_the_estimate_fit(name: str, base: Path) -> None:
    """Under a made-up limit just below what the run takes; with what was named, the whole plan fits it."""

    def planned(*words: str) -> tuple[list[Stage], Pretrained]:
        own = ["model=pretrained", f"model.name_or_path={base}", "dataset=jsonl", "dataset.path=x.jsonl"]
        settings = loaded(*own, *TIGHT[name], "evaluation=none", *words)
        assert isinstance(settings.model, Pretrained)
        return plan(settings, Sources(model="m", tokenizer="t", data="d")), settings.model

    before = estimate.memory(*planned())
    room = before.most - 1
    said = remedies.helps(*planned(), room)
    assert said is not None and name in said
    after = estimate.memory(*planned(said.split()[0]))
    assert after.most <= room and space.human(after.most) in said and space.human(before.most) in said
    assert remedies.helps(*planned(), before.most) is None  # it fits
    assert remedies.helps(*planned(), 1) is None  # nothing is enough
    text = before.words(room, said)
    assert "will not fit" in text and said in text and "will not fit" not in before.words(before.most)


@pytest.mark.slow
def test_autocast_holds_cast_weights_and_sharding_a_share_of_what_is_trained(base: Path) -> None:
    train, count = partial(held, base, "train"), sizes.parameters(Pretrained(name_or_path=str(base)))
    assert (train().parameters, train("hardware.precision=bf16").parameters) == (4 * count, 6 * count)
    assert train("schedule.optimizer=adamw").optimizer == 2 * train("schedule.optimizer=rmsprop").optimizer == 8 * count
    coarse, adapter = train("model.dtype=bfloat16"), train("model.dtype=bfloat16", "model.lora.rank=1")
    assert (coarse.parameters, coarse.gradients) == (2 * count, 2 * count)
    assert adapter.gradients == train("model.lora.rank=1").gradients > 0  # which is float32
    half = train("hardware.processes=2", "hardware.sharding=full")
    assert (half.parameters, half.gradients) == (2 * count, 2 * count) and half.activations == train().activations
    for stage, gradients in (("zero1", 4 * count), ("zero2", 2 * count)):
        some = train("hardware.processes=2", f"hardware.sharding={stage}")
        assert (some.parameters, some.gradients) == (4 * count, gradients)
        assert some.optimizer == half.optimizer + 2 * count  # with float32 weights of its own in the share


def test_under_a_launcher_its_processes_are_counted(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As training counts them, though the settings name none; only those of this machine need room on it."""
    words = ["model=pretrained", f"model.name_or_path={base}", "dataset=jsonl", "dataset.path=x.jsonl"]

    def planned(*more: str) -> tuple[list[Stage], Pretrained]:
        settings = loaded(*words, *more)
        assert isinstance(settings.model, Pretrained)
        return plan(settings, Sources(model="m", tokenizer="t", data="d")), settings.model

    alone, four = planned("hardware.sharding=full"), planned("hardware.processes=4", "hardware.sharding=full")
    said, whole = estimate.memory(*four), estimate.memory(*alone)
    assert (said.processes, said.here) == (4, 4) and "in each of 4 processes (" in said.words(said.most)
    monkeypatch.setattr(launched._here, "world", 4)
    monkeypatch.setattr(launched._here, "local_world", 2)
    found = estimate.memory(*alone)
    assert found.by_kind == said.by_kind and found.by_kind["train"].total < whole.by_kind["train"].total
    assert (found.processes, found.here) == (4, 2) and found.most == said.most // 2
    assert "in each of 4 processes, 2 of them here (" in found.words(found.most)
    assert "will not fit" in found.words(found.most - 1)
    assert [word for word, *_ in remedies._remedies(*planned())][-1] == "hardware.sharding=full"


def held(base: Path, kind: str, *words: str, rows: dict[Split, int] | None = None) -> estimate.Held:
    """What a kind of stage holds over this model."""
    settings = loaded("model=pretrained", f"model.name_or_path={base}", "dataset=jsonl", "dataset.path=x.jsonl", *words)
    stages = plan(settings, Sources(model="m", tokenizer="t", data="d"))
    return estimate.memory(stages, settings.model, rows).by_kind[kind]


@pytest.mark.slow
def test_no_row_is_counted_that_is_not_there(base: Path) -> None:
    """Of a batch of 32 answers as many as there are prompts; of a micro-batch as many pairs as a step has."""
    few = {Split.train: 8, Split.heldout: 4}
    assert held(base, "generate").cache == 4 * held(base, "generate", rows=few).cache
    assert held(base, "generate", rows=dict.fromkeys(few, 0)) == held(base, "generate")  # they are not known yet
    wide = "hardware.batch_tokens=65536"
    steps = [held(base, "train", wide, f"schedule.batch_size={size}").activations for size in (2, 4)]
    assert steps[1] == 2 * steps[0] > 0
    scored = [held(base, "score", wide, rows={Split.train: n, Split.heldout: n}).activations for n in (2, 4)]
    assert scored[1] == 2 * scored[0] > 0


def test_a_file_of_another_dtype_is_counted_while_it_is_read(base: Path) -> None:
    """All of it is mapped then; in training, what comes after takes more than that, and its place."""
    size, count = (base / "model.safetensors").stat().st_size, sizes.parameters(Pretrained(name_or_path=str(base)))
    cast = sizes.cast_from(Pretrained(name_or_path=str(base)), 2)
    assert cast == size > 4 * count and sizes.cast_from(Pretrained(name_or_path=str(base)), 4) == 0
    assert sizes.cast_from(Tiny(), 2) == 0
    assert held(base, "train", "model.dtype=bfloat16").mapped == held(base, "score").mapped == 0


def test_of_vllm_it_is_said_that_it_is_not_reckoned(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "7")
    own = ["model=pretrained", f"model.name_or_path={base}", "dataset=jsonl", "dataset.path=x.jsonl"]
    settings = loaded(*own, "generation=vllm")
    found = estimate.memory(plan(settings, Sources(model="m", tokenizer="t", data="d")), settings.model)
    assert "generate" not in found.by_kind and {"score", "train"} <= set(found.by_kind)
    said = "beside it vLLM, not reckoned: the weights, 7 GiB of cache on a CPU, its own share of a GPU"
    assert said in found.words(found.most) and said in found.words(1)
    assert "vLLM" not in estimate.memory(
        plan(loaded(*own), Sources(model="m", tokenizer="t", data="d")), settings.model
    ).words(1)


def test_kernels_of_products_are_bounded_where_nobody_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before oneDNN makes its first one, here and so in the processes that make stages."""
    one, other = processes.bound()
    monkeypatch.setenv(one, "3")
    monkeypatch.delenv(other, raising=False)
    launch.environment(loaded("hardware.threads=1"))
    assert (os.environ[one], os.environ[other]) == ("3", str(sizes.KERNELS))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_stages_hold_what_was_estimated(name: str, tmp_path: Path) -> None:
    """Each in a process of its own, on the embedded toy; 0.8 to 1.2 of what they then hold at most."""
    script = runpy.run_path(str(ROOT / "scripts/estimates.py"))
    found = script["case"]([*script["TOY"], *script["CASES"][name]], tmp_path)
    assert {one.kind for one in found} == {"sft", "generate", "score", "train"}
    assert all(0.8 < one.ratio < 1.2 for one in found), found


@pytest.mark.slow
def test_stages_read_and_leave_what_was_estimated(tmp_path: Path) -> None:
    """Fictitious play, whose iterates share the prompts: tokens counted row by row, and files, of the embedded toy are
    0.8 to 1.2 of the plan once the data are prepared, and once 16 answers are drawn; files of every single stage.
    """
    script = runpy.run_path(str(ROOT / "scripts/estimates.py"))
    found = script["game"]([*script["TOY"], *script["GAMES"]["fictitious play"]], tmp_path)
    assert len(found) == 4
    for what, kinds in found.items():
        assert {"generate", "score", "train", "all"} <= {one.kind for one in kinds}
        assert all(0.8 < one.ratio < 1.2 for one in kinds), (what, kinds)
        assert what.startswith("tokens") or all(0.8 < each < 1.2 for one in kinds for each in one.each), (what, kinds)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [8, 32])
def test_stages_of_few_rows_leave_what_was_estimated(rows: int, tmp_path: Path) -> None:
    """Footers and records are most of what they leave. Once answers are drawn: of so few rows no model learns to end
    them, so that they are three times as long as the real ones.
    """
    script = runpy.run_path(str(ROOT / "scripts/estimates.py"))
    words = [*script["TOY"], *script["GAMES"]["kl"], f"dataset.num_prompts={rows}", "dataset.num_heldout=8"]
    found = script["game"]([*words, "schedule.iterations=2"], tmp_path)["disk, iterate 0 answered"]
    assert {one.kind for one in found} == {"generate", "score", "pairs", "train", "evaluate", "all"}
    assert all(0.8 < each < 1.2 for one in found for each in one.each), found


def test_what_is_prepared_and_drawn_is_measured_off_the_ends_of_its_files(tmp_path: Path) -> None:
    rng = random.Random(0)
    rows = {split: [row(f"{split}-{i}", rng) for i in range(600 if split is Split.train else 9)] for split in DATA}
    for split, some in rows.items():
        tables.write(tmp_path / f"{split}.parquet", some, tables.EXAMPLES)
    have = amounts.measured(tmp_path, None)
    assert have is not None and have.measured and have.rows == {Split.train: 600, Split.heldout: 9}
    for split, some in rows.items():
        assert have.prompt[split] == pytest.approx(statistics.mean(len(one["prompt_ids"]) for one in some))
        assert have.real[split] == pytest.approx(statistics.mean(len(one["real_ids"]) for one in some))
    assert have.drawn == have.real[Split.train]  # nothing else is known
    answers = [{"example_id": str(i), "generated_ids": [1] * n, "generated": ""} for i, n in enumerate((1, 2, 6))]
    tables.write(tmp_path / "answers.parquet", answers, tables.ANSWERS)
    have = amounts.measured(tmp_path, (Split.heldout, tmp_path / "answers.parquet"))
    assert have is not None and have.drawn == 3
    (tmp_path / "heldout.parquet").write_bytes(b"no table")
    assert amounts.measured(tmp_path, None) is None and amounts.measured(tmp_path / "nowhere", None) is None


DATA = (Split.train, Split.heldout)


def row(name: str, rng: random.Random) -> dict[str, object]:
    prompt, real = ([rng.randrange(50) for _ in range(rng.randint(1, most))] for most in (9, 30))
    made = {"example_id": name, "prompt_ids": prompt, "real_ids": real, "data_logprob": None, "source": None}
    return made | {"prompt": str(prompt), "real": str(real)}


def test_tokens_at_measured_lengths_are_a_sum_over_rows() -> None:
    """A game without a draw: means times rows are exactly the tokens, for every kind of stage."""
    settings = loaded(*OWN, "regularizer=kl", "alpha=0.5", "generation.temperature=0.9", "schedule.epochs=2")
    have = amounts.Amounts(ROWS, {Split.train: 3.0}, {Split.train: 4.0}, drawn=2.5, measured=True)
    found = estimate.work(plan(settings, Sources(model="m", tokenizer="t", data="d")), have)
    drawn, pairs = 3 * 100 * 2.5, 3 * 2 * 100
    scored = 3 * 100 * (3 + 4 + 2.5) + 2 * 100 * (3 + 2.5)  # by each iterate; from 1 on the base reads the answers too
    scored += 2 * 0  # it has the real ones from before
    assert found == estimate.Work(round(drawn), round(scored), round(pairs * (3 + 4 + 2.5)), pairs, measured=True)
    assert found.words().startswith("about ") and work("regularizer=none").words().startswith("at most ")


def test_a_drawn_answer_is_no_longer_than_its_own_limit() -> None:
    """Which may lie below that of the data, or above it."""
    short, long = (work("regularizer=none", f"generation.max_new_tokens={n}") for n in (2, 9))
    assert (short.drawn, long.drawn) == (3 * 100 * 2, 3 * 100 * 9)
    assert (short.trained, long.trained) == (3 * 100 * (7 + 5 + 2), 3 * 100 * (7 + 5 + 9))


def test_published_answers_are_whole_whatever_the_limit_of_drawn_ones() -> None:
    """Iteration 0 trains on those of the data set, at their limit of 5 tokens; 1 and 2 on answers of at most 2."""
    found = work("dataset.generated=published", "regularizer=none", "generation.max_new_tokens=2")
    assert found.drawn == 2 * 100 * 2
    assert found.trained == 100 * (7 + 5 + 5) + 2 * 100 * (7 + 5 + 2)


@pytest.mark.slow
def test_a_plan_says_at_most_and_about_once_the_data_are_prepared(command: Command, tmp_path: Path) -> None:
    """Of each stage and of all; every number of the first plan bounds that of the second."""
    words = ["schedule.iterations=1", "dataset.num_prompts=8", "dataset.num_heldout=8", f"outputs={tmp_path}"]
    words += ["tracker=none", "run_name=run", "evaluation=none", "hardware.threads=1"]
    at_most = command("plan", *words)
    before = json.loads(command("plan", *words, "--json").out)
    assert "tokens: at most" in at_most.out and re.search(r"disk: [\d.]+ MB at most \(", at_most.out)
    assert re.search(r"todo +iterate-00/sft +[\d.]+k? tokens +[\d.]+ MB +not made yet", at_most.out)
    assert command("train", *words).code == 0
    other = [*words, "run_name=other", "seed=1"]  # on the same data
    made, after = command("plan", *other), json.loads(command("plan", *other, "--json").out)
    assert "tokens: about" in made.out and "when all is made" in made.out
    todo = {one["name"]: one for one in after["stages"] if one["status"] == "todo"}
    assert todo and sum(one["tokens"] for one in todo.values()) == sum(
        after["tokens"][kind] for kind in ("drawn", "scored", "trained")
    )
    for one in before["stages"]:
        if one["name"] in todo:
            assert todo[one["name"]]["tokens"] <= one["tokens"] and todo[one["name"]]["disk"] < one["disk"]
    assert after["disk"]["left"] < after["disk"]["peak"] and not before["disk"]["measured"]


@pytest.mark.parametrize("preset", PRESETS)
def test_the_plan_of_a_preset_says_tokens_memory_and_disk(
    preset: str, base: Path, command: Command, tmp_path: Path
) -> None:
    """With a model and data of this machine in place of the Hub's."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data/train_sft.parquet").write_bytes(b"")
    words = [f"experiment={preset}", f"model.name_or_path={base}", "model.revision=null"]
    result = command("plan", *words, f"dataset.path={tmp_path}/data", f"outputs={tmp_path}/o")
    assert result.code == 0, result.err
    assert all(re.search(rf"^  {word}: ", result.out, flags=re.M) for word in ("tokens", "memory", "disk"))
    thousands = 5 if preset == "small_lora" else 50
    drawn = re.search(r"tokens: at most ([\d.]+)(\w) drawn", result.out)
    assert drawn is not None and drawn[2] == "M" and float(drawn[1]) > thousands * 1024 * 3 / 1000
    assert not (tmp_path / "o").exists()


def test_presets_are_what_was_published() -> None:
    config.register()
    overrides.register_help(ROOT / "conf")
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        found = {name: config.load(compose("config", [f"experiment={name}"])) for name in PRESETS}
    spin = found["spin"]
    assert [at(spin.schedule.learning_rate, t) for t in range(4)] == [5e-7, 5e-7, 1e-7, 1e-7]
    assert [at(spin.schedule.beta, t) for t in range(4)] == [0.1, 0.1, 0.1, 5.0]
    assert (spin.schedule.batch_size, spin.schedule.optimizer, list(spin.schedule.epochs)) == (64, "rmsprop", [2])
    assert spin.dataset.num_prompts == 50000
    for name in ("alpha_spin", "fictitious_play", "mixture_of_two"):
        other = found[name]
        assert (other.model, other.dataset, other.schedule) == (spin.model, spin.dataset, spin.schedule)
        assert type(other.regularizer) is not type(spin.regularizer)
    assert isinstance(found["small_lora"].model, Pretrained) and found["small_lora"].model.lora.rank > 0
