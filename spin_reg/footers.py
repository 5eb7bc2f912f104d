"""What Parquet files weigh: read off their ends, and foretold from a schema and what such columns weighed before.

A file is a footer, that says of every column of every row group where it lies and what its least and greatest values
are, and the columns. In a table of few rows the footer and the pages' headers are most of it. How much that is, is not
known here: a table of the same schema with the least rows is written, and weighed.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from struct import pack
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from spin_reg.errors import DamagedError
from spin_reg.spool import BATCH


@dataclass(frozen=True)
class Columns:
    """What the end of a Parquet file tells of it: rows, and of every column its values (tokens, of lists) and bytes.

    Attributes:
        groups: row groups. bytes: as they lie on the disk, `unpacked`: before compression, page headers in both.
        bounds: bytes of the least and the greatest texts of a column's row groups: they stand in the footer and once
            more in the pages' headers. null: the columns without a value.
    """

    rows: int
    groups: int
    values: Mapping[str, int]
    bytes: Mapping[str, int]
    unpacked: Mapping[str, int]
    bounds: Mapping[str, int]
    null: frozenset[str]

    def mean(self, name: str) -> float:
        """Values a row."""
        return self.values[name] / max(1, self.rows)


def columns(path: Path) -> Columns:
    """Read off the file's end alone.

    Raises:
        DamagedError: it is no Parquet file, or not there.
    """
    try:
        found = pq.read_metadata(path)
    except (pa.ArrowException, OSError) as error:
        todo = "the next train makes its stage again"
        raise DamagedError("A table cannot be read.", where=str(path), why=str(error), todo=todo) from error
    return _columns(found)


def _columns(found: pq.FileMetaData) -> Columns:
    values, packed, unpacked, bounds, nulls = (Counter[str]() for _ in range(5))
    for group in map(found.row_group, range(found.num_row_groups)):
        for column in map(group.column, range(group.num_columns)):
            name = column.path_in_schema.partition(".")[0]
            values[name] += column.num_values
            packed[name] += column.total_compressed_size
            unpacked[name] += column.total_uncompressed_size
            said = column.statistics
            if said is not None and said.has_min_max:
                bounds[name] += sum(len(text.encode()) for text in (said.min, said.max) if isinstance(text, str))
            nulls[name] += said.null_count if said is not None and said.has_null_count else 0
    null = frozenset(name for name in values if nulls[name] == values[name])
    return Columns(found.num_rows, found.num_row_groups, values, packed, unpacked, bounds, null)


@dataclass(frozen=True)
class Frame:
    """Bytes of the least table of a schema: of the file alone, of each row group, and of a group's columns in that."""

    file: int
    group: int
    columns: Mapping[str, int]


@lru_cache(maxsize=64)
def frame(schema: pa.Schema, null: frozenset[str] = frozenset()) -> Frame:
    """Weighed: a row of zeros and empty texts in one row group, and in two; `null`: columns without a value."""
    row = [pa.nulls(1, field.type) if field.name in null else _least(field.type) for field in schema]
    batch = pa.RecordBatch.from_arrays(row, schema=schema)
    made = []
    for groups in (1, 2):
        sink = BytesIO()
        with pq.ParquetWriter(sink, schema) as writer:
            for _ in range(groups):
                writer.write_batch(batch)
        made.append(sink)
    one, two = (len(sink.getvalue()) for sink in made)
    return Frame(2 * one - two, two - one, _columns(pq.read_metadata(made[0])).bytes)


def _least(kind: pa.DataType) -> Any:
    """One zero, empty text, or list of one such, as an array. Of Python's own values Arrow would make none without
    importing pandas, which takes longer than all else here.
    """
    zeros = pa.py_buffer(bytes(8))  # a number, or where a text begins and ends
    if pa.types.is_list(kind):
        bounds = pa.py_buffer(pack("=2i", 0, 1))
        return pa.Array.from_buffers(kind, 1, [None, bounds], children=[_least(kind.value_type)])
    if pa.types.is_string(kind):
        return pa.Array.from_buffers(kind, 1, [None, zeros, pa.py_buffer(b"")])
    return pa.Array.from_buffers(kind, 1, [None, zeros])


@dataclass(frozen=True)
class Cost:
    """Bytes of a column beside its frame: of every row group, and of each value (of a text, each token of its ids)."""

    group: float
    value: float
    unpacked: float

    def times(self, more: float) -> "Cost":
        """The same where values pack so many times as badly."""
        return replace(self, value=more * self.value)


def costs(found: Columns, schema: pa.Schema) -> dict[str, Cost]:
    """What the columns of a table that is there cost."""
    made = {}
    least = frame(schema, found.null).columns
    for name in set(schema.names) - found.null:
        count, fixed = found.values[_unit(name, schema)], found.groups * least[name] + found.bounds[name]
        each, plain = (max(0.0, (size[name] - fixed) / max(1, count)) for size in (found.bytes, found.unpacked))
        made[name] = Cost(2 * found.bounds[name] / max(1, found.groups), each, plain)
    return made


def weigh(
    schema: pa.Schema,
    rows: float,
    values: Mapping[str, float],
    known: Mapping[str, Cost],
    null: frozenset[str] = frozenset(),
) -> float:
    """Bytes of a table that is still to be made.

    Args:
        values: how many the columns have that have not one a row: tokens, and what is said again for some rows.
        known: what columns of these names cost; of others the types say it. null: columns without a value.
    """
    groups = max(1, math.ceil(rows / BATCH))
    least = frame(schema, null)
    total = float(least.file + groups * least.group)
    for field in schema:
        if field.name not in null:
            count = values.get(_unit(field.name, schema), rows)
            cost = known.get(field.name) or _by_type(field.type, count / groups)
            total += groups * cost.group + count * cost.value
    return total


def _unit(name: str, schema: pa.Schema) -> str:
    """The column whose values are counted for a column: the ids of a text, else itself."""
    return f"{name}_ids" if f"{name}_ids" in schema.names else name


def _by_type(kind: pa.DataType, count: float) -> Cost:
    """Of log-probs. Each value of a row group stands once, and is pointed at; sums over tokens are compressed by about
    as much as that takes. What is no fraction (an iterate's number, why an answer ended) is one of a few: nothing.
    """
    each = kind.value_type if pa.types.is_list(kind) else kind
    if not pa.types.is_floating(each):
        return Cost(0.0, 0.0, 0.0)
    size = each.bit_width / 8 + (math.log2(max(1.0, count)) / 8 if pa.types.is_list(kind) else 0.0)
    return Cost(0.0, size, size)
