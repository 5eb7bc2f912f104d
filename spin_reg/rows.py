"""Rows from files or the Hub: read once in their order, and again by their places, without holding them."""

import codecs
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from spin_reg import sources, stopping
from spin_reg.corpora import Hub, Jsonl
from spin_reg.errors import DataError
from spin_reg.layouts import shown
from spin_reg.redact import redacted
from spin_reg.render import Unusable
from spin_reg.spool import BATCH, Spool

Progress = Callable[[int, int, str], None]  # done, total, unit; raises where a signal asks to stop
FORMATS = ("parquet", "json", "csv", "arrow", "text")  # of a Hub data set's files
OTHERS = {*(".csv", ".tsv", ".xlsx", ".arrow", ".feather"), *(".gz", ".bz2", ".xz", ".zst", ".zip")}
SHOWN = 20  # bad rows named in one error


@dataclass(frozen=True)
class Source:
    """Rows to be read once in their order, and then by their places.

    `scan` yields a row's number (from 1), its place and the row, or an Unusable in its stead.
    """

    where: str
    scan: Callable[[Progress], Iterator[tuple[int, int, Any]]]
    fetch: Callable[[int], Any]


@contextmanager
def opened(part: Jsonl | Hub) -> Iterator[Source]:
    """The rows of a file or a Hub data set. What stays in memory: of .jsonl, .parquet and Hub data nothing; a .json
    file is one value, and is held whole.

    Raises:
        DataError: it cannot be read.
    """
    with ExitStack() as stack:
        if isinstance(part, Hub):
            where = f"{part.path}, split {part.split}"
            table = _hub_table(part)
            yield Source(where, partial(_scan_list, table), lambda place: table[place])
            return
        path = Path(part.path).expanduser()
        if not path.is_file():
            raise sources.not_found(path)
        if path.suffix.lower() in OTHERS:
            todo = "write it as .jsonl or .parquet; a folder of .csv files is read by dataset=hub dataset.path=FOLDER"
            raise _unreadable(path, f"{path.suffix} files are not read", todo)
        if path.suffix == ".parquet":
            folder = Path(stack.enter_context(stopping.temporary_folder()))
            spools: list[Spool] = []
            yield Source(str(path), partial(_scan_parquet, path, folder, spools), lambda place: spools[0][place])
        elif path.suffix == ".json":
            rows = _json(path)
            yield Source(str(path), partial(_scan_list, rows), lambda place: rows[place])
        else:
            stream = stack.enter_context(path.open("rb"))
            yield Source(str(path), partial(_scan_lines, stream), partial(_line_at, stream))


def first(lines: list[str]) -> str:
    """The first 20 of a list of complaints, and how many more there are."""
    more = f"; and {len(lines) - SHOWN} more" if len(lines) > SHOWN else ""
    return "; ".join(lines[:SHOWN]) + more


def _scan_list(rows: Sequence[Any], progress: Progress) -> Iterator[tuple[int, int, Any]]:
    for place, row in enumerate(rows):
        if place % BATCH == 0:
            progress(place, len(rows), "row")
        yield place + 1, place, row


def _scan_lines(stream: BinaryIO, progress: Progress) -> Iterator[tuple[int, int, Any]]:
    size, place = os.fstat(stream.fileno()).st_size, stream.seek(0)
    for number, line in enumerate(stream, start=1):
        if number % BATCH == 1:
            progress(place, size, "byte")
        if _bare(line, place):
            yield number, place, _line(line, place)
        place += len(line)


def _line_at(stream: BinaryIO, place: int) -> Any:
    stream.seek(place)
    return _line(stream.readline(), place)


def _bare(line: bytes, place: int) -> bytes:
    return (line.removeprefix(codecs.BOM_UTF8) if place == 0 else line).strip()


def _line(line: bytes, place: int) -> Any:
    try:
        return _parsed(_bare(line, place))
    except Unusable as fault:
        return fault


def _json(path: Path) -> list[Any]:
    try:
        rows = _parsed(path.read_bytes().removeprefix(codecs.BOM_UTF8))
    except Unusable as fault:
        raise _unreadable(path, f"it {fault}", "mend it, or use .jsonl, where the row can be named") from fault
    return rows if isinstance(rows, list) else [rows]


def _unreadable(path: Path, why: str, todo: str) -> DataError:
    return DataError("The data file cannot be read.", where=str(path), why=why, todo=todo)


def _scan_parquet(path: Path, folder: Path, spools: list[Spool], progress: Progress) -> Iterator[tuple[int, int, Any]]:
    """Parquet has no way to one row but through its row group, so its rows are kept in a spool, which has."""
    place = 0
    try:
        with pq.ParquetFile(path) as file:
            names = Counter(file.schema_arrow.names)
            twice = [name for name, count in names.items() if count > 1]
            if twice:  # one of the two is not in the rows
                raise _unreadable(path, f"it has the column {shown(twice[0])} twice", "rename one of them")
            spools.append(Spool(folder / "rows.arrow", file.schema_arrow))
            for batch in file.iter_batches(batch_size=BATCH):
                progress(place, file.metadata.num_rows, "row")
                spools[0].add(batch)
                for row in batch.to_pylist():
                    yield place + 1, place, row
                    place += 1
    except (OSError, ValueError, OverflowError, pa.ArrowException) as error:  # a damaged file raises any of these
        why = f"it is not readable Parquet: {' '.join(str(error).split())[:200]}"
        raise _unreadable(path, why, "write it anew, or give another dataset.path") from error


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


def _hub_table(dataset: Hub) -> Sequence[Any]:
    import datasets

    try:
        builder = datasets.load_dataset_builder(dataset.path, dataset.subset, revision=dataset.revision)
        kind = type(builder).__module__.rpartition(".")[2]
        if kind not in FORMATS:
            raise ValueError(f"it is made of {kind} files; only {', '.join(FORMATS)} are read: others can hold pickles")
        folder = dataset.path if Path(dataset.path).is_dir() else None
        _refuse_outside(folder, builder.config.data_files or {})
        # of a folder `datasets` keeps what it made of it by the times of its files, which say nothing of what they hold
        builder.download_and_prepare(download_mode=None if folder is None else "reuse_cache_if_exists")
        table: Sequence[Any] = builder.as_dataset(split=dataset.split)
    except DataError:
        raise
    except Exception as error:  # the Hub's clients raise a dozen kinds; each means the data are not to be had
        raise DataError(
            "The data set could not be loaded.",
            where=f"dataset.path={dataset.path}, dataset.split={dataset.split}",
            why=f"{type(error).__name__}: {(redacted(str(error)).splitlines() or [''])[0][:200]}",
            todo="check the name, the split, the revision and the network",
        ) from error
    return table


def _refuse_outside(folder: str | None, files: Mapping[str, Sequence[str]]) -> None:
    """What a folder's card names elsewhere is no part of its fingerprint."""
    for path in chain.from_iterable(files.values()) if folder is not None else ():
        if not Path(os.path.abspath(path)).is_relative_to(os.path.abspath(str(folder))):
            raise DataError(
                "A data set reads a file outside of its folder.",
                where=f"dataset.path={folder}",
                why=f"its card names {path}, and a change of that would go unnoticed",
                todo="put the file, or a link to its folder, into the folder",
            )
