"""Rows from files or the Hub, checked all in one pass: every fault is named with its row, its field and the rule."""

import codecs
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from spin_reg.errors import DataError
from spin_reg.fingerprint import digest
from spin_reg.redact import redacted
from spin_reg.render import Messages, Unusable
from spin_reg.settings import Dataset, Hub, Jsonl
from spin_reg.tables import Row

ROLES = ("system", "user", "assistant")
LAYOUTS = (("prompt", "response"), ("question", "answer"), ("instruction", "output"))
FORMATS = ("parquet", "json", "csv", "arrow", "text")  # of a Hub data set's files
CONVERSATIONS = ("messages", "real")  # `real` is the column of SPIN's published data
SHOWN = 20  # bad rows named in one error
KINDS = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", list: "a list", str: "text"}


@dataclass(frozen=True)
class Example:
    """A conversation whose last message is the real answer; `number` is its row, from 1."""

    example_id: str
    messages: Messages
    number: int


def read(dataset: Dataset) -> tuple[list[Example], int]:
    """Every row of a file or a Hub data set, and how many rows repeated an earlier one (those count once).

    Raises:
        DataError: the file cannot be read, has no rows, or has malformed ones (all found, the first 20 named).
    """
    if isinstance(dataset, Jsonl):
        where = str(Path(dataset.path).expanduser())
        return _checked(_file_rows(Path(where)), where)
    assert isinstance(dataset, Hub)
    return _checked(_hub_rows(dataset), f"{dataset.path}, split {dataset.split}")


def first(lines: list[str]) -> str:
    """The first 20 of a list of complaints, and how many more there are."""
    more = f"; and {len(lines) - SHOWN} more" if len(lines) > SHOWN else ""
    return "; ".join(lines[:SHOWN]) + more


def shown(text: str) -> str:
    """A text from the data as an error can show it: quoted, on one line, at most 60 characters."""
    return repr(text if len(text) <= 60 else text[:57] + "...")


def _file_rows(path: Path) -> Iterator[tuple[int, Any]]:
    if path.suffix == ".parquet":
        yield from enumerate(_parquet(path), start=1)
        return
    content = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    if path.suffix == ".json":
        try:
            rows = _parsed(content)
        except Unusable as fault:
            raise _unreadable(path, f"it {fault}", "mend it, or use .jsonl, where the row can be named") from fault
        yield from enumerate(rows if isinstance(rows, list) else [rows], start=1)
        return
    for number, line in enumerate(content.splitlines(), start=1):
        if line.strip():
            try:
                row = _parsed(line)
            except Unusable as fault:
                row = fault
            yield number, row


def _unreadable(path: Path, why: str, todo: str) -> DataError:
    return DataError("The data file cannot be read.", where=str(path), why=why, todo=todo)


def _parquet(path: Path) -> list[Row]:
    try:
        with pq.ParquetFile(path) as file:
            table = file.read()
        rows: list[Row] = table.to_pylist()
    except (OSError, ValueError, OverflowError, pa.ArrowException) as error:  # a damaged file raises any of these
        why = f"it is not readable Parquet: {' '.join(str(error).split())[:200]}"
        raise _unreadable(path, why, "write it anew, or give another dataset.path") from error
    twice = [name for name, count in Counter(table.column_names).items() if count > 1]
    if twice:  # one of the two is not in the rows
        raise _unreadable(path, f"it has the column {shown(twice[0])} twice", "rename one of them")
    return rows


def _parsed(content: bytes) -> Any:
    """A JSON value; an object or a constant that cannot be used has an Unusable in its place."""
    try:
        return json.loads(content.decode(), object_pairs_hook=_object, parse_constant=_constant)
    except UnicodeDecodeError as error:
        raise Unusable(f"is not UTF-8 (byte {error.start + 1} is 0x{content[error.start]:02x})") from None
    except RecursionError:
        raise Unusable("is nested too deeply") from None
    except ValueError as error:
        raise Unusable(f"is not JSON: {error}") from None


def _constant(name: str) -> Unusable:
    return Unusable(f"is {name}, which JSON does not have")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any] | Unusable:
    """A JSON object; one that has a key twice would lose a value silently."""
    row = dict(pairs)
    if len(row) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        return Unusable(f"has the key {shown(twice)} twice")
    for key, value in pairs:
        fault = _fault(value)
        if fault is not None:
            return Unusable(f"has a field {shown(key)} that {fault}")
    return row


def _fault(value: Any) -> str | None:
    if isinstance(value, Unusable):
        return str(value)
    for i, item in enumerate(value if isinstance(value, list) else [], start=1):
        fault = _fault(item)
        if fault is not None:
            return f"holds an item {i} that {fault}"
    return None


