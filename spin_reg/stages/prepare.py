"""Data into token ids, split into train and held-out."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from spin_reg import data, durable, models, sources, stopping, tables
from spin_reg.context import Context
from spin_reg.corpora import Corpus, Dataset, Hub, Jsonl, Mixture, Part, parts, published
from spin_reg.data import Splits
from spin_reg.errors import DataError
from spin_reg.fingerprint import digest
from spin_reg.specs import PrepareSpec, Split
from spin_reg.spool import Row, Spool

_checked: dict[str, tuple[Splits, dict[str, Any], TemporaryDirectory[str]]] = {}  # by `check`, until `run` writes it


def check(spec: PrepareSpec, context: Context) -> dict[Split, int]:
    """Read and tokenise the data into a temporary folder, so that a run folder is made only for data that are good.

    Data of this machine must still be what they were when they were fingerprinted.

    Returns:
        How many examples each split has.

    Raises:
        DataError, ConfigError: see `data.prepare`; they have changed. Stopped: a signal asked for it.
    """
    tokenizer = models.load_tokenizer(spec.model)
    ends = models.end_ids(models.generation_config(spec.model), tokenizer)
    folder = stopping.temporary_folder()

    def progress(done: int, total: int, unit: str) -> None:
        context.poll()
        context.progress(done, total, unit)

    def store(name: str) -> Spool:
        return Spool(Path(folder.name) / name, tables.PREPARED)

    try:
        splits, summary = data.prepare(pinned(spec.dataset, spec.source), tokenizer, ends, progress, store)
        _refuse_changed(spec)
    except BaseException:
        folder.cleanup()
        raise
    for part, source in zip(summary.get("parts", []), str(spec.source).split(","), strict=False):
        part["revision_or_sha256"] = source
    _checked[digest(spec)] = splits, summary, folder
    return {split: len(rows) for split, rows in splits.items()}


def _refuse_changed(spec: PrepareSpec) -> None:
    if not isinstance(spec.dataset, Corpus):
        return
    for part, expected in zip(parts(spec.dataset), str(spec.source).split(","), strict=True):
        local = isinstance(part, Jsonl) or Path(part.path).is_dir()
        if local and sources.data_sha256(part) != expected:
            raise DataError(
                "The data have changed.",
                where=part.path,
                why="they are not what they were when this command began",
                todo="run it again once they stay as they are",
            )


def heldout_answers(spec: PrepareSpec, made: bytes | None) -> dict[str, str]:
    """The real answers to held-out prompts, as texts by example_id: of data just checked, or `made` as Parquet."""
    if digest(spec) in _checked:
        rows: Iterable[Row] = _checked[digest(spec)][0][Split.heldout]
    else:
        rows = [] if made is None else tables.read(BytesIO(made), columns=["example_id", "real"])
    return {row["example_id"]: row["real"] for row in rows}


def pinned(dataset: Dataset, source: str | None) -> Dataset:
    """The data set with the commits of the Hub that were fingerprinted, whatever is newest there now."""
    if isinstance(dataset, Hub):
        return dataset if Path(dataset.path).is_dir() else replace(dataset, revision=source)
    if isinstance(dataset, Mixture):
        return replace(
            dataset, parts=[_pinned(*both) for both in zip(dataset.parts, str(source).split(","), strict=True)]
        )
    return dataset


def _pinned(part: Part, commit: str) -> Part:
    local = part.is_file() or Path(part.path).is_dir()
    return part if local else replace(part, revision=commit)


def run(spec: PrepareSpec, inputs: dict[str, Path], out: Path, context: Context) -> None:
    """Write SPLIT.parquet for every split, summary.json with every dropped row, and published.parquet where the data
    set's own answers to the training prompts are asked for."""
    if digest(spec) not in _checked:
        check(spec, context)
    splits, summary, folder = _checked.pop(digest(spec))
    with folder:
        for split, rows in splits.items():
            tables.write(out / f"{split}.parquet", _polling(rows, context), tables.EXAMPLES)
        if published(spec.dataset):
            tables.write(out / "published.parquet", _polling(splits[Split.train], context), tables.PUBLISHED)
    durable.write_json(out / "summary.json", summary | {"counts": {split: len(rows) for split, rows in splits.items()}})


def _polling(rows: Iterable[Row], context: Context) -> Iterator[Row]:
    for row in rows:
        context.poll()
        yield row
