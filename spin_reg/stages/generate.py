"""Answers of one iterate, drawn once and kept as token ids."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from spin_reg import iterates, sampling, tables
from spin_reg.context import Context
from spin_reg.specs import GenerateSpec, Split
from spin_reg.tables import Row, Rows

SHARD = 256  # rows; what a kill costs at most, and the border that no batch crosses


def run(spec: GenerateSpec, inputs: dict[str, Path], out: Path, context: Context) -> None:
    """Write answers.parquet, one row for every prompt dealt to this iterate, and where `spec.scored` scores.parquet."""
    rows = prompts(spec, inputs["data"] / f"{spec.split}.parquet")
    accelerator = iterates.accelerator(spec.hardware)
    loaded = iterates.load(inputs["model"], spec.policy)
    model = loaded.model.to(accelerator.device)

    def answer(some: Sequence[Row], ready: Callable[[int], None]) -> list[Row]:
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
            batch_size=spec.generation.batch_size,
            names=[row["example_id"] for row in some],
            poll=context.poll,
            ended=ready,
        )
        return [
            {
                "example_id": row["example_id"],
                "generated_ids": drawn.ids,
                "finish_reason": drawn.finish_reason,
                "sampled_from": spec.k,
                "logprob": math.fsum(drawn.logprobs),
                "token_logprobs": drawn.logprobs if spec.split is not Split.train else None,
                "generated": loaded.tokenizer.decode(drawn.ids, skip_special_tokens=True),
            }
            for row, drawn in zip(some, answers, strict=True)
        ]

    with accelerator.autocast():  # around all of it, so that weights are cast once
        tables.in_shards(
            rows,
            answer,
            out=out,
            into={"answers.parquet": tables.ANSWERS} | ({"scores.parquet": tables.SCORES} if spec.scored else {}),
            size=spec.hardware.shard(SHARD),
            done=lambda done, total: context.progress(done, total, "answer"),
            poll=context.poll,
        )


def prompts(spec: GenerateSpec, path: Path) -> Rows:
    """The prompts dealt to this iterate, as rows with example_id and prompt_ids."""
    rows = tables.read(path, columns=["example_id", "prompt_ids"])
    if spec.draw is None:
        return rows
    dealt = spec.asked(tables.column("example_id", path))
    return Rows(len(dealt), lambda n: rows[dealt[n]])
