"""Answers that the data set brings with it, in the place of those of the base."""

from collections.abc import Callable, Sequence
from pathlib import Path

from spin_reg import models, tables
from spin_reg.context import Context
from spin_reg.specs import PublishedSpec
from spin_reg.tables import Row

SHARD = 1024


def run(spec: PublishedSpec, inputs: dict[str, Path], out: Path, context: Context) -> None:
    """Write answers.parquet as the generate stage does: a longer answer than it may draw is cut, with no end token."""
    tokenizer = models.load_tokenizer(spec.model)

    def cut(some: Sequence[Row], ready: Callable[[int], None]) -> list[Row]:
        context.poll()
        answers = []
        for row in some:
            ids = row["generated_ids"][: spec.max_new_tokens]
            whole = len(ids) == len(row["generated_ids"])
            text = row["generated"] if whole else tokenizer.decode(ids, skip_special_tokens=True)
            kept = {"example_id": row["example_id"], "generated_ids": ids, "sampled_from": spec.k, "generated": text}
            answers.append(kept | {"finish_reason": "stop" if whole else "length"})
        return answers

    tables.in_shards(
        tables.read(inputs["data"] / "published.parquet"),
        cut,
        out=out,
        into={"answers.parquet": tables.ANSWERS},
        size=SHARD,
        done=lambda done, total: context.progress(done, total, "answer"),
    )
