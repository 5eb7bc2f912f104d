"""Splits by prompt, drops within bounds, and conversations to token ids."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from conftest import SMALL, Command
from hypothesis import given, settings
from hypothesis import strategies as st

from spin_reg import data, models, origins, render
from spin_reg.config import Config
from spin_reg.corpora import Hub, Jsonl
from spin_reg.errors import DataError
from spin_reg.render import Unusable
from spin_reg.settings import Tiny
from spin_reg.specs import Split

TOKENIZER = models.byte_tokenizer()
ENDS = models.end_ids(None, TOKENIZER)
END = ENDS[0]
GOOD = [{"prompt": f"question {i}", "response": f"answer {i}"} for i in range(12)]
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def dataset(path: Path, **kwargs: Any) -> Jsonl:
    return Jsonl(**({"path": str(path), "num_heldout": 2} | kwargs))


def split(path: Path, **kwargs: Any) -> tuple[set[str], set[str]]:
    splits, _ = data.prepare(dataset(path, **kwargs), TOKENIZER, ENDS)
    return tuple({row["prompt"] for row in splits[s]} for s in (Split.train, Split.heldout))  # type: ignore[return-value]


def test_the_split_depends_on_prompts_alone(tmp_path: Path) -> None:
    train, heldout = split(write(tmp_path / "a.jsonl", GOOD))
    assert len(heldout) == 2 and len(train) == 10 and not train & heldout
    other = [row | {"response": "another"} for row in reversed(GOOD)]
    assert split(write(tmp_path / "b.jsonl", other)) == (train, heldout)
    assert split(write(tmp_path / "c.jsonl", GOOD), num_prompts=5)[1] == heldout
    assert split(write(tmp_path / "d.jsonl", GOOD), seed=1) != (train, heldout)


def test_rows_of_one_prompt_stand_on_one_side(tmp_path: Path) -> None:
    rows = [{"prompt": row["prompt"], "response": f"{row['response']} {i}"} for row in GOOD for i in range(3)]
    train, heldout = split(write(tmp_path / "a.jsonl", rows))
    assert not train & heldout and len(heldout) == 2


@pytest.mark.parametrize(
    ("kwargs", "named"),
    [
        ({"num_prompts": 11}, "too few rows"),
        ({"num_heldout": 12}, "too few rows"),
        ({"max_response_tokens": 9}, "would be dropped"),
        ({"max_prompt_tokens": 5}, "would be dropped"),
    ],
)
def test_too_few_rows_and_too_many_drops(kwargs: dict[str, Any], named: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=named):
        split(write(tmp_path / "a.jsonl", GOOD), **kwargs)


def test_drops_are_counted_and_listed(tmp_path: Path) -> None:
    long = [
        {"prompt": "long", "response": "x" * 600},
        {"prompt": "long" * 600, "response": "x", "id": "a): b"},
        {"prompt": "huge", "response": "x" * 20_000_000},  # known to be over without being tokenised
    ]
    path = write(tmp_path / "a.jsonl", [*GOOD, *long, GOOD[0]])
    splits, summary = data.prepare(dataset(path, max_dropped=0.2), TOKENIZER, ENDS)
    assert [line.partition(" (")[0] for line in summary["dropped"]] == ["row 13", "row 14", "row 15"]
    every = "; ".join(summary["dropped"])
    assert "601 > 512" in every and "2403 > 512" in every and "20000000 characters > 256 x 512" in every
    response, prompt = (f"the {name} is over dataset.max_{name}_tokens" for name in ("response", "prompt"))
    assert summary["reasons"] == {response: 2, prompt: 1}
    assert (summary["rows"], summary["duplicates"], summary["looked_at"]) == (16, 1, 15)
    assert sum(map(len, splits.values())) == len(GOOD)


def test_one_row_in_twenty_may_be_dropped_and_no_more(tmp_path: Path) -> None:
    rows = [{"prompt": f"question {i}", "response": f"answer {i}" * (100 if i < 3 else 1)} for i in range(59)]
    with pytest.raises(DataError) as raised:
        data.prepare(Jsonl(path=str(write(tmp_path / "a.jsonl", rows)), num_heldout=2), TOKENIZER, ENDS)
    assert "3 of 59" in raised.value.what and raised.value.why.count("row ") == 3 and "0.05" in raised.value.todo
    more = write(tmp_path / "b.jsonl", [*rows, GOOD[0] | {"id": "one more"}])
    assert len(data.prepare(Jsonl(path=str(more), num_heldout=2), TOKENIZER, ENDS)[1]["dropped"]) == 3


def test_of_too_many_dropped_rows_twenty_are_named_and_the_rest_counted(tmp_path: Path) -> None:
    rows = [{"prompt": f"long {i}", "response": "x" * 600} for i in range(25)]
    with pytest.raises(DataError) as raised:
        data.prepare(dataset(write(tmp_path / "a.jsonl", [*GOOD, *rows])), TOKENIZER, ENDS)
    assert raised.value.what == "25 of 37 rows would be dropped." and raised.value.why.startswith("row 13 ")
    assert raised.value.why.count("row ") == 20 and raised.value.why.endswith("; and 5 more")


def test_no_row_reaches_training_with_text_that_ends_an_answer(tmp_path: Path) -> None:
    with pytest.raises(Unusable, match="control token"):
        render.render(TOKENIZER, [CHAT[0], {"role": "assistant", "content": "a<|end|>b"}], ENDS)


def test_ones_own_file_trains_the_tiny_model(train: Callable[..., Path], tmp_path: Path) -> None:
    rows = [{"question": f"{i} + 1?", "answer": f"{i + 1} é"} for i in range(40)]
    path = write(tmp_path / "mine.jsonl", [*rows, rows[0], {"question": "long", "answer": "over the limit of 16"}])
    limits = ["dataset.max_response_tokens=16", "dataset.num_prompts=null", "schedule.iterations=1"]
    limits.append("generation.max_new_tokens=4")
    root = train("dataset=jsonl", f"dataset.path={path}", *limits)
    summary = json.loads((root / "data/summary.json").read_text())
    assert (summary["rows"], summary["duplicates"], len(summary["dropped"])) == (42, 1, 1)
    assert "row 42 " in summary["dropped"][0]
    tokens = {piece["name"]: piece["tokens"] for piece in json.loads((root / ".plan.json").read_text())}
    assert tokens["iteration-00/train"] == 2 * 32 * (512 + 16 + 4)  # rows counted at the start, two epochs
    metrics = json.loads((root / "iterate-01/evaluate/metrics.json").read_text())
    assert "eval/kl_data" not in metrics and metrics["eval/heldout_nll"] > 0
    row = pq.read_table(root / "iteration-00/pairs.parquet").to_pylist()[0]
    assert TOKENIZER.decode(row["real_ids"][:-1]) == row["real"]


def test_a_folder_like_a_hub_data_set_trains(train: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder / "train.jsonl", [{"prompt": f"{i}?", "response": f"{i}!"} for i in range(40)])
    few = ["generation.max_new_tokens=8", "schedule.iterations=1", "evaluation=none"]
    root = train("dataset=hub", f"dataset.path={folder}", *few)
    assert len(pq.read_table(root / "iteration-00/pairs.parquet")) == 24


def test_data_that_change_while_they_are_read_are_refused(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "mine.jsonl", [{"prompt": f"{i}?", "response": f"{i}!"} for i in range(40)])
    words = ["train", *SMALL, "dataset=jsonl", f"dataset.path={path}", f"outputs={tmp_path / 'o'}", "run_name=run"]
    words += ["generation.max_new_tokens=4", "schedule.iterations=1", "evaluation=none"]
    prepare = data.prepare

    def late(*given: Any) -> Any:
        path.write_text(path.read_text().replace("!", "."))
        return prepare(*given)

    with monkeypatch.context() as patch:
        patch.setattr(data, "prepare", late)
        result = command(*words)
    assert result.code == 3 and "The data have changed" in result.err and not (tmp_path / "o/run").exists()
    assert command(*words).code == 0
    assert {row["real"][-1] for row in pq.read_table(tmp_path / "o/run/data/train.parquet").to_pylist()} == {"."}


def test_a_record_has_the_looks_of_what_was_hashed(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.jsonl", [{"prompt": "a", "response": "b"}])
    given = Config(model=Tiny(), dataset=Jsonl(path=str(path)))
    found = origins.found(given, {})
    path.write_text("another")
    assert origins.found(given, origins.record(found, {})).data != found.data


def test_a_folder_is_what_its_links_lead_to_whatever_the_times_of_its_files(
    train: Callable[..., Path], command: Command, tmp_path: Path
) -> None:
    folder, real = tmp_path / "set", tmp_path / "real"
    folder.mkdir()
    real.mkdir()
    (folder / "data").symlink_to(real)
    (folder / "data/again").symlink_to(folder)  # a circle
    (folder / "README.md").write_text("---\nconfigs: [{config_name: default, data_files: data/train.jsonl}]\n---\n")
    few = ["dataset=hub", f"dataset.path={folder}", "generation.max_new_tokens=4", "schedule.iterations=1"]
    for sign in "!.":
        write(real / "train.jsonl", [{"prompt": f"{i}?", "response": f"{i}{sign}"} for i in range(40)])
        os.utime(real / "train.jsonl", (0, 0))
        root = train(*few, "evaluation=none", name=f"run{ord(sign)}")
        assert {row["real"][-1] for row in pq.read_table(root / "data/train.parquet").to_pylist()} == {sign}
    (folder / "README.md").write_text("---\nconfigs: [{config_name: default, data_files: ../real/train.jsonl}]\n---\n")
    result = command("train", *SMALL, *few, f"outputs={tmp_path / 'o'}")
    assert result.code == 3 and "outside of its folder" in result.err, result.err


def without_control_tokens(text: str) -> bool:
    """They are refused, and Hypothesis knows them: it draws strings that stand in the code, too."""
    return not any(token in text for token in TOKENIZER.get_added_vocab())


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(min_size=1).filter(str.strip).filter(without_control_tokens), min_size=2, max_size=6))
def test_rendering_keeps_text_and_ends_once(texts: list[str]) -> None:
    """Prompt is a prefix, the answer ends with exactly one end token, and the bytes of the text come back."""
    count = len(texts) // 2 * 2
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts[:count])]
    prompt, answer = render.render(TOKENIZER, messages, ENDS)
    assert prompt == render.prompt_ids(TOKENIZER, messages[:-1])
    assert answer.count(END) == 1 and answer[-1] == END
    assert TOKENIZER.decode(answer[:-1]) == messages[-1]["content"]


def test_what_a_template_puts_behind_the_end_of_turn_is_cut_off() -> None:
    """Even where that is another end token, as in templates that close the text after the turn."""
    tokenizer = models.byte_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("{% endif %}", "{% else %}<|pad|>\n{% endif %}")
    both = (END, int(tokenizer.pad_token_id))
    prompt, answer = render.render(tokenizer, CHAT, both)
    assert answer == [*tokenizer.encode("yes", add_special_tokens=False), END]


def test_equal_files_under_other_names_are_another_source(tmp_path: Path) -> None:
    from spin_reg import sources

    for place, names in (("a", ("test", "train")), ("b", ("train", "validation"))):
        for name, content in zip(names, ("A", "B"), strict=True):
            (tmp_path / place / name).mkdir(parents=True)
            (tmp_path / place / name / "x").write_text(content)
    one, two = (sources.data_sha256(Hub(path=str(tmp_path / place))) for place in ("a", "b"))
    assert one != two
