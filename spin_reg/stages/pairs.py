"""What an iteration trains on: real and generated answers with their reference log-probs, one row a pair."""

from pathlib import Path

from spin_reg import join, tables
from spin_reg.context import Context
from spin_reg.specs import PairsSpec, Split


def run(spec: PairsSpec, inputs: dict[str, Path], out: Path, context: Context) -> None:
    """Write pairs.parquet."""
    rows = [
        {
            **{key: pair.example[key] for key in ("example_id", "prompt_ids", "real_ids", "prompt", "real")},
            **{key: pair.answer[key] for key in ("generated_ids", "sampled_from", "finish_reason", "generated")},
            "reference_real_logprob": pair.reference_real,
            "reference_generated_logprob": pair.reference_generated,
        }
        for pair in join.pairs(spec, inputs, Split.train)
    ]
    tables.write(out / "pairs.parquet", rows, tables.PAIRS)
