"""Rows from files: every layout read; every fault named with its row, field and rule, all in one pass."""

import itertools
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import SMALL, Command, read_all

from spin_reg import iterates, models, tables
from spin_reg.corpora import Hub, Jsonl, Turns
from spin_reg.errors import DataError
from spin_reg.fingerprint import digest
from spin_reg.layouts import Example
from spin_reg.tables import ANSWERS, EXAMPLES, SCORES

GOOD = [{"prompt": f"question {i}", "response": f"answer {i}"} for i in range(12)]
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
SYSTEM = {"role": "system", "content": "s"}
ROW = '{"prompt": "x", "response": "y"}'
OPEN = ROW[:-1]


def write(path: Path, lines: list[Any]) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def read(path: Path) -> list[Example]:
    return read_all(Jsonl(path=str(path)))[0]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "hi", "response": "yes"},
        {"question": "hi", "answer": "yes"},
        {"instruction": "hi", "output": "yes", "input": ""},
        {"messages": CHAT},
        {"real": CHAT, "generated": CHAT},
        {"prompt": "hi", "completion": "yes"},
        {"prompt": CHAT[:1], "completion": CHAT[1:]},
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]},
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
    (example,) = read(path)
    assert example.messages == CHAT
    assert example.number == 1
    assert example.example_id == ("7" if "id" in row else digest(CHAT)[:16])


