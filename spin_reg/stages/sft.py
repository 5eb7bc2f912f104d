"""Iterate 0 by supervised fine-tuning: the mean negative log-likelihood of the real answers' tokens."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from spin_reg import durable, models, tables
from spin_reg.context import Context
from spin_reg.fit import FitSpec, Metrics, batches, fit
from spin_reg.logprobs import collate, sequence_logprobs
from spin_reg.settings import LrScheduler, Optimizer
from spin_reg.specs import SftSpec, Split


def run(spec: SftSpec, inputs: dict[str, Path], out: Path, context: Context) -> None:
    """Write the fitted model, and metrics.jsonl with one row a step."""
    models.forget()
    loaded = models.start(spec.model)
    splits = [inputs["data"] / f"{split}.parquet" for split in (Split.train, Split.retained_train)]
    rows = [row for path in splits if path.exists() for row in tables.read(path)]
    accelerator = models.accelerator(spec.hardware)

    def loss(model: PreTrainedModel, picked: Sequence[int]) -> tuple[Tensor, Metrics]:
        batch = collate([rows[i]["prompt_ids"] for i in picked], [rows[i]["real_ids"] for i in picked])
        return -sequence_logprobs(model, batch.to(accelerator.device)).sum(), {}

    metrics = fit(
        loaded.model,
        batches(
            [row["example_id"] for row in rows],
            seed=spec.seed,
            iteration=-1,
            epochs=spec.sft.epochs,
            size=spec.sft.batch_size,
        ),
        loss,
        weight=lambda picked: float(sum(len(rows[i]["real_ids"]) for i in picked)),
        name=lambda i: str(rows[i]["example_id"]),
        spec=FitSpec(
            learning_rate=spec.sft.learning_rate,
            optimizer=Optimizer.adamw,
            lr_scheduler=LrScheduler.cosine,
            warmup_ratio=0.1,
            weight_decay=0.0,
            max_grad_norm=1.0,
            micro_batch_size=2 * spec.hardware.micro_batch_size,  # as many sequences as that many pairs,
            gradient_checkpointing=spec.hardware.gradient_checkpointing,
            save_every=spec.save_every,
            iteration=-1,
        ),
        prefix="sft",
        accelerator=accelerator,
        out=out,
        context=context,
        after=lambda: models.save(loaded, out),
    )
    durable.write_jsonl(out / "metrics.jsonl", metrics)
