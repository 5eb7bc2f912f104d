"""Parquet tables: written durably, read whole, joined by id and never by position."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from spin_reg import durable
from spin_reg.errors import DamagedError

Row = dict[str, Any]
IDS = pa.list_(pa.int32())

EXAMPLES = pa.schema(
    [
        ("example_id", pa.string()),
        ("prompt_ids", IDS),
        ("real_ids", IDS),
        ("data_logprob", pa.float64()),  # log p_data(real | prompt) where it is known, else null
        ("prompt", pa.string()),
        ("real", pa.string()),
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
SCORES = pa.schema(
    [
        ("example_id", pa.string()),
        ("logprob", pa.float64()),
        ("token_logprobs", pa.list_(pa.float32())),  # of held-out answers only, else null
    ]
)
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


def write(path: Path, rows: Sequence[Row], schema: pa.Schema) -> None:
    """Rows as one Parquet file; the same rows make the same bytes."""
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), sink)
    durable.write_bytes(path, sink.getvalue().to_pybytes())


def read(path: Path) -> list[Row]:
    """The rows of a Parquet file."""
    rows: list[Row] = pq.read_table(path).to_pylist()
    return rows


def by_id(rows: Iterable[Row], where: Path) -> dict[str, Row]:
    """Rows by `example_id`; a second row with one id is an error."""
    found: dict[str, Row] = {}
    for row in rows:
        if found.setdefault(row["example_id"], row) is not row:
            raise DamagedError(
                "A table has two rows with one id.",
                where=f"{where}, example_id {row['example_id']}",
                why="rows are joined by id, so an id stands once",
                todo="delete the folder that holds the table; the next call makes it again",
            )
    return found


def in_shards(
    rows: Sequence[Row],
    make: Callable[[Sequence[Row]], list[Row]],
    *,
    out: Path,
    name: str,
    schema: pa.Schema,
    size: int,
    done: Callable[[int, int], None],
) -> None:
    """Map rows to rows shard by shard into `out/name`; a call after a kill goes on at the first missing shard.

    A shard is published when it is whole. `make` sees one shard only, so what it returns never depends on the others.
    """
    shards = out / "shards"
    shards.mkdir(exist_ok=True)
    paths = []
    for start in range(0, len(rows), size):
        path = shards / f"{start:09d}.parquet"
        paths.append(path)
        if not path.exists():
            write(path, make(rows[start : start + size]), schema)
        done(min(start + size, len(rows)), len(rows))
    write(out / name, [row for path in paths for row in read(path)], schema)
    for path in paths:
        path.unlink()
    shards.rmdir()


def in_batches(
    rows: Sequence[Row], make: Callable[[Sequence[Row]], list[Row]], *, size: int, length: Callable[[Row], int]
) -> list[Row]:
    """Map rows to rows in batches of like length; results stand in the order of the rows."""
    positions = sorted(range(len(rows)), key=lambda i: length(rows[i]))
    made: list[Row | None] = [None] * len(rows)
    for start in range(0, len(rows), size):
        picked = positions[start : start + size]
        for i, row in zip(picked, make([rows[i] for i in picked]), strict=True):
            made[i] = row
    return [row for row in made if row is not None]
