"""One iteration: iterate t + 1 from iterate t, on the pairs of iteration t, or without an opponent on real answers."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from spin_reg import durable, iterates, join, opponents, packing, ranks, selfcheck, sharing, tables
from spin_reg.context import Context
from spin_reg.fit import FitSpec, Metrics, Task, batches, fit
from spin_reg.losses import LOSSES, log_ratio_difference
from spin_reg.packing import Group, cut, sums
from spin_reg.roles import generated_role, real_role
from spin_reg.scorer import Scorer
from spin_reg.settings import LengthNorm, Loss
from spin_reg.specs import Split, TrainSpec
from spin_reg.stages import sft
from spin_reg.tables import Row

TRAINED = [field.name for field in tables.PAIRS if field.name not in ("prompt", "real", "generated")]  # all but texts
METRICS = ("margin", "accuracy", "real_logprob", "generated_logprob")


def run(spec: TrainSpec, inputs: dict[str, Path], out: Path, context: Context) -> None:
    """Write the next iterate as an ordinary model folder, and metrics.jsonl with one row a step."""
    names, task, before = _pairs(spec, inputs, out) if spec.loss.plays else _answers(inputs)
    fresh = None if spec.lora is None else (spec.lora, spec.seed)
    base = None if spec.lora is None else iterates.base_of(inputs["model"])
    thin = sharing.thin(spec.hardware.sharding, base is not None)
    loaded = iterates.load(inputs["model"], spec.policy, exclusive=True, fresh=fresh, as_stored=thin)
    accelerator = iterates.accelerator(spec.hardware)
    metrics = fit(
        loaded.model,
        batches(names, seed=spec.seed, iteration=spec.t, epochs=spec.epochs, size=spec.batch_size),
        task,
        spec=FitSpec(
            learning_rate=spec.learning_rate,
            optimizer=spec.optimizer,
            lr_scheduler=spec.lr_scheduler,
            warmup_ratio=spec.warmup_ratio,
            weight_decay=spec.weight_decay,
            max_grad_norm=spec.max_grad_norm,
            batch_tokens=spec.hardware.batch_tokens,
            micro_batch_size=spec.hardware.micro_batch_size if spec.loss.plays else sft.most(spec.hardware),
            gradient_checkpointing=spec.hardware.gradient_checkpointing,
            save_every=spec.save_every,
            iteration=spec.t,
            sharding=spec.hardware.sharding,
            deterministic=spec.hardware.deterministic,
        ),
        prefix="train",
        accelerator=accelerator,
        out=out,
        context=context,
        before=before,
        after=lambda: iterates.save(loaded, out, base),
    )
    if ranks.is_main():
        durable.write_jsonl(out / "metrics.jsonl", metrics)


Fitted = tuple[list[str], Task, Callable[[Scorer], None]]  # rows' names, what is fitted to them, what is checked first


def _answers(inputs: dict[str, Path]) -> Fitted:
    """The real answers to the training prompts, as the SFT stage fits them; no table holds what could be checked."""
    names, task = sft.real_answers(inputs["data"] / f"{Split.train}.parquet")
    return names, task, lambda scorer: None


def _pairs(spec: TrainSpec, inputs: dict[str, Path], out: Path) -> Fitted:
    """The pairs of the iteration, with the self-check."""
    path, beta = inputs["pairs"] / "pairs.parquet", spec.beta
    assert beta is not None
    rows = tables.read(path, columns=TRAINED, kept=tables.IN_ANY_ORDER)
    both = zip(tables.column("example_id", path), tables.column("sampled_from", path), strict=True)
    names = [f"{example_id} {sampled_from}" for example_id, sampled_from in both]
    prompts, real, generated = (tables.lengths(f"{kind}_ids", path) for kind in ("prompt", "real", "generated"))

    def loss(scorer: Scorer, picked: Sequence[int]) -> tuple[Tensor, Metrics]:
        terms = pair_terms(scorer, [rows[i] for i in picked], spec.loss, beta)
        sums = {key: values.detach().sum().item() for key, values in terms.items()}
        return terms["loss"].sum(), {key: sums[key] for key in METRICS}

    task = Task(
        loss,
        weight=lambda picked: float(len(picked)),
        name=lambda i: names[i],
        slots=lambda i: prompts[i] + real[i] + generated[i] - 2,
    )
    return names, task, lambda scorer: self_check(scorer, spec, beta, inputs, rows, out)


def pair_terms(scorer: Scorer, rows: Sequence[Row], loss: Loss, beta: float) -> dict[str, Tensor]:
    """Each pair's loss, margin, accuracy and log-probs of its answers: (B,) float64 each, nats; `loss` has the grad."""
    groups = pair_groups(rows)
    logprobs = sums(scorer(groups), groups)
    real, generated = logprobs.view(-1, 2).unbind(dim=1)
    reference = [
        torch.tensor([row[f"reference_{kind}_logprob"] for row in rows], dtype=torch.float64, device=logprobs.device)
        for kind in ("real", "generated")
    ]
    lengths = None
    if loss.length_norm is LengthNorm.mean:
        counts = torch.tensor(packing.lengths(groups), device=logprobs.device).view(-1, 2)
        lengths = (counts[:, 0], counts[:, 1])
    delta = log_ratio_difference(real, generated, reference[0], reference[1], lengths)
    return {
        "loss": LOSSES[loss.name](delta, beta),
        "margin": beta * delta,
        "accuracy": torch.heaviside(delta.detach(), delta.new_tensor(0.5)),
        "real_logprob": real,
        "generated_logprob": generated,
    }


def pair_groups(rows: Sequence[Row]) -> list[Group]:
    """Each pair as a prompt with its real and its generated answer."""
    return [Group(row["prompt_ids"], (row["real_ids"], row["generated_ids"])) for row in rows]


def self_check(
    scorer: Scorer, spec: TrainSpec, beta: float, inputs: dict[str, Path], rows: Sequence[Row], out: Path
) -> None:
    """Compare the first rows' log-probs and margins with the tables, and keep what was found in selfcheck.json.

    Raises:
        SelfCheckError: see `selfcheck.compare`.
    """

    @torch.no_grad()
    def terms(some: Sequence[Row]) -> dict[str, Tensor]:
        slots = [group.slots for group in pair_groups(some)]
        batches = cut(slots, tokens=spec.hardware.batch_tokens, most=spec.hardware.micro_batch_size)
        parts = [pair_terms(scorer, [some[i] for i in picked], spec.loss, beta) for picked in batches]
        back = torch.tensor([i for picked in batches for i in picked]).argsort()
        return {key: torch.cat([part[key] for part in parts])[back] for key in parts[0]}

    t, reference = spec.t, opponents.from_json(spec.reference)
    real = {k: join.scores(inputs[real_role(k)], None) for k in opponents.support(reference) | {t}}
    generated = {
        j: {k: join.scores(inputs[generated_role(k, j)], j) for k in opponents.scorers(reference, j) | {t}}
        for j in spec.window
    }
    stored = selfcheck.to_check(rows, t, reference, real, generated)
    coarse = spec.policy.layout is not None
    found = selfcheck.compare(
        stored,
        terms,
        t=t,
        beta=beta,
        length_norm=spec.loss.length_norm is LengthNorm.mean,
        tolerance=selfcheck.BFLOAT16 if coarse else selfcheck.FLOAT32,
    )
    if ranks.is_main():
        durable.write_json(out / "selfcheck.json", found)
