"""Rows from files: every layout read, every fault named, splits by prompt; and conversations to token ids."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import SMALL, Command
from hypothesis import given, settings
from hypothesis import strategies as st

from spin_reg import data, models, render
from spin_reg.errors import DataError
from spin_reg.render import Unusable
from spin_reg.settings import Hub, Jsonl
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


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "hi", "response": "yes"},
        {"question": "hi", "answer": "yes"},
        {"instruction": "hi", "output": "yes", "input": ""},
        {"messages": CHAT},
        {"real": CHAT, "generated": CHAT},
        {"prompt": "hi", "response": "yes", "id": 7, "extra": None},
    ],
    ids=lambda row: "/".join(row),
)
@pytest.mark.parametrize("ending", ["jsonl", "json", "parquet"])
def test_layouts(row: dict[str, Any], ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"x.{ending}"
    if ending == "parquet":
        pq.write_table(pa.Table.from_pylist([row]), path)
    else:
        path.write_text(json.dumps([row]) if ending == "json" else json.dumps(row))
    (example,) = data.read(dataset(path))
    assert example.messages == CHAT
    assert example.number == 1
    assert example.example_id == ("7" if "id" in row else data.digest(CHAT)[:16])


def test_an_instruction_with_input_asks_both(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", [{"instruction": "Add.", "input": "1 2", "output": "3"}])
    assert data.read(dataset(path))[0].messages[0]["content"] == "Add.\n\n1 2"


SYSTEM = {"role": "system", "content": "s"}
FAULTS: list[tuple[Any, str]] = [
    ("{not json", "is not JSON"),
    ("[1, 2]", "is a list"),
    ("3", "is a int"),
    ('"text"', "is a str"),
    ("null", "is a NoneType"),
    ({}, "has the fields []"),
    ({"prompt": "x"}, "has the fields ['prompt']"),
    ({"text": "x"}, "needed: prompt/response"),
    ({"prompt": "x", "response": None}, "response that is null"),
    ({"prompt": 3, "response": "y"}, "prompt that is int"),
    ({"prompt": "x", "response": ["y"]}, "response that is list"),
    ({"prompt": "x", "response": ""}, "empty response"),
    ({"prompt": " \n", "response": "y"}, "empty prompt"),
    ({"question": "x", "answer": {}}, "answer that is dict"),
    ({"instruction": "x", "output": "y", "input": 5}, "input that is int"),
    ({"prompt": "x", "response": "y", "id": 1.5}, "id that is a float"),
    ({"prompt": "x", "response": "y", "id": []}, "id that is a list"),
    ({"messages": []}, "not a list of messages"),
    ({"messages": "x"}, "not a list of messages"),
    ({"messages": [1]}, "message 1"),
    ({"messages": [{"content": "x"}]}, "message 1 in messages without a role"),
    ({"messages": [{"role": "bot", "content": "x"}]}, "without a role among"),
    ({"messages": [CHAT[0]]}, "do not alternate"),
    ({"messages": [CHAT[1]]}, "do not alternate"),
    ({"messages": [CHAT[1], CHAT[0]]}, "do not alternate"),
    ({"messages": [CHAT[0], CHAT[0], CHAT[1]]}, "do not alternate"),
    ({"messages": [*CHAT, CHAT[0]]}, "do not alternate"),
    ({"messages": [SYSTEM]}, "do not alternate"),
    ({"messages": [CHAT[0], {"role": "assistant", "content": None}]}, "content that is null"),
    ({"messages": [CHAT[0], {"role": "assistant", "content": ""}]}, "empty content"),
    ({"real": None}, "real that are not a list"),
]


@pytest.mark.parametrize(("row", "fault"), FAULTS, ids=[str(i) for i in range(len(FAULTS))])
def test_a_malformed_row_is_named_with_its_number(row: Any, fault: str, tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", [*GOOD[:2], row])
    with pytest.raises(DataError) as raised:
        data.read(dataset(path))
    assert "row 3 " in raised.value.why and fault in raised.value.why
    assert raised.value.where == str(path)


def test_a_row_without_a_field_of_a_message_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", [{"messages": [{"role": "user"}, CHAT[1]]}])
    with pytest.raises(DataError, match="cannot be read"):
        data.read(dataset(path))


def test_all_faults_are_found_in_one_pass_and_twenty_are_shown(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", [{"prompt": "x"}] * 25)
    with pytest.raises(DataError) as raised:
        data.read(dataset(path))
    assert raised.value.what.startswith("25 rows") and "row 20 " in raised.value.why and "5 more" in raised.value.why


def test_a_second_row_with_one_id_is_refused_but_equal_rows_count_once(tmp_path: Path) -> None:
    with pytest.raises(DataError) as raised:
        data.read(dataset(write(tmp_path / "x.jsonl", [row | {"id": "a"} for row in GOOD[:2]])))
    assert "row 2 has the id 'a' of row 1" in raised.value.why
    assert len(data.read(dataset(write(tmp_path / "y.jsonl", [*GOOD, *GOOD])))) == len(GOOD)


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
    path = write(tmp_path / "a.jsonl", [*GOOD, {"prompt": "long", "response": "x" * 600}])
    splits, summary = data.prepare(dataset(path), TOKENIZER, ENDS)
    assert len(summary["dropped"]) == 1 and "row 13" in summary["dropped"][0] and "601 > 512" in summary["dropped"][0]
    assert sum(map(len, splits.values())) == len(GOOD)


def test_no_row_reaches_training_with_text_that_ends_an_answer(tmp_path: Path) -> None:
    with pytest.raises(Unusable, match="ends an answer"):
        render.render(TOKENIZER, [CHAT[0], {"role": "assistant", "content": "a<|end|>b"}], ENDS)


def test_a_bad_file_exits_3_and_leaves_nothing(command: Command, tmp_path: Path) -> None:
    for content, named in (('{"prompt": 1}', "row 1"), ("", "empty"), (json.dumps(GOOD[0]), "too few rows")):
        path = write(tmp_path / "x.jsonl", [content])
        result = command("train", *SMALL[:4], "dataset=jsonl", f"dataset.path={path}", f"outputs={tmp_path / 'o'}")
        assert result.code == 3 and named in result.err, result.err
        assert not (tmp_path / "o").exists()
    missing = command(
        "train", "tracker=none", "dataset=jsonl", "dataset.path=nowhere.jsonl", f"outputs={tmp_path / 'o'}"
    )
    assert missing.code == 3 and "nowhere.jsonl" in missing.err


def test_ones_own_file_trains_the_tiny_model(train: Callable[..., Path], tmp_path: Path) -> None:
    path = write(tmp_path / "mine.jsonl", [{"question": f"{i} + 1?", "answer": f"{i + 1} é"} for i in range(40)])
    root = train("dataset=jsonl", f"dataset.path={path}", "dataset.max_response_tokens=16")
    metrics = json.loads((root / "iterate-02/evaluate/metrics.json").read_text())
    assert "eval/kl_data" not in metrics and metrics["eval/heldout_nll"] > 0
    row = pq.read_table(root / "iteration-00/pairs.parquet").to_pylist()[0]
    assert TOKENIZER.decode(row["real_ids"][:-1]) == row["real"]


def test_a_hub_data_set_is_read_from_a_folder_too(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder / "train.jsonl", [{"messages": CHAT}, {"messages": [SYSTEM, *CHAT, *CHAT]}])
    examples = data.read(Hub(path=str(folder), split="train"))
    assert examples[0].messages == CHAT
    assert len(examples[1].messages) == 5


def test_a_folder_like_a_hub_data_set_trains(train: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder / "train.jsonl", [{"prompt": f"{i}?", "response": f"{i}!"} for i in range(40)])
    root = train("dataset=hub", f"dataset.path={folder}")
    assert len(pq.read_table(root / "iteration-01/pairs.parquet")) == 24


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(min_size=1).filter(str.strip), min_size=2, max_size=6))
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


def test_null_ids_are_no_ids_and_half_a_character_is_no_text(tmp_path: Path) -> None:
    rows = [row | {"id": None} for row in GOOD[:2]]
    assert len(data.read(dataset(write(tmp_path / "a.jsonl", [*rows, rows[0]])))) == 2
    with pytest.raises(DataError) as raised:
        data.read(dataset(write(tmp_path / "b.jsonl", ['{"prompt": "x\\ud800", "response": "y"}'])))
    assert "row 1 has a prompt with half a surrogate pair" in raised.value.why


def test_equal_files_under_other_names_are_another_source(tmp_path: Path) -> None:
    from spin_reg import sources

    for place, names in (("a", ("test", "train")), ("b", ("train", "validation"))):
        for name, content in zip(names, ("A", "B"), strict=True):
            (tmp_path / place / name).mkdir(parents=True)
            (tmp_path / place / name / "x").write_text(content)
    one, two = (sources.data_sha256(Hub(path=str(tmp_path / place))) for place in ("a", "b"))
    assert one != two
