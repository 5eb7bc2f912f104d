"""Data into token ids, split into train and held-out."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from spin_reg import data, durable, models, tables
from spin_reg.context import Context
from spin_reg.data import Splits
from spin_reg.fingerprint import digest
from spin_reg.settings import Hub
from spin_reg.specs import PrepareSpec, Split

_checked: dict[str, tuple[Splits, dict[str, Any]]] = {}  # what `check` made, until `run` writes it


def check(spec: PrepareSpec, progress: Callable[[int, int], None] = lambda done, total: None) -> dict[Split, int]:
    """Read and tokenise the data in memory, so that a run folder is made only for data known to be good.

    Returns:
        How many examples each split has.

    Raises:
        DataError, ConfigError: see `data.prepare`.
    """
    tokenizer = models.load_tokenizer(spec.model)
    ends = models.end_ids(models.generation_config(spec.model), tokenizer)
    dataset = spec.dataset
    if isinstance(dataset, Hub) and not Path(dataset.path).is_dir():
        dataset = replace(dataset, revision=spec.source)  # the commit that was fingerprinted, whatever is newest now
    splits, _ = _checked[digest(spec)] = data.prepare(dataset, tokenizer, ends, progress)
    return {split: len(rows) for split, rows in splits.items()}


def run(spec: PrepareSpec, inputs: dict[str, Path], out: Path, context: Context) -> None:
    """Write SPLIT.parquet for every split, and summary.json with every dropped row."""

    def progress(done: int, total: int) -> None:
        context.poll()
        context.progress(done, total, "row")

    if digest(spec) not in _checked:
        check(spec, progress)
    splits, summary = _checked.pop(digest(spec))
    for split, rows in splits.items():
        tables.write(out / f"{split}.parquet", rows, tables.EXAMPLES)
    durable.write_json(out / "summary.json", summary | {"counts": {split: len(rows) for split, rows in splits.items()}})
