"""Supervised fine-tuning: the mean negative log-likelihood of the real answers' tokens; here iterate 0 by it."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from spin_reg import durable, iterates, models, ranks, sharing, sources, tables
from spin_reg.context import Context
from spin_reg.fit import FitSpec, Metrics, Task, batches, fit
from spin_reg.models import Loaded
from spin_reg.packing import Group, sums
from spin_reg.scorer import Scorer
from spin_reg.settings import Hardware, LrScheduler, Optimizer, Pretrained
from spin_reg.specs import SftSpec, Split


def _start(spec: SftSpec) -> tuple[Loaded, dict[str, Any] | None]:
    """The model to fit; with an adapter, also the record of its base."""
    if isinstance(spec.model, Pretrained):
        sources.checked_folder(spec.model, spec.sha256, "the record of this run")
    adapts = isinstance(spec.model, Pretrained) and spec.model.lora.rank > 0
    loaded = models.start(spec.model, as_stored=sharing.thin(spec.hardware.sharding, adapts))
    if not isinstance(spec.model, Pretrained) or spec.model.lora.rank == 0:
        return loaded, None
    from spin_reg import adapters

    adapted = adapters.fresh(loaded.model, spec.model.lora, spec.seed).eval()
    return replace(loaded, model=adapted), iterates.base_record(spec.model, spec.sha256)


def run(spec: SftSpec, inputs: dict[str, Path], out: Path, context: Context) -> None:
    """Write the fitted model, and metrics.jsonl with one row a step."""
    iterates.forget()
    loaded, base = _start(spec)
    splits = [inputs["data"] / f"{split}.parquet" for split in (Split.train, Split.retained_train)]
    names, task = real_answers(*(path for path in splits if path.exists()))
    accelerator = iterates.accelerator(spec.hardware)
    metrics = fit(
        loaded.model,
        batches(
            names,
            seed=spec.seed,
            iteration=-1,
            epochs=spec.sft.epochs,
            size=spec.sft.batch_size,
        ),
        task,
        spec=FitSpec(
            learning_rate=spec.sft.learning_rate,
            optimizer=Optimizer.adamw,
            lr_scheduler=LrScheduler.cosine,
            warmup_ratio=0.1,
            weight_decay=0.0,
            max_grad_norm=1.0,
            batch_tokens=spec.hardware.batch_tokens,
            micro_batch_size=most(spec.hardware),
            gradient_checkpointing=spec.hardware.gradient_checkpointing,
            save_every=spec.save_every,
            iteration=-1,
            sharding=spec.hardware.sharding,
            deterministic=spec.hardware.deterministic,
        ),
        prefix="sft",
        accelerator=accelerator,
        out=out,
        context=context,
        after=lambda: iterates.save(loaded, out, base),
    )
    if ranks.is_main():
        durable.write_jsonl(out / "metrics.jsonl", metrics)


def real_answers(*paths: Path) -> tuple[list[str], Task]:
    """The examples of these splits, and how they are fitted: a step's loss is the mean over its answers' tokens of
    minus their log-probs, in nats a token.
    """
    rows = tables.read(*paths, columns=["prompt_ids", "real_ids"], kept=tables.IN_ANY_ORDER)
    names, tokens = [str(name) for name in tables.column("example_id", *paths)], tables.lengths("real_ids", *paths)
    prompts = tables.lengths("prompt_ids", *paths)

    def loss(scorer: Scorer, picked: Sequence[int]) -> tuple[Tensor, Metrics]:
        groups = [Group(rows[i]["prompt_ids"], (rows[i]["real_ids"],)) for i in picked]
        return -sums(scorer(groups), groups).sum(), {}

    return names, Task(
        loss,
        weight=lambda picked: float(sum(tokens[i] for i in picked)),
        name=lambda i: names[i],
        slots=lambda i: prompts[i] + tokens[i] - 1,
    )


def most(hardware: Hardware) -> int | None:
    """How many real answers are read at once at most: as many sequences as a micro-batch of pairs has."""
    return None if hardware.micro_batch_size is None else 2 * hardware.micro_batch_size
