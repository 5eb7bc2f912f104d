"""Parquet tables: written durably, read a few rows at a time, joined by id and never by position.

What a table costs in memory is its ids, numbers and a few hundred rows, whatever its length.
"""

import bisect
import logging
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from hashlib import sha256
from io import BytesIO
from itertools import chain
from pathlib import Path
from typing import Any, overload

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from spin_reg import durable, ranks
from spin_reg.errors import DamagedError
from spin_reg.spool import BATCH, batches
from spin_reg.spool import Row as Row

log = logging.getLogger(__name__)
IN_ORDER, IN_ANY_ORDER = 4, 64  # row groups of 256 rows that stay decoded, about 4 bytes a token
IDS = pa.list_(pa.int32())

EXAMPLES = pa.schema(
    [
        ("example_id", pa.string()),
        ("prompt_ids", IDS),
        ("real_ids", IDS),
        ("data_logprob", pa.float64()),  # log p_data(real | prompt) where it is known, else null
        ("prompt", pa.string()),
        ("real", pa.string()),
        ("source", pa.string()),  # the part of the data that the row is from; null where it was made
    ]
)
ANSWERS = pa.schema(
    [
        ("example_id", pa.string()),
        ("generated_ids", IDS),
        ("finish_reason", pa.string()),
        ("sampled_from", pa.int32()),
        ("generated", pa.string()),
    ]
)
PUBLISHED = pa.schema([("example_id", pa.string()), ("generated_ids", IDS), ("generated", pa.string())])
PREPARED = pa.unify_schemas([EXAMPLES, PUBLISHED])  # both, while they are made
SCORES = pa.schema(
    [
        ("example_id", pa.string()),
        ("sampled_from", pa.int32()),  # the iterate whose answer it is; null: the real answer
        ("logprob", pa.float64()),
        ("token_logprobs", pa.list_(pa.float32())),  # of held-out answers only, else null
    ]
)
CONVERSATIONS = pa.schema(
    [
        ("question_id", pa.string()),
        ("category", pa.string()),
        ("temperature", pa.float64()),
        ("answers", pa.list_(pa.string())),  # one a turn, as the next two
        ("finish_reasons", pa.list_(pa.string())),
        ("tokens", pa.list_(pa.int32())),
    ]
)
DIVERGENCES = pa.schema([("example_id", pa.string()), ("kl", pa.float64())])
PAIRS = pa.schema(
    [
        ("example_id", pa.string()),
        ("prompt_ids", IDS),
        ("real_ids", IDS),
        ("generated_ids", IDS),
        ("sampled_from", pa.int32()),
        ("finish_reason", pa.string()),
        ("reference_real_logprob", pa.float64()),
        ("reference_generated_logprob", pa.float64()),
        ("prompt", pa.string()),
        ("real", pa.string()),
        ("generated", pa.string()),
    ]
)


def write(path: Path, rows: Iterable[Row], schema: pa.Schema) -> None:
    """Rows as one Parquet file, 256 in memory at a time; the same rows make the same bytes."""
    with durable.writing(path) as stream:
        _fill(stream, rows, schema)


def _fill(sink: Any, rows: Iterable[Row], schema: pa.Schema) -> None:
    with pq.ParquetWriter(sink, schema) as writer:
        for batch in batches(rows, schema):
            writer.write_batch(batch)


def _parquet(rows: Sequence[Row], schema: pa.Schema) -> bytes:
    sink = pa.BufferOutputStream()
    _fill(sink, rows, schema)
    return bytes(sink.getvalue().to_pybytes())


class Rows(Sequence[Row]):
    """`count` rows, each made when it is asked for; a slice is a list."""

    def __init__(self, count: int, row: Callable[[int], Row]) -> None:
        self._count, self._row = count, row

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, i: int) -> Row: ...
    @overload
    def __getitem__(self, i: slice) -> list[Row]: ...
    def __getitem__(self, i: int | slice) -> Row | list[Row]:
        there = range(self._count)
        return [self._row(k) for k in there[i]] if isinstance(i, slice) else self._row(there[i])


def read(*paths: Path | BytesIO, columns: Sequence[str] | None = None, kept: int = IN_ORDER) -> Rows:
    """The rows of one or more Parquet files, one file after the other.

    Args:
        columns: what a row has; None: all. kept: row groups that stay decoded; more of them where rows are not asked
            for in their order.
    """
    files = [pq.ParquetFile(path) for path in paths]
    groups = [(file, g) for file in files for g in range(file.num_row_groups)]
    ends = array("q")
    for file, g in groups:
        ends.append((ends[-1] if ends else 0) + file.metadata.row_group(g).num_rows)

    @lru_cache(maxsize=kept)
    def group(n: int) -> pa.Table:
        file, g = groups[n]
        return file.read_row_group(g, columns=columns, use_threads=False)

    def row(i: int) -> Row:
        n = bisect.bisect_right(ends, i)
        table = group(n)
        (found,) = table.slice(i - (ends[n] - table.num_rows), 1).to_pylist()
        return dict(found)

    return Rows(ends[-1] if ends else 0, row)


def whole(source: Path | pa.NativeFile, columns: list[str] | None = None) -> pa.Table:
    """Some columns of a table, or all, in memory. (`pq.read_table` takes five times as long to begin.)"""
    with pq.ParquetFile(source) as file:
        return file.read(columns, use_threads=False)


