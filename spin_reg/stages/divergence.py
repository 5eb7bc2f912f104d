"""How far an iterate is from another along its own answers, over the whole vocabulary: both models are in memory."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from spin_reg import iterates, sizes, tables
from spin_reg.context import Context
from spin_reg.errors import NonFiniteError
from spin_reg.logprobs import collate, token_divergences
from spin_reg.packing import cut
from spin_reg.specs import DivergenceSpec, Split
from spin_reg.tables import Row, Rows

SHARD = 32  # prompts


def run(spec: DivergenceSpec, inputs: dict[str, Path], out: Path, context: Context) -> None:
    """Write divergences.parquet: KL(policy || other) along one answer to each of the first prompts, nats a sequence.

    Given an answer's tokens before it, a token's KL is exact; summed along answers that the policy drew at temperature
    1 its mean is that of the sequences. `diagnostics.k3` estimates the same from the drawn tokens alone, with more
    noise.
    """
    accelerator = iterates.accelerator(spec.hardware)
    loaded = [iterates.load(inputs[role], spec.policy, exclusive=True) for role in ("model", "other")]  # none is shared
    policy, other = (one.model.to(accelerator.device).eval() for one in loaded)
    tokens = max(
        1, min(spec.hardware.batch_tokens, sizes.LOGITS_AT_ONCE // policy.get_output_embeddings().weight.shape[0])
    )

    @torch.no_grad()
    def batch(some: Sequence[Row]) -> list[list[Row]]:
        context.poll()
        made = collate([row["prompt_ids"] for row in some], [row["generated_ids"] for row in some])
        sums = token_divergences(policy, other, made.to(accelerator.device)).sum(dim=1).tolist()
        return [[_measured(spec, row["example_id"], kl)] for row, kl in zip(some, sums, strict=True)]

    def measure(shard: Sequence[Row], ready: Callable[[int], None]) -> list[Row]:
        lengths = [len(row["prompt_ids"]) + len(row["generated_ids"]) for row in shard]
        batches = cut(lengths, tokens=tokens, most=spec.hardware.score_batch_size)
        return tables.in_batches(shard, batch, batches, ready)

    with accelerator.autocast():
        tables.in_shards(
            answered(spec, inputs),
            measure,
            out=out,
            into={"divergences.parquet": tables.DIVERGENCES},
            size=spec.hardware.shard(SHARD),
            done=lambda done, total: context.progress(done, total, "answer"),
            poll=context.poll,
        )


def _measured(spec: DivergenceSpec, name: str, kl: float) -> Row:
    if not math.isfinite(kl):
        raise NonFiniteError(
            f"A divergence is {kl}.",
            where=f"iterate {spec.k} from iterate {spec.other}, example_id {name}",
            why="one of the two policies is broken, or gives a token of the other no chance at all",
            todo="look at the training curve of this iterate; try hardware.precision=fp32",
        )
    return {"example_id": name, "kl": kl}


def answered(spec: DivergenceSpec, inputs: Mapping[str, Path]) -> Rows:
    """The first prompts with the iterate's own answers: rows with example_id, prompt_ids and generated_ids."""
    prompts = tables.read(inputs["data"] / f"{Split.heldout}.parquet", columns=["example_id", "prompt_ids"])
    answers = tables.ById(inputs["own"] / "answers.parquet", ["generated_ids"])
    return Rows(min(spec.first, len(prompts)), lambda n: prompts[n] | answers[prompts[n]["example_id"]])
