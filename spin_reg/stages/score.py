"""Log-probs of answers under one iterate: the scorer behind every reference and every evaluation."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch

from spin_reg import iterates, tables
from spin_reg.context import Context
from spin_reg.errors import NonFiniteError
from spin_reg.packing import Group, cut, lengths, sums
from spin_reg.scorer import Scorer
from spin_reg.specs import ScoreSpec, Split
from spin_reg.tables import Row, Rows

SHARD = 1024


def run(spec: ScoreSpec, inputs: dict[str, Path], out: Path, context: Context) -> None:
    """Write scores.parquet: one row an answer; eval mode, float64 sums over the answer's tokens."""
    rows = answer_rows(spec, inputs)
    accelerator = iterates.accelerator(spec.hardware)
    loaded = iterates.load(inputs["model"], spec.policy)
    scorer = accelerator.prepare_model(Scorer(loaded.model), evaluation_mode=True).eval()
    hardware = spec.hardware
    keep_tokens = spec.split is not Split.train

    @torch.inference_mode()
    def batch(some: Sequence[Row]) -> list[Row]:
        context.poll()
        groups = [Group(row["prompt_ids"], (row["ids"],)) for row in some]
        logprobs = scorer(groups)
        of_answers = logprobs.split(lengths(groups))
        scored = []
        for row, total, tokens in zip(some, sums(logprobs, groups).tolist(), of_answers, strict=True):
            if not math.isfinite(total):
                raise NonFiniteError(
                    f"A log-prob is {total}.",
                    where=f"iterate {spec.k}, example_id {row['example_id']}",
                    why="the policy's weights or its arithmetic are broken; a reference cannot be made of it",
                    todo="look at the training curve of this iterate; try hardware.precision=fp32",
                )
            kept = tokens.tolist() if keep_tokens else None
            scored.append({"example_id": row["example_id"], "logprob": total, "token_logprobs": kept})
        return scored

    tables.in_shards(
        rows,
        lambda shard: tables.in_batches(
            shard,
            batch,
            cut(
                [len(row["prompt_ids"]) + len(row["ids"]) - 1 for row in shard],
                tokens=hardware.batch_tokens,
                most=hardware.score_batch_size,
            ),
        ),
        out=out,
        into={"scores.parquet": tables.SCORES},
        size=SHARD,
        done=lambda done, total: context.progress(done, total, "score"),
    )


def answer_rows(spec: ScoreSpec, inputs: dict[str, Path]) -> Rows:
    """The answers to score, as rows with example_id, prompt_ids and the answer's ids."""
    data = inputs["data"] / f"{spec.split}.parquet"
    examples = tables.read(data, columns=["example_id", "prompt_ids", "real_ids"])
    answers = None if spec.j is None else tables.ById(inputs["answers"] / "answers.parquet", ["generated_ids"])
    asked = spec.asked(tables.column("example_id", data), answers)

    def row(n: int) -> Row:
        example = examples[asked[n]]
        name = example["example_id"]
        ids = example["real_ids"] if answers is None else answers[name]["generated_ids"]
        return {"example_id": name, "prompt_ids": example["prompt_ids"], "ids": ids}

    return Rows(len(asked), row)
