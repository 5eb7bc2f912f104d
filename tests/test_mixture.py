"""Several data sets in one: shares, one side and one count for a prompt, held-out prompts that never train."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import SMALL, Command
from hypothesis import example, given
from hypothesis import strategies as st

from spin_reg import corpora, data, models
from spin_reg.corpora import Jsonl, Mixture, Part, Unique
from spin_reg.errors import DataError
from spin_reg.specs import Split

TOKENIZER = models.byte_tokenizer()
ENDS = models.end_ids(None, TOKENIZER)


def rows(name: str, count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"{name} {i}", "response": f"answer {i}", "id": i} for i in range(count)]


def write(path: Path, lines: list[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(lines), path)
    else:
        path.write_text("\n".join(map(json.dumps, lines)))
    return path


def splits(dataset: corpora.Corpus) -> tuple[list[Any], list[Any], dict[str, Any]]:
    made, summary = data.prepare(dataset, TOKENIZER, ENDS)
    return list(made[Split.train]), list(made[Split.heldout]), summary


def test_a_mixture_trains_with_shares_of_its_parts(train: Callable[..., Path], tmp_path: Path) -> None:
    a, b = write(tmp_path / "a.jsonl", rows("a", 40)), write(tmp_path / "b.parquet", rows("b", 20))
    words = ["dataset=mixture", f"dataset.parts=[{{path:{a},weight:2}},{{path:{b},weight:1}}]"]
    root = train(*words, "generation.max_new_tokens=4", "schedule.iterations=1", "evaluation=none")
    counts = {
        split: Counter(row["source"] for row in pq.read_table(root / f"data/{split}.parquet").to_pylist())
        for split in ("train", "heldout")
    }
    assert counts == {"train": {str(a): 16, str(b): 8}, "heldout": {str(a): 5, str(b): 3}}
    parts = json.loads((root / "data/summary.json").read_text())["parts"]
    assert [(part["source"], part["rows"], part["train"], part["heldout"]) for part in parts] == [
        (str(a), 40, 16, 5),
        (str(b), 20, 8, 3),
    ]
    assert all(len(part["revision_or_sha256"]) == 64 for part in parts)


def test_the_runs_name_says_what_is_mixed(command: Command, tmp_path: Path) -> None:
    a, b = write(tmp_path / "a.jsonl", rows("a", 40)), write(tmp_path / "b.jsonl", rows("b", 20))
    result = command(
        "plan", *SMALL, f"dataset.parts=[{{path:{a}}},{{path:{b}}}]", "dataset=mixture", f"outputs={tmp_path / 'o'}"
    )
    assert result.code == 0 and "-mixture-a-b-" in result.out + result.err


@pytest.mark.parametrize(
    ("parts", "named"),
    [
        ("[]", "give a list of"),
        ("[{path:a.jsonl,weight:0}]", "weight=0"),
        ("[{path:a.jsonl,weight:-1}]", "weight=-1"),
        ("[{path:a.jsonl},{path:a.jsonl}]", "give each data set once"),
        ("[{path:a.jsonl,split:test}]", "leave out subset, revision and split"),
        ("[{path:a.jsonl,wieght:2}]", "wieght"),
        ("[{weight:2}]", "path"),
    ],
)
def test_parts_that_cannot_be_used_are_refused(parts: str, named: str, command: Command, tmp_path: Path) -> None:
    result = command("train", *SMALL, "dataset=mixture", f"dataset.parts={parts}", f"outputs={tmp_path / 'o'}")
    assert result.code == 2 and named in result.err, result.err


@given(st.integers(0, 1000), st.lists(st.floats(0.01, 100), min_size=1, max_size=5))
def test_shares_add_up_and_are_off_by_less_than_one(total: int, weights: list[float]) -> None:
    mixture = Mixture(parts=[Part(path=f"{i}.jsonl", weight=weight) for i, weight in enumerate(weights)])
    given_ = corpora.shares(mixture, total)
    assert sum(given_) == total
    assert all(abs(n - total * w / sum(weights)) < 1 for n, w in zip(given_, weights, strict=True))


@given(st.lists(st.tuples(st.integers(0, 50), st.floats(0.1, 10)), min_size=1, max_size=4))
def test_most_is_as_many_as_the_parts_have(parts: list[tuple[int, float]]) -> None:
    mixture = Mixture(parts=[Part(path=f"{i}.jsonl", weight=weight) for i, (_, weight) in enumerate(parts)])
    there = [count for count, _ in parts]
    enough = (zip(corpora.shares(mixture, n), there, strict=True) for n in range(sum(there) + 1))
    fits = [n for n, both in enumerate(enough) if all(share <= count for share, count in both)]
    assert corpora.most(mixture, there) == max(fits)


@given(st.integers(0, 1000), st.lists(st.integers(1, 99), min_size=1, max_size=5), st.sampled_from([2, 3, 7, 10]))
@example(total=141, weights=[5, 1], times=3)  # two halves are over
def test_weights_count_by_their_ratios_alone(total: int, weights: list[int], times: int) -> None:
    """1:1 is 2:2, 3:1 is 0.3:0.1, also where two remainders are equal, and whatever floats say of tenths."""

    def given_(typed: list[float]) -> list[int]:
        return corpora.shares(Mixture(parts=[Part(path=f"{i}.jsonl", weight=w) for i, w in enumerate(typed)]), total)

    plain = given_([float(w) for w in weights])
    assert plain == given_([float(w * times) for w in weights]) == given_([w / 10 for w in weights])


def mixture(tmp_path: Path, **kwargs: Any) -> Mixture:
    a, b = write(tmp_path / "a.jsonl", rows("a", 30)), write(tmp_path / "b.jsonl", rows("b", 12))
    parts = [Part(path=str(a), weight=1), Part(path=str(b), weight=1)]
    return Mixture(**({"parts": parts, "num_heldout": 4} | kwargs))


def test_without_a_number_no_row_is_repeated_and_shares_hold(tmp_path: Path) -> None:
    train, heldout, _ = splits(mixture(tmp_path))
    assert Counter(row["source"] for row in train) == {str(tmp_path / "a.jsonl"): 11, str(tmp_path / "b.jsonl"): 10}
    assert len({row["example_id"] for row in [*train, *heldout]}) == 25  # ids of two parts may be the same numbers


def test_a_part_with_too_few_rows_is_named_with_what_is_possible(tmp_path: Path) -> None:
    with pytest.raises(DataError) as raised:
        splits(mixture(tmp_path, num_prompts=24))
    assert "b.jsonl has 10 usable for train, and its share is 12" in raised.value.why
    assert "dataset.num_prompts to at most 21" in raised.value.todo
    assert len(splits(mixture(tmp_path, num_prompts=21))[0]) == 21


def test_a_prompt_in_two_parts_counts_once(tmp_path: Path) -> None:
    a = write(tmp_path / "a.jsonl", rows("x", 20))
    b = write(
        tmp_path / "b.jsonl",
        [row | {"response": "other", "id": f"x{row['id']}"} for row in rows("x", 10)] + rows("y", 20),
    )
    train, heldout, summary = splits(Mixture(parts=[Part(path=str(a)), Part(path=str(b))], num_heldout=4))
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in heldout}
    assert [part["duplicates"] for part in summary["parts"]] == [0, 10]
    assert all(row["source"] == str(a) for row in train if row["prompt"].startswith("x"))


def test_rows_that_say_the_same_count_once_with_and_without_ids(tmp_path: Path) -> None:
    one = rows("a", 20)
    again = [row | {"id": 100 + row["id"]} for row in one[:5]]
    bare = [{key: row[key] for key in ("prompt", "response")} for row in one[5:8]]
    path = write(tmp_path / "a.jsonl", [*one, *again, *bare, one[0]])
    train, heldout, summary = splits(Jsonl(path=str(path), num_heldout=2))
    assert (len(train), len(heldout), summary["duplicates"]) == (18, 2, 9)
    assert {row["example_id"] for row in [*train, *heldout]} == {str(i) for i in range(20)}


def test_rows_with_one_prompt_count_once_where_asked(tmp_path: Path) -> None:
    lines = [*rows("a", 20), *({"prompt": f"a {i}", "response": "another"} for i in range(6))]
    path = write(tmp_path / "a.jsonl", lines)
    assert len(splits(Jsonl(path=str(path), num_heldout=2))[0]) >= 22
    train, _, summary = splits(Jsonl(path=str(path), num_heldout=2, unique=Unique.prompt))
    assert len(train) == 18 and summary["duplicates"] == 6 and "another" not in {row["real"] for row in train}


def test_a_held_out_share_never_trains_whatever_else_the_file_holds(tmp_path: Path) -> None:
    """Prompts below the share are the same with more rows, other rows, another order, other answers and numbers."""
    lines = rows("a", 200)
    words: dict[str, Any] = {"num_heldout": 10, "heldout_share": 0.2}

    def sides(lines: list[dict[str, Any]], **kwargs: Any) -> tuple[set[str], list[str]]:
        path = write(tmp_path / "x.jsonl", lines)
        train, heldout, _ = splits(Jsonl(path=str(path), **(words | kwargs)))
        return {row["prompt"] for row in train}, [row["prompt"] for row in heldout]

    train, heldout = sides(lines)
    never = {row["prompt"] for row in lines} - train
    assert 20 < len(never) < 60 and set(heldout) < never and len(heldout) == 10
    assert sides([row | {"response": "other"} for row in reversed(lines)]) == (train, heldout)
    assert sides(lines, num_heldout=5) == (train, heldout[:5])
    fewer, same = sides(lines, num_prompts=20)
    assert fewer < train and same == heldout
    more, _ = sides([*lines, *({"prompt": f"b {i}", "response": "x"} for i in range(300))])
    assert not more & never and train < more
    half, _ = sides(lines[:100])
    assert half == {row["prompt"] for row in lines[:100]} & train
    with pytest.raises(DataError) as raised:
        sides(lines, num_heldout=100)
    assert "heldout_share (now 0.2" in raised.value.todo and "num_heldout (now 100)" in raised.value.todo


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
@pytest.mark.parametrize("own_ids", [True, False])
@pytest.mark.parametrize("kwargs", [{}, {"num_prompts": 10}, {"heldout_share": 0.4}, {"unique": Unique.prompt}])
def test_a_mixture_of_one_part_is_that_part(kwargs: dict[str, Any], own_ids: bool, ending: str, tmp_path: Path) -> None:
    """The same rows in the same order, under the same ids, whatever the weight; and the same summary."""
    lines = [*rows("a", 40), *({"prompt": f"a {i}", "response": "another", "id": 40 + i} for i in range(6))]
    if not own_ids:
        lines = [{key: row[key] for key in ("prompt", "response")} for row in [*lines, *lines[:3]]]
    path = str(write(tmp_path / f"a.{ending}", lines))
    alone = splits(Jsonl(path=path, num_heldout=4, **kwargs))
    assert splits(Mixture(parts=[Part(path=path, weight=0.3)], num_heldout=4, **kwargs)) == alone
    assert len(alone[0]) >= 10 and len(alone[1]) == 4


@pytest.mark.parametrize("num_prompts", [None, 15])
def test_equal_weights_are_equal_whatever_their_number(num_prompts: int | None, tmp_path: Path) -> None:
    """An odd number of rows of two equal parts: the one that is over goes to the same part."""
    parts = mixture(tmp_path).parts

    def weighing(weight: float) -> Any:
        return splits(
            mixture(tmp_path, parts=[Part(path=p.path, weight=weight) for p in parts], num_prompts=num_prompts)
        )

    assert weighing(1) == weighing(2) == weighing(0.1)
