"""Exact match: what a result is, what is refused, and the shares on answers whose results are known."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, SMALL, Command, read_jsonl
from test_config import composed

from spin_reg import diagnostics, exact, tables
from spin_reg.benchmarks import Evaluation
from spin_reg.corpora import Jsonl
from spin_reg.errors import DataError
from spin_reg.exact import ExactMatch
from spin_reg.plan import Sources, plan
from spin_reg.settings import LengthNorm, Tiny
from spin_reg.specs import EvaluateSpec, GenerateSpec
from spin_reg.stages import evaluate

GSM8K = composed("evaluation=exact_match").evaluation.exact_match
TEXTS = {
    "She has 3 + 4 = 7.\n#### 7": "7",
    "#### 1,234": "1234",
    "#### $18.50.": "18.50",
    "####-5\nThe end": "-5",
    "#### 1\n#### 2": "2",
    "the answer is 42": None,
    "#### many": None,
    "#### .": None,
    "": None,
}


@pytest.mark.parametrize("text", TEXTS)
def test_the_result_of_a_gsm8k_answer(text: str) -> None:
    assert exact.result(GSM8K, text) == TEXTS[text]


def test_what_is_normalised_and_which_group_counts() -> None:
    assert exact.result(ExactMatch("is (.+)"), "it is $ 1,000 . ") == "1000"
    assert exact.result(ExactMatch("is (.+)", normalise=False), "it is $ 1,000 . ") == "$ 1,000 . "
    assert exact.result(ExactMatch("is (.+)"), "it is Paris.") == exact.result(ExactMatch("is (.+)"), "is PARIS")
    assert exact.result(ExactMatch("a(b)?"), "ab a") == "b"  # of the last match that has it
    both = ExactMatch("says (.)", real_regex="#(.)")
    assert exact.result(both, "#1 says 2") == "2" and exact.result(both, "#1 says 2", real=True) == "1"
    assert exact.result(ExactMatch("is (.+)"), "is $,.") is None


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"regex": "("}, "evaluation.exact_match.regex=(: it is no regular expression"),
        ({"regex": "x"}, "it has 0 groups; give it one"),
        ({"regex": "(x)(y)"}, "it has 2 groups; give it one"),
        ({"regex": "(x)", "real_regex": "y"}, "evaluation.exact_match.real_regex=y: it has 0 groups"),
        ({"regex": "(x)", "temperature": -1.0}, "temperature=-1.0: give 0"),
        ({"regex": "(x)", "max_new_tokens": 0}, "max_new_tokens=0: give a whole number from 1"),
        ({"normalise": False}, "normalise=False: without a regex it does nothing"),
        ({"real_regex": "(x)"}, "without a regex it does nothing"),
    ],
)
def test_settings_that_cannot_be_used(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match="evaluation") as error:
        ExactMatch(**given)
    assert says in str(error.value)


def test_settings_without_effect() -> None:
    for given in ({"exact_match": GSM8K}, {"full_kl": True}):
        with pytest.raises(ValueError, match=f"without effect.*|{next(iter(given))}"):
            Evaluation(enabled=False, **given)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="full_kl_prompts=9: without"):
        Evaluation(full_kl_prompts=9)


def test_real_answers_without_a_result_are_left_out_unless_they_are_most() -> None:
    assert exact.wanted(GSM8K, {"a": "#### 1", "b": "#### 2", "c": "none"}) == {"a": "1", "b": "2"}
    with pytest.raises(DataError, match="no result") as error:
        exact.wanted(ExactMatch("(z)", real_regex="#### (.)"), {"a": "#### 1", "c": "none"})
    assert "1 of 2" in error.value.why and "none" in error.value.why and "real_regex" in error.value.where


def answers(folder: Path, texts: list[str]) -> Path:
    folder.mkdir()
    empty = {"generated_ids": [1], "finish_reason": "stop", "sampled_from": 0}
    rows = [{"example_id": f"{i}", "generated": text} | empty for i, text in enumerate(texts)]
    tables.write(folder / "answers.parquet", reversed(rows), tables.ANSWERS)
    return folder


def test_shares_and_the_paired_change(tmp_path: Path) -> None:
    real = ["it is 1", "it is 2", "it is 3", "it is 4", "no result"]
    (tmp_path / "data").mkdir()
    empty = {"prompt_ids": [1], "real_ids": [1], "data_logprob": None, "prompt": "", "source": None}
    rows = [{"example_id": f"{i}", "real": text} | empty for i, text in enumerate(real)]
    tables.write(tmp_path / "data/heldout.parquet", rows, tables.EXAMPLES)
    inputs = {"data": tmp_path / "data"}
    inputs["results/00"] = answers(tmp_path / "0", ["#### 1", "#### 9", "3", "#### 5", "#### 5"])
    inputs["results/02"] = answers(tmp_path / "2", ["#### 2", "#### 2.", "#### 3", "none", "#### 5"])
    settings = ExactMatch(GSM8K.regex, real_regex="it is (.)")
    spec = EvaluateSpec(2, None, (), None, LengthNorm.none, 0, settings, Tiny(), Jsonl(path="x"))
    found = evaluate.exact_match(spec, inputs)
    wanted = diagnostics.mean("eval/exact_match", [0, 1, 1, 0])
    wanted |= diagnostics.mean("eval/exact_match_answered", [1, 1, 1, 0])
    wanted |= diagnostics.mean("eval/exact_match_change", [-1, 1, 1, 0])
    assert found == pytest.approx(wanted)
    base = evaluate.exact_match(EvaluateSpec(0, *[getattr(spec, n) for n in list(vars(spec))[1:]]), inputs)
    assert base["eval/exact_match"] == 0.25 and base["eval/exact_match_change"] == 0.0


def test_answers_at_temperature_1_that_are_there_anyway_are_not_drawn_again() -> None:
    sources = Sources(model=None, tokenizer="t", data=None)

    def drawn(*words: str) -> dict[str, GenerateSpec]:
        stages = plan(composed("schedule.iterations=1", *words), sources)
        return {s.name: s.spec for s in stages if isinstance(s.spec, GenerateSpec)}

    usual, asked = drawn(), "evaluation=exact_match"
    assert drawn(asked, "evaluation.exact_match.temperature=1") == usual
    more = {name: spec for name, spec in drawn(asked).items() if name not in usual}
    assert set(more) == {f"iterate-{k:02d}/answers/heldout-greedy" for k in (0, 1)}
    assert {(s.generation.temperature, s.generation.top_p) for s in more.values()} == {(0.0, 1.0)}
    other = drawn(asked, "evaluation.exact_match.temperature=0.5", "evaluation.exact_match.max_new_tokens=7")
    assert other["iterate-01/answers/heldout-temperature0.5-upto7"].max_new_tokens == 7


def test_exact_match_is_added_to_a_finished_run(train: Callable[..., Path], command: Command) -> None:
    root = train("schedule.iterations=1")
    before = {path: path.stat().st_mtime_ns for path in root.rglob("stage.json") if path.parent.name != "evaluate"}
    text = str(pq.read_table(root / "data/heldout.parquet", columns=["real"]).column(0)[0])
    bad = command("evaluate", str(root), "evaluation.exact_match.regex='zz(z)'")
    assert bad.code == 3 and bad.err.count("\n") == 4 and "0 of 8 held-out real answers" in bad.err, bad.err
    assert " ".join(text.split())[-80:] in bad.err and not list(root.glob("iterate-00/answers/*greedy"))
    result = command("evaluate", str(root), "evaluation.exact_match.regex='(\\w)\\W*$'")
    assert result.code == 0, result.err
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    made = {p.parent.name for p in root.rglob("stage.json") if p not in before}
    assert made == {"evaluate", "heldout-greedy"}
    real = {r["example_id"]: r["real"] for r in pq.read_table(root / "data/heldout.parquet").to_pylist()}
    right = {}
    for k in (0, 1):
        drawn = pq.read_table(root / f"iterate-{k:02d}/answers/heldout-greedy/answers.parquet").to_pylist()
        right[k] = [exact.result(ExactMatch(r"(\w)\W*$"), r["generated"]) ==
                    exact.result(ExactMatch(r"(\w)\W*$"), real[r["example_id"]]) for r in drawn]  # fmt: skip
        found = json.loads((root / f"iterate-{k:02d}/evaluate/metrics.json").read_text())
        assert found["eval/exact_match"] == pytest.approx(np.mean(right[k]))
        assert found["eval/exact_match_answered"] <= 1.0
    change = np.mean(np.array(right[1], dtype=float) - np.array(right[0], dtype=float))
    assert found["eval/exact_match_change"] == pytest.approx(change)
    rows = [row for row in read_jsonl(root / "metrics.jsonl") if "eval/exact_match" in row]
    assert [row["iterate"] for row in rows] == [0, 1]
    shown = json.loads((root / "iterate-01/evaluate/samples.json").read_text())[0]
    assert {"matched", "result", "real_result"} <= set(shown) and "exact_match_change" in result.err
    assert "nothing to do" in command("evaluate", str(root)).err


def test_before_anything_is_made_real_answers_must_have_results(command: Command, tmp_path: Path) -> None:
    words = ["evaluation=exact_match", f"outputs={tmp_path / 'o'}"]
    result = command("train", *SMALL, *words)
    assert result.code == 3 and "0 of 8" in result.err and not (tmp_path / "o").exists()
    refused = command("train", *SMALL, *words, "schedule.stop_when={metric:eval/exact_match,worse:1}",
                      "evaluation.exact_match.regex=null")  # fmt: skip
    assert refused.code == 2 and "evaluation=exact_match" in refused.err
    long = command("train", *SMALL, *words, "evaluation.exact_match.max_new_tokens=100000")
    assert long.code == 2 and "evaluation.exact_match.max_new_tokens=100000" in long.err


@pytest.mark.real
def test_the_preset_finds_every_result_of_gsm8k() -> None:
    files = sorted((ROOT / "../shared/data/gsm8k").rglob("*.jsonl"))
    if not files:
        pytest.skip("no GSM8K here")
    rows = [row for path in files for row in read_jsonl(path)]
    texts = {f"{i}": row["answer"] for i, row in enumerate(rows) if "answer" in row}
    assert texts and len(exact.wanted(GSM8K, texts)) == len(texts)
