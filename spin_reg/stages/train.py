"""One iteration of the game: iterate t + 1 from iterate t, on the pairs of iteration t."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from spin_reg import durable, models, tables
from spin_reg.context import Context
from spin_reg.fit import FitSpec, Metrics, batches, fit
from spin_reg.logprobs import collate, sequence_logprobs
from spin_reg.losses import LOSSES, log_ratio_difference
from spin_reg.settings import LengthNorm, Loss
from spin_reg.specs import TrainSpec
from spin_reg.tables import Row


def run(spec: TrainSpec, inputs: dict[str, Path], out: Path, context: Context) -> None:
    """Write the next iterate as an ordinary model folder, and metrics.jsonl with one row a step."""
    rows = tables.read(inputs["pairs"] / "pairs.parquet")
    loaded = models.load(inputs["model"], spec.policy, exclusive=True)
    accelerator = models.accelerator(spec.hardware)
    names = [f"{row['example_id']} {row['sampled_from']}" for row in rows]

    def loss(model: PreTrainedModel, picked: Sequence[int]) -> tuple[Tensor, Metrics]:
        return pair_loss(model, [rows[i] for i in picked], spec.loss, spec.beta, accelerator.device)

    metrics = fit(
        loaded.model,
        batches(names, seed=spec.seed, iteration=spec.t, epochs=spec.epochs, size=spec.batch_size),
        loss,
        weight=lambda picked: float(len(picked)),
        name=lambda i: names[i],
        spec=FitSpec(
            learning_rate=spec.learning_rate,
            optimizer=spec.optimizer,
            lr_scheduler=spec.lr_scheduler,
            warmup_ratio=spec.warmup_ratio,
            weight_decay=spec.weight_decay,
            max_grad_norm=spec.max_grad_norm,
            micro_batch_size=spec.hardware.micro_batch_size,
            gradient_checkpointing=spec.hardware.gradient_checkpointing,
            save_every=spec.save_every,
            iteration=spec.t,
        ),
        prefix="train",
        accelerator=accelerator,
        out=out,
        context=context,
    )
    models.save(loaded, out)
    durable.write_jsonl(out / "metrics.jsonl", metrics)


def pair_loss(
    model: PreTrainedModel, rows: Sequence[Row], loss: Loss, beta: float, device: torch.device
) -> tuple[Tensor, Metrics]:
    """The sum of the pairs' losses (float64 scalar) and the sums of their metrics."""
    prompts = [row["prompt_ids"] for row in rows]
    answers = [row["real_ids"] for row in rows] + [row["generated_ids"] for row in rows]
    batch = collate(prompts + prompts, answers).to(device)
    real, generated = sequence_logprobs(model, batch).chunk(2)
    reference = [
        torch.tensor([row[f"reference_{kind}_logprob"] for row in rows], dtype=torch.float64, device=device)
        for kind in ("real", "generated")
    ]
    counts = batch.response_mask.sum(dim=-1).chunk(2)
    lengths = (counts[0], counts[1]) if loss.length_norm is LengthNorm.mean else None
    delta = log_ratio_difference(real, generated, reference[0], reference[1], lengths)
    metrics = {
        "margin": beta * delta.detach().sum().item(),
        "accuracy": (delta.detach() > 0).double().sum().item(),
        "real_logprob": real.detach().sum().item(),
        "generated_logprob": generated.detach().sum().item(),
    }
    return LOSSES[loss.name](delta, beta).sum(), metrics
