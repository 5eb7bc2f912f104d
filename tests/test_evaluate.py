"""What is reported of an iterate: on tables made by hand, through the real command, and as people see it."""

import io
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import ROOT, Command
from hydra import compose, initialize_config_dir
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

from spin_reg import config, console, data, diagnostics, metrics, models, overrides, plan, results, tables
from spin_reg.corpora import Toy
from spin_reg.scorer import Scorer
from spin_reg.settings import LengthNorm, Loss, Tiny
from spin_reg.specs import EvaluateSpec
from spin_reg.stages import evaluate
from spin_reg.stages import train as train_stage

RNG = np.random.default_rng(0)
Train = Callable[..., Path]


def scores(folder: Path, logprobs: dict[str, float], j: int | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tables.write(
        folder / "scores.parquet",
        [
            {"example_id": name, "sampled_from": j, "logprob": value, "token_logprobs": [value]}
            for name, value in logprobs.items()
        ],
        tables.SCORES,
    )
    return folder


def examples(folder: Path, prompts: Sequence[str], answers: Sequence[list[int]], logprobs: Sequence[float]) -> Path:
    empty = {"prompt_ids": [1], "real": "", "source": None}
    rows = [
        {"example_id": f"{i}", "prompt": p, "real_ids": ids, "data_logprob": value} | empty
        for i, (p, ids, value) in enumerate(zip(prompts, answers, logprobs, strict=True))
    ]
    folder.mkdir()
    for split in ("heldout", "retained_heldout"):
        tables.write(folder / f"{split}.parquet", rows, tables.EXAMPLES)
    return folder


def test_of_a_policy_that_is_off_by_a_constant_all_divergences_are_that_constant(tmp_path: Path) -> None:
    settings = Toy(num_prompts=1, smoothing=0.01)
    language = data.toy_language(settings, models.byte_tokenizer())
    prompts = ["A1", "B2", "C3", "D4"] * 5
    real, own = ([language.draw(p, RNG) for p in prompts] for _ in range(2))
    own[0] = own[0][:2]  # cut off
    known, drawn = ([language.logprob(p, ids) for p, ids in zip(prompts, some, strict=True)] for some in (real, own))
    folders = {name: tmp_path / name for name in ("data", "own", "real/00", "own_scores")}
    examples(folders["data"], prompts, real, known)
    empty = {"finish_reason": "stop", "sampled_from": 0, "generated": ""}
    rows = [{"example_id": f"{i}", "generated_ids": ids} | empty for i, ids in enumerate(own)]
    folders["own"].mkdir()
    tables.write(folders["own"] / "answers.parquet", reversed(rows), tables.ANSWERS)  # joined by id
    scores(folders["real/00"], {f"{i}": value - 0.25 for i, value in enumerate(known)})
    scores(folders["own_scores"], {f"{i}": value + 0.5 for i, value in enumerate(drawn)}, 0)
    spec = EvaluateSpec(0, None, (), None, LengthNorm.none, 0, None, Tiny(), settings)
    found = evaluate.known_language(spec, folders | {"retained": folders["real/00"]})
    wanted = {"eval/kl_data": 0.25, "eval/kl_off": 0.25, "eval/kl_data_reverse": 0.5}
    assert found == pytest.approx(wanted | {f"{name}_se": 0.0 for name in wanted}, abs=1e-9)


def test_steps_back_and_forth_and_the_gain_over_the_base(tmp_path: Path) -> None:
    prompts, start, step = ["A1"] * 9, RNG.normal(size=9) - 20, RNG.normal(size=9)
    inputs = {"data": examples(tmp_path / "data", prompts, [[1, 2, 3, 4]] * 9, [0.0] * 9)}
    for k, u in enumerate([start, start + step, start + 0.25 * step]):
        inputs[f"real/{k:02d}"] = scores(tmp_path / f"{k}", {f"{i}": float(value) for i, value in enumerate(u)})
    assert evaluate.step_direction(inputs, 1) == {}
    assert evaluate.step_direction(inputs, 2)["eval/step_direction"] == pytest.approx(-1.0)
    found = evaluate.likelihood(inputs, 2)
    gain = diagnostics.mean("eval/heldout_nll_change", -0.25 * step)
    assert {name: found[name] for name in gain} == pytest.approx(gain)
    assert found["eval/heldout_nll"] == pytest.approx(-found["eval/heldout_real_logprob"] / 4)
    base = evaluate.likelihood(inputs, 0)
    assert base["eval/heldout_nll_change"] == 0.0 and base["eval/preferred_to_base"] == 0.5
    assert found["eval/preferred_to_base"] == pytest.approx(np.mean(step > 0))
    assert found["eval/preferred_to_previous"] == pytest.approx(np.mean(step < 0))
    over = evaluate.preferences(inputs, 2)
    assert [(entry["iterate"], entry["over"]) for entry in over] == [(2, 0), (2, 1)]
    assert over[0]["share"] == found["eval/preferred_to_base"]
    assert over[1]["share_se"] == found["eval/preferred_to_previous_se"]


def rows(path: Path) -> dict[str, dict[str, Any]]:
    return {row["example_id"]: row for row in pq.read_table(path).to_pylist()}


def logprobs(folder: Path, j: int | None) -> dict[str, float]:
    found = pq.read_table(folder / "scores.parquet").to_pylist()
    return {row["example_id"]: row["logprob"] for row in found if row["sampled_from"] == j}


def reported(root: Path, k: int) -> dict[str, float]:
    found: dict[str, float] = json.loads((root / f"iterate-{k:02d}/evaluate/metrics.json").read_text())
    return found


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("outputs")


@pytest.fixture
def spin(train: Train, outputs: Path) -> Path:
    """Plain SPIN, three iterations; once for this module."""
    return train("regularizer=none", "schedule.iterations=3", "schedule.beta=0.5", name="spin", outputs=outputs)


def test_a_run_reports_what_its_tables_say(spin: Path) -> None:
    """Iterate 2 of plain SPIN against iterate 1, from the Parquet files, in other words."""
    examples = rows(spin / "data/heldout.parquet")
    both = {k: spin / f"iterate-{k:02d}/scores/heldout-real" for k in range(3)}
    both |= {k: spin / f"iterate-{k:02d}/scores/heldout-real-from-{k - 1:02d}" for k in (1, 2)}
    real = {k: logprobs(folder, None) for k, folder in both.items()}
    old = logprobs(spin / "iterate-01/answers/heldout", 1)
    new = logprobs(both[2], 1)
    names = list(examples)
    delta = np.array([(real[2][n] - real[1][n]) - (new[n] - old[n]) for n in names])
    found, count = reported(spin, 2), math.sqrt(len(names))
    loss = np.log1p(np.exp(-0.5 * delta))
    wanted = {
        "margin": 0.5 * delta.mean(),
        "margin_se": 0.5 * delta.std(ddof=1) / count,
        "accuracy": np.mean((delta > 0) + (delta == 0) / 2),
        "gap": math.log(2) - loss.mean(),
        "gap_se": loss.std(ddof=1) / count,
        "misalignment": np.mean([d > 0 and real[2][n] < new[n] for d, n in zip(delta, names, strict=True)]),
        "heldout_generated_logprob": np.mean(list(new.values())),
        "heldout_real_logprob": np.mean(list(real[2].values())),
        "heldout_nll_change": np.mean([real[0][n] - real[2][n] for n in names]),
        "step_direction": np.corrcoef(
            [real[2][n] - real[1][n] for n in names], [real[1][n] - real[0][n] for n in names]
        )[0, 1],
    }
    own = rows(spin / "iterate-02/answers/heldout/answers.parquet")
    sampled = logprobs(spin / "iterate-02/answers/heldout", 2)
    lengths = [len(own[n]["generated_ids"]) for n in names]
    wanted |= {
        "length_mean": np.mean(lengths),
        "length_p90": np.quantile(lengths, 0.9),
        "stop_rate": np.mean([own[n]["finish_reason"] == "stop" for n in names]),
        "token_entropy": -sum(sampled.values()) / sum(lengths),
        "length_auc": np.mean([(a > b) + (a == b) / 2 for a in lengths for b in map(len, real_ids(examples))]),
        "distinct_1": len({t for n in names for t in own[n]["generated_ids"]}) / sum(lengths),
    }
    assert {name: found[f"eval/{name}"] for name in wanted} == pytest.approx(wanted, rel=1e-6, abs=1e-9)
    assert found["eval/stop_rate"] + found["eval/cutoff_share"] == pytest.approx(1.0)
    assert all(
        f"{name}_se" in found
        for name in found
        if name.removeprefix("eval/").startswith(("kl_", "heldout")) and not name.endswith("_se")
    )


def test_where_an_opponent_gives_the_real_answer_a_guess_wins_half(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that 0.5 is chance, whatever share of the answers is the same."""
    deltas = np.array([0.0, 0.0, 1.0, -2.0, 0.5])
    monkeypatch.setattr(evaluate, "played", lambda *given: (deltas, deltas, deltas))
    spec: Any = SimpleNamespace(k=1, game=SimpleNamespace(), beta=2.0, length_norm=LengthNorm.none)
    found = evaluate.game(spec, {})
    assert found["eval/accuracy"] == 3 / 5
    spec.matches = [SimpleNamespace(t=0, window=(0,))]
    (entry,) = evaluate.crossplay(spec, {})
    assert entry["accuracy"] == 3 / 5 and entry["accuracy_se"] == found["eval/accuracy_se"] > 0
    row = {"prompt_ids": [1, 2], "real_ids": [3, 4], "generated_ids": [3, 4]}
    row |= {"reference_real_logprob": -1.0, "reference_generated_logprob": -1.0}
    torch.manual_seed(0)
    small = LlamaConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
    scorer = Scorer(LlamaForCausalLM(small))
    assert train_stage.pair_terms(scorer, [row], Loss(), 0.5)["accuracy"].tolist() == [0.5]


def test_readme_names_every_metric(spin: Path) -> None:
    table = (ROOT / "README.md").read_text().split("| `eval/` |")[1].split("\n\n")[0]
    named = {name for line in table.splitlines() for name in re.findall(r"`(\w+)`", line.split("|")[1] if line else "")}
    asked = {*metrics.EXACT_MATCH, "eval/kl_to_base_full", "eval/kl_to_previous_full"}
    made = {name for name in reported(spin, 3) if not name.endswith("_se")} | asked
    assert named == {name.removeprefix("eval/") for name in made}


def real_ids(examples: dict[str, dict[str, Any]]) -> list[list[int]]:
    return [row["real_ids"] for row in examples.values()]


@pytest.mark.slow
def test_cross_play_is_the_accuracy_where_it_was_played_and_whole_on_request(spin: Path, command: Command) -> None:
    known = results.crossplay(spin, 3)
    assert set(known) == {(1, 0), (1, 1), (1, 2), (2, 1), (2, 2), (3, 2), (3, 3)}
    for k in (1, 2, 3):
        assert known[k, k - 1]["accuracy"] == reported(spin, k)["eval/accuracy"]
    before = {k: reported(spin, k) for k in range(4)}
    said = command("evaluate", str(spin), "evaluation.crossplay=true")
    assert said.code == 0, said.err
    whole = results.crossplay(spin, 3)
    assert set(whole) == {(i, j) for i in (1, 2, 3) for j in range(4)}
    assert {entry: whole[entry] for entry in known} == known
    assert {k: reported(spin, k) for k in range(4)} == before
    for name in ("step_direction", "instability", "cross-play", "heldout_nll_change", "preferences"):
        assert name in said.err
    shares = results.preferences(spin, 3)
    assert set(shares) == {(k, j) for k in range(4) for j in range(k)}
    assert all(shares[k, k - 1]["share"] == before[k]["eval/preferred_to_previous"] for k in (1, 2, 3))


@pytest.fixture
def planned() -> Iterator[Callable[..., list[plan.Stage]]]:
    config.register()
    overrides.register_help(ROOT / "conf")
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        sources = plan.Sources(model=None, tokenizer="t", data=None)
        yield lambda *words: plan.plan(config.load(compose("config", list(words))), sources)


@pytest.mark.parametrize("regularizer", ["none", "kl", "fictitious_play", "mixture_of_two", "base"])
def test_cross_play_scores_nothing_more_unless_asked(
    regularizer: str, planned: Callable[..., list[plan.Stage]], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [f"regularizer={regularizer}", "schedule.iterations=4", "generation.temperature=0.9"]
    stages, whole = planned(*words), planned(*words, "evaluation.crossplay=true")

    def entries(stages: list[plan.Stage]) -> set[tuple[int, int]]:
        specs = [stage.spec for stage in stages if isinstance(stage.spec, EvaluateSpec)]
        return {(match.t + 1, *match.window) for spec in specs for match in spec.matches}

    assert {(k, k - 1) for k in range(1, 5) if regularizer != "base"} <= entries(stages)
    assert entries(whole) == {(i, j) for i in range(1, 5) for j in range(5)}
    assert {stage.name for stage in stages} <= {stage.name for stage in whole}
    monkeypatch.setattr(plan._Builder, "_matches", lambda self, k: [])
    assert [stage.name for stage in planned(*words)] == [stage.name for stage in stages]


def test_a_reference_that_hangs_on_who_answered_is_not_asked_of_others(
    planned: Callable[..., list[plan.Stage]],
) -> None:
    stages = planned("regularizer=mixture_of_two", "regularizer.reference=generator", "evaluation.crossplay=true")
    (last,) = [s.spec for s in stages if isinstance(s.spec, EvaluateSpec) and s.spec.k == 3]
    assert {(match.t + 1, *match.window) for match in last.matches} == {
        (3, 1),
        (3, 2),
        (1, 3),
    }  # iteration 0 knew one alone


def shown(*tables: Any, width: int = 80) -> str:
    screen = Console(file=io.StringIO(), width=width, highlight=False)
    for table in tables:
        screen.print(table, markup=False)
    text: str = screen.file.getvalue()  # type: ignore[attr-defined]
    return text


def test_the_table_fits_80_columns_and_marks_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [name for name in console.COLUMNS if name != "exact_match"]
    values = {f"eval/{name}": 8.0 for name in names} | {f"eval/{name}_se": 0.5 for name in names}
    found = {k: dict(values) | {"eval/heldout_nll": nll} for k, nll in enumerate([2.5, 2.25, 2.375])}
    found[2] |= {"eval/kl_data": 123.456, "eval/kl_data_se": 12.345, "eval/kl_off": 7.0, "eval/length_mean": 1234.5}
    monkeypatch.setattr(results, "evaluated", lambda root, iterations: found)
    monkeypatch.setattr(results, "crossplay", lambda root, iterations: {(1, 0): {"accuracy": 0.625}})
    monkeypatch.setattr(results, "preferences", lambda root, iterations: {(1, 0): {"share": 0.875}})
    table = console.iterates_table(Path("run"), 2)
    text = shown(table)
    assert max(map(len, text.splitlines())) <= 80 and "…" not in text
    marked = [word for line in text.splitlines() for word in line.split() if word.endswith("*") and word != "*"]
    assert marked == ["8.000*", "2.250*", "7.000*"]  # kl_data of the base, the NLL of 1, kl_off of 2
    for word in ("0 base", "±0.500", "123.5", "±12.3", "1234"):
        assert word in text, word
    found[0] |= {"eval/exact_match": 0.5, "eval/exact_match_se": 0.25}
    wide = shown(console.iterates_table(Path("run"), 2))
    assert max(map(len, wide.splitlines())) <= 80 and "…" not in wide and "exact" in wide and "length" not in wide
    more = shown(*console.details(Path("run"), 2, 80))
    assert max(map(len, more.splitlines())) <= 80 and "…" not in more and "0.625" in more and "0.875" in more
    line = next(line.split() for line in more.splitlines() if line.split()[:2] == ["heldout_nll", "1"])
    assert line == ["heldout_nll", "1", "0.125", "0.125"]
