"""SPIN's own layout: the answers that the data bring with them take the place of the base's in iteration 0."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import SMALL, Command

from spin_reg import config, models, overrides
from spin_reg.plan import Sources, plan

TOKENIZER = models.byte_tokenizer()
END = TOKENIZER.eos_token_id
FEW = ["generation.max_new_tokens=8", "schedule.iterations=1", "evaluation=none"]


def conversation(prompt: str, answer: str) -> list[dict[str, str]]:
    return [{"content": prompt, "role": "user"}, {"content": answer, "role": "assistant"}]


def row(i: int, generated: str) -> dict[str, Any]:
    return {"real": conversation(f"{i}?", f"{i}!"), "generated": conversation(f"{i}?", generated)}


def write(path: Path, rows: list[dict[str, Any]]) -> list[str]:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return ["dataset=jsonl", f"dataset.path={path}", "dataset.generated=published"]


ANSWERS = {0: "", 1: "short", 2: "of more than eight tokens", 3: "exactly", 4: "eight ab"}


def test_iteration_0_trains_on_the_files_answers(train: Callable[..., Path], tmp_path: Path) -> None:
    words = write(tmp_path / "spin.parquet", [row(i, ANSWERS[i % 5]) for i in range(40)])
    root = train(*words, *FEW)
    pairs = pq.read_table(root / "iteration-00/pairs.parquet").to_pylist()
    assert len(pairs) == 24
    expected = {  # at most 8 tokens, the end token among them
        "0": ([END], "stop"),
        "1": ([*TOKENIZER.encode("short", add_special_tokens=False), END], "stop"),
        "2": (TOKENIZER.encode("of more ", add_special_tokens=False), "length"),
        "3": ([*TOKENIZER.encode("exactly", add_special_tokens=False), END], "stop"),
        "4": (TOKENIZER.encode("eight ab", add_special_tokens=False), "length"),
    }
    for pair in pairs:
        number = int(pair["prompt"].removesuffix("?"))
        assert pair["real"] == f"{number}!" and pair["sampled_from"] == 0
        assert (pair["generated_ids"], pair["finish_reason"]) == expected[str(number % 5)]
    manifest = json.loads((root / "iterate-00/answers/train-00/stage.json").read_text())
    assert manifest["kind"] == "published"


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"generated": None}, "row 3 has generated that are not a list of messages"),
        ({"generated": conversation("other?", "x")}, "row 3 has a real and a generated with different prompts"),
        ({"real": conversation("2?", "")}, "row 3 has an empty content of message 2 in real"),
    ],
)
def test_a_row_that_is_not_in_the_layout_is_named(
    change: dict[str, Any], fault: str, command: Command, tmp_path: Path
) -> None:
    rows = [row(i, "x") for i in range(40)]
    words = write(tmp_path / "spin.parquet", [*rows[:2], rows[2] | change, *rows[3:]])
    result = command("train", *SMALL, *words, f"outputs={tmp_path / 'o'}")
    assert result.code == 3 and fault in result.err and not (tmp_path / "o").exists()


def test_data_without_the_column_are_refused(command: Command, tmp_path: Path) -> None:
    words = write(tmp_path / "spin.parquet", [{"real": conversation("a", "b")}])
    result = command("train", *SMALL, *words, f"outputs={tmp_path / 'o'}")
    assert result.code == 3 and "row 1 has no generated, which dataset.generated=published needs" in result.err


def test_only_what_iterate_0_answers_first_is_taken_from_the_data() -> None:
    """Fresh draws of later iterations, later iterates and held-out answers are sampled."""
    from conftest import ROOT
    from hydra import compose, initialize_config_dir

    config.register()
    overrides.register_help(ROOT / "conf")
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        words = ["model=pretrained", "model.name_or_path=m", "dataset=spin_iter0", "regularizer=fictitious_play"]
        settings = config.load(compose("config", words))
    stages = plan(settings, Sources(model="m", tokenizer="t", data="d"))
    answers = {stage.name: stage.kind for stage in stages if "/answers/" in stage.name}
    assert [name for name, kind in answers.items() if kind == "published"] == ["iterate-00/answers/train-00"]
    assert {"iterate-00/answers/train-01", "iterate-00/answers/heldout"} <= set(answers)
