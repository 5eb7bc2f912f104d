"""Rows on disk while they are worked on: an uncompressed Arrow file, memory-mapped, with a way to every row."""

import bisect
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from spin_reg import durable

BATCH = 256  # rows held in memory at a time
Row = dict[str, Any]


def batches(rows: Iterable[Row], schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """Rows as record batches of 256."""
    rows = iter(rows)
    while some := list(islice(rows, BATCH)):
        yield pa.RecordBatch.from_pylist(some, schema=schema)


class Spool:
    """Rows in a temporary file, in the order in which they were added; the file is the caller's to remove."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._schema, self._path = schema, path
        with durable.disk_errors(path):
            self._writer = pa.ipc.new_file(path, schema)
        self._starts: list[int] = []  # the first row of each batch
        self._count = 0
        self._late: list[Row] = []  # rows of a batch that is not full yet
        self._reader: Any = None

    def __len__(self) -> int:
        return self._count + len(self._late)

    def append(self, row: Row) -> None:
        """Add one row."""
        self._late.append(row)
        if len(self._late) == BATCH:
            self._flush()

    def add(self, batch: pa.RecordBatch) -> None:
        """Add a batch of rows."""
        self._starts.append(self._count)
        with durable.disk_errors(self._path):
            self._writer.write_batch(batch)
        self._count += batch.num_rows

    def __getitem__(self, i: int) -> Row:
        self._finish()
        n = bisect.bisect_right(self._starts, i) - 1
        (row,) = self._reader.get_batch(n).slice(i - self._starts[n], 1).to_pylist()
        return dict(row)

    def __iter__(self) -> Iterator[Row]:
        self._finish()
        with pa.OSFile(str(self._path)) as file:  # read, not mapped: no page of it stays in the process
            reader = pa.ipc.open_file(file)
            for n in range(len(self._starts)):
                yield from reader.get_batch(n).to_pylist()

    def _flush(self) -> None:
        late, self._late = self._late, []
        for batch in batches(late, self._schema):
            self.add(batch)

    def _finish(self) -> None:
        """Rows are read only when all were added."""
        if self._reader is None:
            self._flush()
            with durable.disk_errors(self._path):
                self._writer.close()
            self._reader = pa.ipc.open_file(pa.memory_map(str(self._path)))
