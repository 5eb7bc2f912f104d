"""Parquet tables: written durably, read whole, joined by id and never by position."""

import logging
from collections.abc import Callable, Iterable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from spin_reg import durable
from spin_reg.errors import DamagedError

log = logging.getLogger(__name__)
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
    durable.write_bytes(path, _parquet(rows, schema))


def _parquet(rows: Sequence[Row], schema: pa.Schema) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), sink)
    return bytes(sink.getvalue().to_pybytes())


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

    A shard is published when it is whole, under a name that holds its SHA-256; one that was damaged since is named in
    the log and made again. `make` sees one shard only, so what it returns never depends on the others.
    """
    shards = out / durable.SCRATCH / "shards"
    durable.make_folder(shards)
    made: list[Row] = []
    for start in range(0, len(rows), size):
        content = _whole_shard(shards, start)
        if content is None:
            content = _parquet(make(rows[start : start + size]), schema)
            durable.write_bytes(shards / f"{start:09d}-{sha256(content).hexdigest()}.parquet", content)
        made += pq.read_table(pa.BufferReader(content)).to_pylist()
        done(min(start + size, len(rows)), len(rows))
    write(out / name, made, schema)


def _whole_shard(shards: Path, start: int) -> bytes | None:
    for path in shards.glob(f"{start:09d}-*.parquet"):
        content = path.read_bytes()
        if path.name == f"{start:09d}-{sha256(content).hexdigest()}.parquet":
            return content
        log.warning("%s is damaged: its rows are made again", path)
        durable.remove(path)
    return None


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