def test_an_instruction_with_input_asks_both(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", [{"instruction": "Add.", "input": "1 2", "output": "3"}])
    assert read(path)[0].messages[0]["content"] == "Add.\n\n1 2"


LONG = [SYSTEM, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, *CHAT]


@pytest.mark.parametrize(
    ("row", "kwargs", "expected"),
    [
        ({"messages": LONG}, {}, LONG),
        ({"messages": LONG}, {"turns": Turns.first, "system_prompt": "other"}, LONG[:3]),
        ({"messages": LONG[1:]}, {"turns": Turns.first}, LONG[1:3]),
        ({"messages": CHAT}, {"system_prompt": "s"}, [SYSTEM, *CHAT]),
        ({"prompt": "hi", "response": "yes", "system": "s"}, {"system_prompt": "other"}, [SYSTEM, *CHAT]),
        ({"prompt": "hi", "response": "yes", "system": ""}, {}, CHAT),
        ({"instruction": "hi", "output": "yes", "system": None}, {"system_prompt": "s"}, [SYSTEM, *CHAT]),
        ({"prompt": LONG[:4], "completion": LONG[4:]}, {}, LONG),
        ({"conversations": [{"from": "system", "value": "s"}, *CHAT]}, {}, [SYSTEM, *CHAT]),
    ],
)
def test_turns_and_system_prompts(
    row: dict[str, Any], kwargs: dict[str, Any], expected: list[Any], tmp_path: Path
) -> None:
    path = write(tmp_path / "x.jsonl", [row])
    assert read_all(Jsonl(path=str(path), **kwargs))[0][0].messages == expected


@pytest.mark.parametrize("ending", ["jsonl", "json"])
def test_a_byte_order_mark_windows_line_ends_and_blank_lines_are_no_fault(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"x.{ending}"
    one, two = (json.dumps(row) for row in GOOD[:2])
    text = f"[{one},\r\n{two}]" if ending == "json" else f"{one}\r\n\r\n{two}\r\n"
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    found = read(path)
    assert [example.messages[1]["content"] for example in found] == ["answer 0", "answer 1"]
    assert [example.number for example in found] == ([1, 2] if ending == "json" else [1, 3])


# What stands in row 3, as a value or as the line itself, and what is said of it.
FAULTS: list[tuple[Any, str]] = [
    ("{not json", "is not JSON"),
    (OPEN, "is not JSON"),
    (f"{ROW} {ROW}", "is not JSON: Extra data"),
    ("\0\0\0\0", "is not JSON"),
    ('{"prompt": "x\0", "response": "y"}', "is not JSON: Invalid control character"),
    (f'{OPEN}, "n": {"9" * 5000}}}', "is not JSON: Exceeds the limit"),
    (b'{"prompt": "caf\xe9", "response": "y"}', "is not UTF-8 (byte 16 is 0xe9)"),
    ("[" * 100_000, "is nested too deeply"),
    ('{"a":' * 100_000, "is nested too deeply"),
    ("[[1], [2]]", "is a list, not an object"),
    ("3", "is a number, not an object"),
    ("true", "is a boolean, not an object"),
    ('"text"', "is text, not an object"),
    ("null", "is null, not an object"),
    ("NaN", "is NaN, which JSON does not have"),
    (f'{OPEN}, "score": NaN}}', "has a field 'score' that is NaN"),
    (f'{OPEN}, "scores": [1, [-Infinity]]}}', "'scores' that holds an item 2 that holds an item 1 that is -Inf"),
    ('{"prompt": 1, "prompt": "x", "response": "y"}', "has the key 'prompt' twice"),
    ('{"messages": [{"role": "user", "role": "user"}]}', "that holds an item 1 that has the key 'role' twice"),
    ('{"a":' * 300 + "NaN" + "}" * 300, "has a field 'a' that has a field 'a' that "),
    ({}, "has the fields []"),
    ({"k" * 10_000 + str(i): 1 for i in range(9)}, "kkk...', ...]; needed: prompt/response"),
    ({"text": "x"}, "has the fields ['text']; needed: prompt/response"),
    ({"k" * 10_000: 1}, "kkk...'"),
    ({"prompt": "x"}, "has a field prompt but no response"),
    ({"answer": "x", "response": "x"}, "has a field response but no prompt"),
    ({"prompt": "x", "response": None}, "has a response that is null, not text"),
    ({"prompt": 3, "response": "y"}, "has a prompt that is a number"),
    ({"prompt": True, "response": "y"}, "has a prompt that is a boolean"),
    ({"prompt": "x", "response": ["y"]}, "has a response that is a list"),
    ({"prompt": "x", "response": ""}, "has an empty response"),
    ({"prompt": " \n", "response": "y"}, "has an empty prompt"),
    ({"question": "x", "answer": {}}, "has a answer that is an object"),
    ({"instruction": "x", "output": "y", "input": 5}, "has a input that is a number"),
    ({"prompt": "x\ud800", "response": "y"}, "has a prompt with half a surrogate pair"),
    ({"prompt": "x", "response": "y", "id": 1.5}, "has an id that is a number, not text or a whole number"),
    ({"prompt": "x", "response": "y", "id": True}, "has an id that is a boolean"),
    ({"prompt": "x", "response": "y", "id": []}, "has an id that is a list"),
    ({"prompt": "x", "response": "y", "id": ""}, "has an empty id"),
    ({"prompt": "x", "response": "y", "id": "\udfff"}, "has a id with half a surrogate pair"),
    ({"messages": []}, "has messages that are not a list of messages"),
    ({"messages": "x"}, "has messages that are not a list of messages"),
    ({"messages": {"role": "user"}}, "has messages that are not a list of messages"),
    ({"messages": [1]}, "has a message 1 in messages that is a number"),
    ({"messages": [CHAT]}, "has a message 1 in messages that is a list"),
    ({"messages": [CHAT[0], [["assistant", "yes"]]]}, "has a message 2 in messages that is a list"),
    ({"messages": [{"content": "x"}]}, "has a message 1 in messages without a role"),
    ({"messages": [{"role": "bot", "content": "x"}]}, "without a role among system, user, assistant"),
    ({"messages": [{"role": ["user"], "content": "x"}]}, "without a role among system, user, assistant"),
    ({"messages": [{"role": "user"}, CHAT[1]]}, "has a content of message 1 in messages that is null"),
    ({"messages": [CHAT[0], {"role": "assistant", "content": None}]}, "content of message 2 in messages that is null"),
    ({"messages": [CHAT[0], {"role": "assistant", "content": [CHAT]}]}, "of message 2 in messages that is a list"),
    ({"messages": [CHAT[0], {"role": "assistant", "content": ""}]}, "has an empty content of message 2"),
    ({"messages": [CHAT[0]]}, "do not alternate"),
    ({"messages": [CHAT[1]]}, "do not alternate"),
    ({"messages": [CHAT[1], CHAT[0]]}, "do not alternate"),
    ({"messages": [CHAT[0], CHAT[0], CHAT[1]]}, "do not alternate"),
    ({"messages": [*CHAT, CHAT[0]]}, "do not alternate"),
    ({"messages": [SYSTEM]}, "do not alternate"),
    ({"real": None}, "has real that are not a list"),
    ({"prompt": CHAT[:1], "completion": "yes"}, "has a completion that is text beside a prompt that is a list"),
    ({"prompt": "hi", "completion": CHAT[1:]}, "has a completion that is a list, not text"),
    ({"completion": "x"}, "has a field completion but no prompt"),
    ({"conversations": [{"from": "bot", "value": "x"}]}, "has a message 1 in conversations that is not from human"),
    ({"conversations": [{"from": "human"}, CHAT[1]]}, "has a content of message 1 in conversations that is null"),
    ({"prompt": "x", "response": "y", "system": 3}, "has a system that is a number"),
    ({"messages": [SYSTEM, *CHAT], "system": "s"}, "has a system prompt twice"),
]  # fmt: skip


def one_line(error: DataError) -> None:
    assert "\n" not in error.what + error.where + error.why + error.todo and len(str(error)) < 1000


@pytest.mark.parametrize(("row", "fault"), FAULTS, ids=[str(i) for i in range(len(FAULTS))])
def test_a_malformed_row_is_named_with_its_number(row: Any, fault: str, tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", [*GOOD[:2], ""])
    line = row if isinstance(row, str | bytes) else json.dumps(row)
    path.write_bytes(path.read_bytes() + (line.encode() if isinstance(line, str) else line))
    with pytest.raises(DataError) as raised:
        read(path)
    assert raised.value.why.startswith("row 3 ") and fault in raised.value.why
    assert raised.value.where == str(path)
    one_line(raised.value)


# A whole file, by its ending, and what is said of it.
FILES: list[tuple[str, bytes, str]] = [
    ("jsonl", b"", "no rows"),
    ("jsonl", b"\n \r\n\n", "no rows"),
    ("jsonl", json.dumps(GOOD[0]).encode("utf-16"), "row 1 is not UTF-8"),
    ("json", b"", "it is not JSON"),
    ("json", b"[]", "no rows"),
    ("json", b'[{"prompt": "x",]', "it is not JSON: "),
    ("json", b'[{"prompt": "caf\xe9"}]', "it is not UTF-8 (byte 17 is 0xe9)"),
    ("json", b"[" * 100_000, "it is nested too deeply"),
    ("json", b"[[1]]", "row 1 is a list"),
    ("json", b"3", "row 1 is a number"),
    ("json", f'[{ROW}, {OPEN}, "response": 1}}]'.encode(), "row 2 has the key 'response' twice"),
    ("json", f"[{ROW}, NaN]".encode(), "row 2 is NaN"),
    ("json", f'{{"data": [{ROW}]}}'.encode(), "row 1 has the fields ['data']"),
    ("parquet", b"", "it is not readable Parquet"),
    ("parquet", b"PAR1 garbage PAR1", "it is not readable Parquet"),
    ("parquet", json.dumps(GOOD[0]).encode(), "it is not readable Parquet"),
]  # fmt: skip


@pytest.mark.parametrize(("ending", "content", "fault"), FILES, ids=[f"{e}{i}" for i, (e, _, _) in enumerate(FILES)])
def test_a_file_that_cannot_be_read_says_why(ending: str, content: bytes, fault: str, tmp_path: Path) -> None:
    path = tmp_path / f"x.{ending}"
    path.write_bytes(content)
    with pytest.raises(DataError) as raised:
        read(path)
    assert fault in raised.value.why and raised.value.where == str(path)
    one_line(raised.value)


def test_a_parquet_file_cut_or_altered_anywhere_is_read_or_refused(tmp_path: Path) -> None:
    """Every 7th cut, and one byte changed at every 7th place: pyarrow answers with half a dozen exception classes."""
    path = tmp_path / "x.parquet"
    pq.write_table(pa.Table.from_pylist(GOOD), path)
    whole, refused = path.read_bytes(), 0
    for i in range(0, len(whole), 7):
        for content in (whole[:i], whole[:i] + bytes([whole[i] ^ 0xFF]) + whole[i + 1 :]):
            path.write_bytes(content)
            try:
                read(path)
            except DataError as error:
                one_line(error)
                refused += 1
    assert refused > len(whole) / 7


@pytest.mark.parametrize("kind", [pa.ArrowNotImplementedError, pa.ArrowKeyError, pa.ArrowTypeError, OSError])
def test_whatever_pyarrow_raises_is_told(
    kind: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(path: Path) -> None:
        raise kind("a reason\nof two lines")

    monkeypatch.setattr(pq, "ParquetFile", broken)
    (tmp_path / "x.parquet").touch()
    with pytest.raises(DataError) as raised:
        read(tmp_path / "x.parquet")
    assert "a reason of two lines" in raised.value.why
    one_line(raised.value)


PROMPTS = pa.array(["x", "z"])
FAR = pa.array([2**62, 0], pa.timestamp("us"))  # outside the years that Python has
NOT_UTF8 = pa.Array.from_buffers(pa.string(), 2, pa.array([b"x", b"\xff"], pa.binary()).buffers())


@pytest.mark.parametrize(
    ("columns", "fault"),
    [
        ({"prompt": PROMPTS, "response": pa.array([1, 2])}, "row 1 has a response that is a number, not text; row 2 "),
        ({"prompt": PROMPTS, "response": pa.array([b"y", b"y"])}, "row 1 has a response that is bytes"),
        ({"prompt": PROMPTS, "response": pa.array(["y", None])}, "row 2 has a response that is null"),
        ({"prompt": PROMPTS, "response": FAR}, "it is not readable Parquet"),
        ({"prompt": PROMPTS, "response": NOT_UTF8}, "it is not readable Parquet: 'utf-8' codec"),
        ({"messages": pa.array([["x"], ["y"]])}, "row 1 has a message 1 in messages that is text"),
        ({"prompt": PROMPTS}, "row 1 has a field prompt but no response"),
        ({"prompt": PROMPTS, "response": PROMPTS, "id": pa.array([0.5, 1])}, "row 1 has an id that is a number"),
        ({"prompt": pa.array([], pa.string()), "response": pa.array([], pa.string())}, "no rows"),
    ],
    ids=itertools.count(),
)
def test_a_parquet_column_of_a_wrong_type_is_named(columns: dict[str, Any], fault: str, tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table(columns), path)
    with pytest.raises(DataError) as raised:
        read(path)
    assert fault in raised.value.why
    one_line(raised.value)


def test_a_parquet_file_that_has_a_column_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table([PROMPTS, PROMPTS, PROMPTS], names=["prompt", "response", "prompt"]), path)
    with pytest.raises(DataError) as raised:
        read(path)
    assert raised.value.why == "it has the column 'prompt' twice"


def test_all_faults_are_found_in_one_pass_and_twenty_are_shown(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", [{"prompt": "x"}] * 25)
    with pytest.raises(DataError) as raised:
        read(path)
    why = raised.value.why
    assert raised.value.what.startswith("25 rows")
    assert "row 20 " in why and "row 21 " not in why and why.endswith("; and 5 more")


@pytest.mark.parametrize(("first", "second", "shown"), [("a", "a", "'a'"), (1, "1", "'1'"), ("a\n", "a\n", r"'a\n'")])
def test_a_second_row_with_one_id_is_refused(first: Any, second: Any, shown: str, tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", [GOOD[0] | {"id": first}, GOOD[1] | {"id": second}])
    with pytest.raises(DataError) as raised:
        read(path)
    assert raised.value.why == f"row 2 has the id {shown} of row 1"


def test_equal_rows_without_an_id_count_once_and_are_counted(tmp_path: Path) -> None:
    examples, duplicates = read_all(Jsonl(path=str(write(tmp_path / "x.jsonl", [*GOOD, *GOOD[:3], GOOD[0]]))))
    assert len(examples) == len(GOOD) and duplicates == 4
    null = [row | {"id": None} for row in GOOD[:2]]  # null ids are no ids
    assert read_all(Jsonl(path=str(write(tmp_path / "y.jsonl", [*null, null[0]]))))[1] == 1


def test_a_hub_data_set_is_read_from_a_folder_too(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder / "train.jsonl", [{"messages": CHAT}, {"messages": [SYSTEM, *CHAT, *CHAT]}])
    examples, _ = read_all(Hub(path=str(folder), split="train"))
    assert examples[0].messages == CHAT
    assert len(examples[1].messages) == 5


BAD_FILES: list[tuple[str, bytes, str]] = [
    ("x.jsonl", b'{"prompt": 1, "response": "y"}\n{"prompt": "caf\xe9", "response": "y"}', "row 2 is not UTF-8"),
    ("x.jsonl", b"[" * 100_000, "row 1 is nested too deeply"),
    ("x.jsonl", b'{"prompt": 1, "prompt": "x", "response": "y"}', "row 1 has the key 'prompt' twice"),
    ("x.jsonl", json.dumps({"prompt": "x", "response": "y" * 20_000_000}).encode(), "row 1 ('"),
    ("x.jsonl", b"", "no rows"),
    ("x.jsonl", json.dumps(GOOD[0]).encode(), "1 prompts are held out and 0 rows are left"),
    ("x.json", b"[" * 100_000, "it is nested too deeply"),
    ("x.parquet", b"PAR1 garbage PAR1", "it is not readable Parquet"),
    ("x.csv", b"prompt,response\nx,y\n", ".csv files are not read"),
    ("x.jsonl.gz", b"\x1f\x8b", ".gz files are not read"),
    ("folder/x.jsonl", b"", "reads one file"),
    ("elsewhere.jsonl", b"", "no such file"),
]


@pytest.mark.parametrize(("name", "content", "fault"), BAD_FILES, ids=[str(i) for i in range(len(BAD_FILES))])
def test_bad_data_exit_3_in_four_lines_leave_nothing_and_load_no_model(
    name: str, content: bytes, fault: str, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a model was loaded before the data were known to be good")

    monkeypatch.setattr(models, "from_folder", never)
    monkeypatch.setattr(iterates, "load", never)
    path = tmp_path / "data" / name
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    given = {"folder/x.jsonl": path.parent, "elsewhere.jsonl": tmp_path / "data/nowhere.jsonl"}.get(name, path)
    result = command("train", *SMALL[:4], "dataset=jsonl", f"dataset.path={given}", f"outputs={tmp_path / 'o'}")
    assert result.code == 3, result.err
    lines = result.err.splitlines()
    assert [line.split(":")[0].strip() for line in lines] == ["spin-reg", "where", "why", "to do"]
    assert str(given) in lines[1] and fault in lines[2]
    assert [p.name for p in tmp_path.iterdir()] == ["data"]


SIZE = """
import sys
from collections.abc import Iterator, Sequence
from spin_reg import index
from spin_reg.corpora import Jsonl

def peak():
    return int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))

before = peak()
with index.opened(Jsonl(path=sys.argv[1])) as found:
    print(len(found), peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of memory is read from Linux's /proc")
def test_the_memory_of_reading_hangs_on_the_number_of_rows_and_not_on_their_text(tmp_path: Path) -> None:
    """kB over the start: 40,000 rows of 4 kB (160 MB of text) take no more than rows of 200 bytes: 300 bytes each."""
    taken = []
    for chars in (100, 2000):
        lines = (json.dumps({"prompt": f"{i} {'x' * chars}", "response": f"{i} {'y' * chars}"}) for i in range(40000))
        path = tmp_path / f"{chars}.jsonl"
        path.write_text("\n".join(lines))
        done = subprocess.run([sys.executable, "-c", SIZE, str(path)], capture_output=True, text=True, check=True)
        rows, peak = map(int, done.stdout.split())
        assert rows == 40000
        taken.append(peak)
    assert max(taken) < 40000 * 300 / 1000 + 3000 and abs(taken[0] - taken[1]) < 3000, taken


TABLES = """
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from spin_reg import fit, opponents, tables
from spin_reg.context import Context
from spin_reg.opponents import Iterate
from spin_reg.roles import answers_role, generated_role, real_role
from spin_reg.specs import PairsSpec
from spin_reg.stages import pairs, train

folder, stage = Path(sys.argv[1]), sys.argv[2]

def peak():
    return int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))

before = peak()
if stage == "pairs":
    spec = PairsSpec(t=0, window=(0,), reference=opponents.to_json(Iterate(0)), draw=None)
    inputs = {role: folder for role in ("data", answers_role(0), real_role(0), generated_role(0, 0))}
    pairs.run(spec, inputs, folder, Context())
else:
    path = folder / "pairs.parquet"
    rows = tables.read(path, columns=train.TRAINED, kept=tables.IN_ANY_ORDER)
    names = tables.column("example_id", path)
    for step in fit.batches(names, seed=0, iteration=0, epochs=1, size=8)[:250]:
        assert all(len(rows[i]["generated_ids"]) == 200 for i in step)
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of memory is read from Linux's /proc")
def test_the_memory_of_pairs_and_of_training_hangs_on_the_number_of_rows_and_not_on_their_text(tmp_path: Path) -> None:
    """kB over the start, for 20,000 rows and for 40,000: each further row holds 8.4 kB, and takes less than 1.5 kB."""
    text, ids = "x" * 2000, [5] * 200

    def made(rows: int, answerers: Sequence[int | None] = (0,)) -> Iterator[dict[str, Any]]:
        for i, j in itertools.product(range(rows), answerers):
            yield {
                **{"example_id": f"row-{i:06d}", "sampled_from": j, "finish_reason": "stop", "logprob": -1.0},
                **dict.fromkeys(("prompt_ids", "real_ids", "generated_ids"), ids),
                **dict.fromkeys(("prompt", "real", "generated"), f"{i} {text}"),
            }

    taken = []
    for rows in (20000, 40000):
        folder = tmp_path / str(rows)
        folder.mkdir()
        for name, schema in {"train": EXAMPLES, "answers": ANSWERS}.items():
            tables.write(folder / f"{name}.parquet", made(rows), schema)
        tables.write(folder / "scores.parquet", made(rows, [None, 0]), SCORES)
        words = [[sys.executable, "-c", TABLES, str(folder), stage] for stage in ("pairs", "train")]
        taken.append([int(subprocess.run(w, capture_output=True, text=True, check=True).stdout) for w in words])
        assert len(tables.read(folder / "pairs.parquet")) == rows
    growth = [(more - less) / 20000 for less, more in zip(*taken, strict=True)]
    assert max(growth) < 1.5, (growth, taken)