def _hub_rows(dataset: Hub) -> Iterator[tuple[int, Any]]:
    import datasets

    try:
        builder = datasets.load_dataset_builder(dataset.path, dataset.subset, revision=dataset.revision)
        kind = type(builder).__module__.rpartition(".")[2]
        if kind not in FORMATS:
            raise ValueError(f"it is made of {kind} files; only {', '.join(FORMATS)} are read: others can hold pickles")
        builder.download_and_prepare()
        table = builder.as_dataset(split=dataset.split)
    except Exception as error:  # the Hub's clients raise a dozen kinds; each means the data are not to be had
        raise DataError(
            "The data set could not be loaded.",
            where=f"dataset.path={dataset.path}, dataset.split={dataset.split}",
            why=f"{type(error).__name__}: {(redacted(str(error)).splitlines() or [''])[0][:200]}",
            todo="check the name, the split, the revision and the network",
        ) from error
    yield from enumerate(table, start=1)


def _checked(rows: Iterator[tuple[int, Any]], where: str) -> tuple[list[Example], int]:
    examples: dict[str, Example] = {}
    faults: list[str] = []
    duplicates = 0
    for number, row in rows:
        try:
            example = _example(row, number)
            twin = examples.setdefault(example.example_id, example)
            if twin is not example and row.get("id") is not None:
                raise Unusable(f"has the id {shown(example.example_id)} of row {twin.number}")
            duplicates += twin is not example
        except Unusable as fault:
            faults.append(f"row {number} {str(fault)[:500]}")
    if faults:
        raise DataError(
            f"{len(faults)} row{'s' if len(faults) > 1 else ''} of the data cannot be read.",
            where=where,
            why=first(faults),
            todo="mend or remove these rows (rows are counted from 1)",
        )
    if not examples:
        raise DataError("The data set is empty.", where=where, why="no rows", todo="give a file with rows")
    return list(examples.values()), duplicates


def _example(row: Any, number: int) -> Example:
    if isinstance(row, Unusable):
        raise row
    if not isinstance(row, dict):
        raise Unusable(f"is {_kind(row)}, not an object with fields")
    messages, own = _messages(row), row.get("id")
    if isinstance(own, str):
        own = _text(row, "id")
    elif own is not None and (isinstance(own, bool) or not isinstance(own, int)):
        raise Unusable(f"has an id that is {_kind(own)}, not text or a whole number")
    return Example(str(own) if own is not None else digest(messages)[:16], messages, number)


def _messages(row: Row) -> Messages:
    for prompt, response in LAYOUTS:
        if prompt in row and response in row:
            asked = _text(row, prompt)
            if prompt == "instruction" and row.get("input"):
                asked = f"{asked}\n\n{_text(row, 'input')}"
            return [{"role": "user", "content": asked}, {"role": "assistant", "content": _text(row, response)}]
    for key in CONVERSATIONS:
        if key in row:
            return _conversation(row[key], key)
    for layout in LAYOUTS:
        for there, missing in (layout, layout[::-1]):
            if there in row:
                raise Unusable(f"has a field {there} but no {missing}")
    names = ", ".join(shown(name) for name in sorted(row)[:5]) + (", ..." if len(row) > 5 else "")
    known = ", ".join("/".join(layout) for layout in LAYOUTS)
    raise Unusable(f"has the fields [{names}]; needed: {known}, or messages")


def _kind(value: Any) -> str:
    return "an object" if isinstance(value, dict) else KINDS.get(type(value), type(value).__name__)


def _text(row: Row, key: str, of: str = "") -> str:
    value = row.get(key)
    if not isinstance(value, str):
        raise Unusable(f"has a {key}{of} that is {_kind(value)}, not text")
    if not value.strip():
        raise Unusable(f"has an empty {key}{of}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise Unusable(f"has a {key}{of} with half a surrogate pair, which is no text") from None
    return value


def _conversation(value: Any, key: str) -> Messages:
    if not isinstance(value, list) or not value:
        raise Unusable(f"has {key} that are not a list of messages")
    messages: Messages = []
    for i, message in enumerate(value, start=1):
        if not isinstance(message, dict):
            raise Unusable(f"has a message {i} in {key} that is {_kind(message)}, not an object with role and content")
        if message.get("role") not in ROLES:
            raise Unusable(f"has a message {i} in {key} without a role among {', '.join(ROLES)}")
        messages.append({"role": message["role"], "content": _text(message, "content", f" of message {i} in {key}")})
    turns = [m["role"] for m in messages if m["role"] != "system"]
    if turns[-1:] != ["assistant"] or turns != ["user", "assistant"] * (len(turns) // 2):
        raise Unusable(f"has {key} that do not alternate user, assistant, ..., ending with the assistant's answer")
    return messages