def column(name: str, *paths: Path) -> list[Any]:
    """One column of ids or numbers, whole."""
    return [value for path in paths for value in whole(path, [name]).column(name).to_pylist()]


def lengths(name: str, *paths: Path) -> "array[int]":
    """How many tokens each row has in a column of token ids."""
    found = array("q")
    for path in paths:
        for batch in pq.ParquetFile(path).iter_batches(batch_size=BATCH, columns=[name], use_threads=False):
            found.extend(pc.list_value_length(batch.column(0)).to_pylist())
    return found


class ById(Mapping[str, Row]):
    """The rows of a table by `example_id`, in their order, each read when it is asked for.

    `only`: the rows that hold these values.
    """

    def __init__(self, path: Path, columns: Sequence[str] | None = None, only: Mapping[str, Any] | None = None) -> None:
        self._rows, self._places = read(path, columns=columns), dict[str, int]()
        for i, name in _names(path, only or {}):
            _once(name, self._places, path)
            self._places[name] = i

    def __getitem__(self, name: str) -> Row:
        return self._rows[self._places[name]]

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def numbers_by_id(name: str, path: Path, only: Mapping[str, Any] | None = None) -> dict[str, float]:
    """A column of numbers by `example_id`, of the rows that hold the values `only`; a second row with one id is an
    error.
    """
    found: dict[str, float] = {}
    values = column(name, path)
    for i, key in _names(path, only or {}):
        _once(key, found, path)
        found[key] = values[i]
    return found


def _names(path: Path, only: Mapping[str, Any]) -> Iterator[tuple[int, str]]:
    """Places and ids of the rows that hold these values."""
    held = [(column(name, path), value) for name, value in only.items()]
    for i, name in enumerate(column("example_id", path)):
        if all(values[i] == value for values, value in held):
            yield i, name


def _once(name: str, found: Mapping[str, object], where: Path) -> None:
    if name in found:
        raise DamagedError(
            "A table has two rows with one id.",
            where=f"{where}, example_id {name}",
            why="rows are joined by id, so an id stands once",
            todo="delete the folder that holds the table; the next call makes it again",
        )


def in_shards(
    rows: Sequence[Row],
    make: Callable[[Sequence[Row], Callable[[int], None]], list[Row]],
    *,
    out: Path,
    into: Mapping[str, pa.Schema],
    size: int,
    done: Callable[[int, int], None],
    poll: Callable[[], None] = lambda: None,
) -> None:
    """Map rows to rows shard by shard, and their columns into the tables `out/NAME`, by name; a call after a kill goes
    on at the first missing shard. Ranks that work together make every so-many-th each, and the main one the tables.

    A shard is published when it is whole, under a name that holds its SHA-256; one that was damaged since is named in
    the log and made again. `make` sees one shard only, so what it returns never depends on the others, nor on how many
    ranks there are; it is also given a function to say how many of the shard's rows are ready.

    Args:
        poll: called while the others are waited for; may raise.
    """
    shards, schema = out / durable.SCRATCH / f"shards-of-{size}", pa.unify_schemas(list(into.values()))
    durable.make_folder(shards)
    starts = range(0, len(rows), size)

    def finished() -> int:
        """Rows whose shards are there, whoever made them."""
        there = {int(path.name[:9]) for path in shards.glob("?????????-*.parquet")}
        return sum(min(size, len(rows) - start) for start in there)

    def shard(start: int, name: str | None = None) -> tuple[str, bytes]:
        found = _whole_shard(shards, start, name)
        if found is not None:
            return found
        before = finished()
        content = _parquet(make(rows[start : start + size], lambda n: done(before + n, len(rows))), schema)
        name = f"{start:09d}-{sha256(content).hexdigest()}.parquet"
        durable.write_bytes(shards / name, content)
        return name, content

    mine = []
    for start in starts[ranks.rank() :: ranks.world()]:
        mine.append(shard(start)[0])
        done(finished(), len(rows))
    names = sorted(chain.from_iterable(ranks.gathered(mine, poll)))  # begin with their starts
    for name, columns in into.items() if ranks.is_main() else ():
        made = (shard(*known)[1] for known in zip(starts, names, strict=True))
        write(out / name, (row for part in made for row in whole(pa.BufferReader(part)).to_pylist()), columns)


def _whole_shard(shards: Path, start: int, name: str | None) -> tuple[str, bytes] | None:
    """A shard that is there; by its name where that is known: of a shared disk lists may be old, names are not."""
    for path in shards.glob(f"{start:09d}-*.parquet") if name is None else [shards / name]:
        content = path.read_bytes() if path.exists() else b""
        if path.name == f"{start:09d}-{sha256(content).hexdigest()}.parquet":
            return path.name, content
        log.warning("%s is damaged: its rows are made again", path)
        durable.remove(path)
    return None


def in_batches(
    rows: Sequence[Row],
    make: Callable[[Sequence[Row]], list[list[Row]]],
    batches: Iterable[Sequence[int]],
    ready: Callable[[int], None],
) -> list[Row]:
    """Map each row to some rows, in batches of positions; results stand in the order of the rows.

    `ready` is told how many rows are.
    """
    made: list[list[Row]] = [[]] * len(rows)
    count = 0
    for picked in batches:
        for i, row in zip(picked, make([rows[i] for i in picked]), strict=True):
            made[i] = row
        count += len(picked)
        ready(count)
    return [row for some in made for row in some]
