"""One iteration of the game: iterate t + 1 from iterate t, on the pairs of iteration t."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from spin_reg import durable, iterates, join, opponents, selfcheck, tables
from spin_reg.context import Context
from spin_reg.fit import FitSpec, Metrics, batches, fit
from spin_reg.logprobs import collate, sequence_logprobs
from spin_reg.losses import LOSSES, log_ratio_difference
from spin_reg.settings import LengthNorm, Loss
from spin_reg.specs import TrainSpec, generated_role, real_role
from spin_reg.tables import Row

TRAINED = [field.name for field in tables.PAIRS if field.name not in ("prompt", "real", "generated")]  # all but texts
METRICS = ("margin", "accuracy", "real_logprob", "generated_logprob")


def run(spec: TrainSpec, inputs: dict[str, Path], out: Path, context: Context) -> None:
    """Write the next iterate as an ordinary model folder, and metrics.jsonl with one row a step."""
    path = inputs["pairs"] / "pairs.parquet"
    rows = tables.read(path, columns=TRAINED, kept=tables.IN_ANY_ORDER)
    fresh = None if spec.lora is None else (spec.lora, spec.seed)
    loaded = iterates.load(inputs["model"], spec.policy, exclusive=True, fresh=fresh)
    base = None if spec.lora is None else iterates.base_of(inputs["model"])
    accelerator = iterates.accelerator(spec.hardware)
    both = zip(tables.column("example_id", path), tables.column("sampled_from", path), strict=True)
    names = [f"{example_id} {sampled_from}" for example_id, sampled_from in both]

    def loss(model: PreTrainedModel, picked: Sequence[int]) -> tuple[Tensor, Metrics]:
        terms = pair_terms(model, [rows[i] for i in picked], spec.loss, spec.beta, accelerator.device)
        sums = {key: values.detach().sum().item() for key, values in terms.items()}
        return terms["loss"].sum(), {key: sums[key] for key in METRICS}

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
        before=lambda model: self_check(model, spec, inputs, rows, out, accelerator.device),
        after=lambda: iterates.save(loaded, out, base),
    )
    durable.write_jsonl(out / "metrics.jsonl", metrics)


def pair_terms(
    model: PreTrainedModel, rows: Sequence[Row], loss: Loss, beta: float, device: torch.device
) -> dict[str, Tensor]:
    """Each pair's loss, margin, accuracy and log-probs of its answers: (B,) float64 each, nats; `loss` has the grad."""
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
    return {
        "loss": LOSSES[loss.name](delta, beta),
        "margin": beta * delta,
        "accuracy": (delta > 0).double(),
        "real_logprob": real,
        "generated_logprob": generated,
    }


def self_check(
    model: PreTrainedModel,
    spec: TrainSpec,
    inputs: dict[str, Path],
    rows: Sequence[Row],
    out: Path,
    device: torch.device,
) -> None:
    """Compare the first rows' log-probs and margins with the tables, and keep what was found in selfcheck.json.

    Raises:
        SelfCheckError: see `selfcheck.compare`.
    """

    @torch.no_grad()
    def terms(some: Sequence[Row]) -> dict[str, Tensor]:
        size = spec.hardware.micro_batch_size
        parts = [
            pair_terms(model, some[start : start + size], spec.loss, spec.beta, device)
            for start in range(0, len(some), size)
        ]
        return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}

    t, reference = spec.t, opponents.from_json(spec.reference)
    real = {k: join.scores(inputs[real_role(k)]) for k in opponents.support(reference) | {t}}
    generated = {
        j: {k: join.scores(inputs[generated_role(k, j)]) for k in opponents.scorers(reference, j) | {t}}
        for j in spec.window
    }
    stored = selfcheck.to_check(rows, t, reference, real, generated)
    coarse = spec.policy.layout is not None
    found = selfcheck.compare(
        stored,
        terms,
        t=t,
        beta=spec.beta,
        length_norm=spec.loss.length_norm is LengthNorm.mean,
        tolerance=selfcheck.BFLOAT16 if coarse else selfcheck.FLOAT32,
    )
    durable.write_json(out / "selfcheck.json", found)
