"""Log-probs of answers under one iterate: the scorer behind every reference and every evaluation."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch

from spin_reg import models, tables
from spin_reg.context import Context
from spin_reg.errors import NonFiniteError
from spin_reg.logprobs import collate, token_logprobs
from spin_reg.specs import ScoreSpec, Split
from spin_reg.tables import Row

SHARD = 1024


def run(spec: ScoreSpec, inputs: dict[str, Path], out: Path, context: Context) -> None:
    """Write scores.parquet: one row an answer; eval mode, float64 sums over the answer's tokens."""
    rows = answer_rows(spec, inputs)
    accelerator = models.accelerator(spec.hardware)
    loaded = models.load(inputs["model"], spec.policy)
    model = accelerator.prepare_model(loaded.model, evaluation_mode=True).eval()
    keep_tokens = spec.split is not Split.train

    @torch.inference_mode()
    def batch(some: Sequence[Row]) -> list[Row]:
        context.poll()
        block = collate([row["prompt_ids"] for row in some], [row["ids"] for row in some]).to(accelerator.device)
        logprobs = token_logprobs(model, block)
        sums = logprobs.double().sum(dim=-1).tolist()
        scored = []
        for row, total, tokens in zip(some, sums, logprobs.tolist(), strict=True):
            if not math.isfinite(total):
                raise NonFiniteError(
                    f"A log-prob is {total}.",
                    where=f"iterate {spec.k}, example_id {row['example_id']}",
                    why="the policy's weights or its arithmetic are broken; a reference cannot be made of it",
                    todo="look at the training curve of this iterate; try hardware.precision=fp32",
                )
            kept = tokens[: len(row["ids"])] if keep_tokens else None
            scored.append({"example_id": row["example_id"], "logprob": total, "token_logprobs": kept})
        return scored

    tables.in_shards(
        rows,
        lambda shard: tables.in_batches(
            shard,
            batch,
            size=spec.hardware.score_batch_size,
            length=lambda row: len(row["prompt_ids"]) + len(row["ids"]),
        ),
        out=out,
        name="scores.parquet",
        schema=tables.SCORES,
        size=SHARD,
        done=lambda done, total: context.progress(done, total, "score"),
    )


def answer_rows(spec: ScoreSpec, inputs: dict[str, Path]) -> list[Row]:
    """The answers to score, as rows with example_id, prompt_ids and the answer's ids."""
    examples = tables.read(inputs["data"] / f"{spec.split}.parquet")[: spec.first]
    if spec.j is None:
        return [{key: row[key] for key in ("example_id", "prompt_ids")} | {"ids": row["real_ids"]} for row in examples]
    path = inputs["answers"] / "answers.parquet"
    answers = tables.by_id(tables.read(path), path)
    return [
        {
            "example_id": row["example_id"],
            "prompt_ids": row["prompt_ids"],
            "ids": answers[row["example_id"]]["generated_ids"],
        }
        for row in examples
        if row["example_id"] in answers and (spec.draw is None or spec.draw.deal(row["example_id"]) == spec.j)
    ]
