"""What an iteration trains on: real and generated answers with their reference log-probs, one row a pair."""

from collections.abc import Iterator
from pathlib import Path

from spin_reg import join, tables
from spin_reg.context import Context
from spin_reg.specs import PairsSpec, Split
from spin_reg.tables import Row


def run(spec: PairsSpec, inputs: dict[str, Path], out: Path, context: Context) -> None:
    """Write pairs.parquet."""
    tables.write(out / "pairs.parquet", rows(spec, inputs, context), tables.PAIRS)


def rows(spec: PairsSpec, inputs: dict[str, Path], context: Context) -> Iterator[Row]:
    """The rows of pairs.parquet, each made when it is written."""
    for pair in join.pairs(spec, inputs, Split.train):
        context.poll()
        yield {
            **{key: pair.example[key] for key in ("example_id", "prompt_ids", "real_ids", "prompt", "real")},
            **{key: pair.answer[key] for key in ("generated_ids", "sampled_from", "finish_reason", "generated")},
            "reference_real_logprob": pair.reference_real,
            "reference_generated_logprob": pair.reference_generated,
        }
