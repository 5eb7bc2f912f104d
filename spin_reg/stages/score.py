"""Log-probs of answers under one iterate: the scorer behind every reference and every evaluation."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from spin_reg import iterates, tables
from spin_reg.context import Context
from spin_reg.errors import NonFiniteError
from spin_reg.packing import Group, cut, lengths, sums
from spin_reg.roles import answers_role
from spin_reg.scorer import Scorer
from spin_reg.specs import ScoreSpec, Split
from spin_reg.tables import Row, Rows

SHARD = 1024


def run(spec: ScoreSpec, inputs: dict[str, Path], out: Path, context: Context) -> None:
    """Write scores.parquet: one row an answer; eval mode, float64 sums over the answer's tokens."""
    rows = asked(spec, inputs)
    accelerator = iterates.accelerator(spec.hardware)
    loaded = iterates.load(inputs["model"], spec.policy)
    scorer = Scorer(loaded.model.to(accelerator.device)).eval()

    @torch.no_grad()  # not inference mode, in which autocast keeps no cast weight
    def batch(some: Sequence[Row]) -> list[list[Row]]:
        context.poll()
        groups = [_group(row) for row in some]
        logprobs = scorer(groups)
        answers = zip(sums(logprobs, groups).tolist(), logprobs.split(lengths(groups)), strict=True)
        return [[_scored(spec, row["example_id"], j, *next(answers)) for j in row["answers"]] for row in some]

    def score(shard: Sequence[Row], ready: Callable[[int], None]) -> list[Row]:
        slots = [_group(row).slots for row in shard]
        batches = cut(slots, tokens=spec.hardware.batch_tokens, most=spec.hardware.score_batch_size)
        return tables.in_batches(shard, batch, batches, ready)

    with accelerator.autocast():  # around all of it, so that weights are cast once
        tables.in_shards(
            rows,
            score,
            out=out,
            into={"scores.parquet": tables.SCORES},
            size=spec.hardware.shard(SHARD),
            done=lambda done, total: context.progress(done, total, "prompt"),
            poll=context.poll,
        )


def _group(row: Row) -> Group:
    return Group(row["prompt_ids"], tuple(row["answers"].values()))


def _scored(spec: ScoreSpec, name: str, j: int | None, logprob: float, tokens: Tensor) -> Row:
    """One row of the table; of training answers the sums are kept alone.

    Raises:
        NonFiniteError: the log-prob is NaN or infinite.
    """
    if not math.isfinite(logprob):
        raise NonFiniteError(
            f"A log-prob is {logprob}.",
            where=f"iterate {spec.k}, example_id {name}",
            why="the policy's weights or its arithmetic are broken; a reference cannot be made of it",
            todo="look at the training curve of this iterate; try hardware.precision=fp32",
        )
    kept = tokens.tolist() if spec.split is not Split.train else None
    return {"example_id": name, "sampled_from": j, "logprob": logprob, "token_logprobs": kept}


def asked(spec: ScoreSpec, inputs: Mapping[str, Path]) -> Rows:
    """The prompts to score answers to, as rows with example_id, prompt_ids and `answers`: token ids by the iterate that
    gave them, None for the real one.
    """
    path = inputs["data"] / f"{spec.split}.parquet"
    examples = tables.read(path, columns=["example_id", "prompt_ids", "real_ids"])
    given = {j: tables.ById(inputs[answers_role(j)] / "answers.parquet", ["generated_ids"]) for j in spec.window}
    whose = spec.asked(tables.column("example_id", path), given)
    places = list(whose)

    def row(n: int) -> Row:
        example = examples[places[n]]
        name, real = example["example_id"], example["real_ids"]
        answers = {j: real if j is None else given[j][name]["generated_ids"] for j in whose[places[n]]}
        return {"example_id": name, "prompt_ids": example["prompt_ids"], "answers": answers}

    return Rows(len(places), row)
