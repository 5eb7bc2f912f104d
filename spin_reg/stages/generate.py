"""Answers of one iterate, drawn once and kept as token ids."""

from collections.abc import Sequence
from pathlib import Path

import torch

from spin_reg import models, sampling, tables
from spin_reg.context import Context
from spin_reg.specs import GenerateSpec
from spin_reg.tables import Row

SHARD = 256  # rows; what a kill costs at most, and the border that no batch crosses


def run(spec: GenerateSpec, inputs: dict[str, Path], out: Path, context: Context) -> None:
    """Write answers.parquet: one row for every prompt dealt to this iterate."""
    rows = tables.read(inputs["data"] / f"{spec.split}.parquet")
    if spec.draw is not None:
        rows = [row for row in rows if spec.draw.deal(row["example_id"]) == spec.k]
    accelerator = models.accelerator(spec.hardware)
    loaded = models.load(inputs["model"], spec.policy)
    model = accelerator.prepare_model(loaded.model, evaluation_mode=True)

    def batch(some: Sequence[Row]) -> list[Row]:
        points = torch.stack(
            [
                sampling.uniforms(spec.seed, spec.round, row["example_id"], spec.split, spec.max_new_tokens)
                for row in some
            ]
        )
        answers = sampling.sample(
            model,
            [row["prompt_ids"] for row in some],
            points,
            ends=loaded.end_ids,
            temperature=spec.generation.temperature,
            top_p=spec.generation.top_p,
            names=[row["example_id"] for row in some],
            poll=context.poll,
        )
        return [
            {
                "example_id": row["example_id"],
                "generated_ids": answer.ids,
                "finish_reason": answer.finish_reason,
                "sampled_from": spec.k,
                "generated": loaded.tokenizer.decode(answer.ids, skip_special_tokens=True),
            }
            for row, answer in zip(some, answers, strict=True)
        ]

    tables.in_shards(
        rows,
        lambda shard: tables.in_batches(
            shard, batch, size=spec.generation.batch_size, length=lambda row: len(row["prompt_ids"])
        ),
        out=out,
        name="answers.parquet",
        schema=tables.ANSWERS,
        size=SHARD,
        done=lambda done, total: context.progress(done, total, "answer"),
    )
