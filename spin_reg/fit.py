"""The training loop of both the SFT stage and the game's: optimizer, schedule, clipping, accumulation, checkpoints."""

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel

from spin_reg import checkpoint, durable, gpus, ranks, sharing, stopping
from spin_reg.context import Context
from spin_reg.errors import NonFiniteError, Stopped
from spin_reg.fingerprint import order
from spin_reg.scorer import Scorer, reads_packed
from spin_reg.settings import LrScheduler, Optimizer, Sharding
from spin_reg.zero import Zero

Metrics = dict[str, float]
Backward = Callable[[Tensor, bool], None]  # of a micro-batch's loss, and whether it is the step's last


@dataclass(frozen=True)
class FitSpec:
    """What the loop needs to know; learning_rate is the peak, before the schedule's factor.

    `sharding`: what of weights, gradients and optimizer is laid across the ranks. `deterministic`: by kernels that give
    the same bits every time.
    """

    learning_rate: float
    optimizer: Optimizer
    lr_scheduler: LrScheduler
    warmup_ratio: float
    weight_decay: float
    max_grad_norm: float
    batch_tokens: int
    micro_batch_size: int | None
    gradient_checkpointing: bool
    save_every: int
    iteration: int
    sharding: Sharding = Sharding.none
    deterministic: bool = True


@dataclass(frozen=True)
class Task:
    """What is fitted to rows that are known by their positions.

    Attributes:
        loss: (scorer, rows) -> (the *sum* of the rows' losses, the sums of their metrics).
        weight: what a step's sums are divided by, given its rows. name: a row's id, for error messages.
        slots: how many tokens the model reads of a row.
    """

    loss: Callable[[Scorer, Sequence[int]], tuple[Tensor, Metrics]]
    weight: Callable[[Sequence[int]], float]
    name: Callable[[int], str]
    slots: Callable[[int], int]


def batches(names: Sequence[str], *, seed: int, iteration: int, epochs: int, size: int) -> list[list[int]]:
    """Row positions of every step: in epoch e the rows stand in the order of SHA-256 of [seed, "order", iteration, e,
    name], cut into `size` (the last batch of an epoch may be smaller). Where a row stood in its file has no part in it.
    """
    steps = []
    for epoch in range(epochs):
        rows = order([[seed, "order", iteration, epoch, name] for name in names])
        steps += [rows[i : i + size] for i in range(0, len(rows), size)]
    return steps


def lr_factor(kind: LrScheduler, step: int, total: int, warmup_ratio: float) -> float:
    """The factor on the learning rate of step `step` (from 0) of `total`: linear warmup, then the named decay to 0.

    As everywhere in this field a warmup begins at 0; so that a single step trains, the last step is never part of it.
    """
    warmup = min(math.ceil(total * warmup_ratio), total - 1)
    if step < warmup:
        return step / max(1, warmup)
    progress = (step - warmup) / max(1, total - warmup)
    if kind is LrScheduler.cosine:
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    return 1.0 - progress if kind is LrScheduler.linear else 1.0


def _optimizer(model: PreTrainedModel, spec: FitSpec) -> torch.optim.Optimizer:
    trained = [p for p in model.parameters() if p.requires_grad]  # of a model with an adapter, the adapter alone
    if spec.optimizer is Optimizer.rmsprop:
        return torch.optim.RMSprop(trained, lr=spec.learning_rate, weight_decay=spec.weight_decay)
    return torch.optim.AdamW(trained, lr=spec.learning_rate, weight_decay=spec.weight_decay, fused=True)


def _checkpointing(model: PreTrainedModel, what: str) -> Callable[..., None]:
    """Transformers' switch, which newer releases call activation checkpointing."""
    method: Callable[..., None] = getattr(model, f"activation_checkpointing_{what}", None) or getattr(
        model, f"gradient_checkpointing_{what}"
    )
    return method


def _train_without_dropout(layer: torch.nn.Module) -> None:
    """A layer checkpoints only while it believes it trains; its own dropout rates (where it has any) become 0."""
    layer.training = True
    for name, value in vars(layer).items():
        if "drop" in name.lower() and isinstance(value, float):
            setattr(layer, name, 0.0)


def fit(
    model: PreTrainedModel,
    steps: Sequence[Sequence[int]],
    task: Task,
    *,
    spec: FitSpec,
    prefix: str,
    accelerator: Accelerator,
    out: Path,
    context: Context,
    before: Callable[[Scorer], None] = lambda scorer: None,
    after: Callable[[], None] = lambda: None,
) -> list[dict[str, Any]]:
    """Train the model in place; a call after a kill goes on from the last checkpoint in `out`.

    Args:
        steps: the row positions of each optimiser step.
        prefix: of the metrics' names.
        before: called with the prepared scorer where training starts from its beginning. after: called at the end,
            while a signal still keeps every step; it saves the model.

    Returns:
        One metrics row a step.

    Raises:
        NonFiniteError: a loss or a gradient that is NaN or infinite; the state before that step is kept.
        ConfigError: see `gpus.repeatable`. Stopped: a signal asked for it; every finished step is kept.
    """
    _without_dropout(model, spec.gradient_checkpointing)
    scorer, optimizer, backward = _prepared(model, spec, accelerator, context.poll)
    scratch = out / durable.SCRATCH
    alone = spec.sharding is Sharding.none
    state = _State(model, optimizer, scratch, checkpoint.read(scratch, model, optimizer), alone)
    for row in state.metrics:
        context.log(row)
    if not state.metrics:
        before(scorer)
    repeatable = gpus.repeatable(spec.deterministic, f"iteration {spec.iteration}, {prefix}")
    with _released(scorer), repeatable, stopping.saving(state.keep_from_aside):
        for step in range(len(state.metrics), len(steps)):
            rate = _set_rate(optimizer, spec, step, len(steps))
            where = f"iteration {spec.iteration}, step {step + 1} of {len(steps)}, learning rate {rate:.3g}"
            try:
                sums = _gradients(scorer, steps[step], task, spec, backward, where, context.poll)
                norm = _clip(scorer, optimizer, spec)
                _refuse_nonfinite(norm, "gradient", where, [task.name(i) for i in steps[step]])
            except (Stopped, NonFiniteError):
                state.keep()  # the step at hand has changed nothing yet
                raise
            values = sums | {"grad_norm": norm, "learning_rate": rate}
            row = {"iteration": spec.iteration, "step": step + 1}
            state.update(row | {f"{prefix}/{key}": value for key, value in values.items()})
            context.log(state.metrics[-1])
            context.progress(step + 1, len(steps), "step")
            if (step + 1) % spec.save_every == 0 and step + 1 < len(steps):
                state.keep()
        _finish(state, spec, len(steps), after)
    if spec.gradient_checkpointing:
        _checkpointing(model, "disable")()
        model.eval()
    return state.metrics


def _prepared(
    model: PreTrainedModel, spec: FitSpec, accelerator: Accelerator, poll: Callable[[], None]
) -> tuple[Scorer, torch.optim.Optimizer | Zero, Backward]:
    """The scorer and the optimizer, on their device. Accelerate is not to sum gradients: see `sharing`.

    What is to be laid across ranks stays where it was loaded until then: it may fit no device, and where its dtype is
    the file's no memory was taken yet. So only the main rank, for all, reads it whole to see how it reads.
    """
    if spec.sharding is Sharding.full:
        packs = ranks.from_main(ranks.is_main() and reads_packed(model), poll)
        scorer = Scorer(model, packs)
        sharing.shard(scorer, model, accelerator.device)
    else:
        scorer = Scorer(model.to(accelerator.device))
    optimizer, scorer = _optimizer(model, spec), accelerator.prepare_model(scorer, evaluation_mode=True)
    if spec.sharding in (Sharding.none, Sharding.full):
        return scorer, optimizer, lambda loss, last: accelerator.backward(loss)
    zero = Zero(scorer, optimizer, spec.sharding, spec.max_grad_norm)
    return zero.scorer, zero, zero.backward


@contextmanager
def _released(scorer: Any) -> Iterator[None]:
    """At the end take off what Accelerate has put on for autocast: the methods hold the scorer in a circle, and so the
    model, which would stay in memory till garbage is collected.
    """
    try:
        yield
    finally:
        for name in ("forward", "_original_forward"):
            vars(getattr(scorer, "module", scorer)).pop(name, None)  # DeepSpeed has the scorer within


def _clip(scorer: Scorer, optimizer: torch.optim.Optimizer | Zero, spec: FitSpec) -> float:
    """Clip the gradients, at once or with the step to come; their norm before that."""
    if isinstance(optimizer, Zero):
        return optimizer.norm()
    norm = torch.nn.utils.clip_grad_norm_(scorer.parameters(), spec.max_grad_norm)
    return float(sharing.whole(norm))


@dataclass(frozen=True)
class _State:
    """What a step changes; whenever the lock is free, weights, optimizer and metrics are those of one step's end."""

    model: PreTrainedModel
    optimizer: torch.optim.Optimizer | Zero
    folder: Path
    metrics: list[dict[str, Any]]
    alone: bool  # whether each rank has all of it
    lock: threading.Lock = field(default_factory=threading.Lock)

    def update(self, row: dict[str, Any]) -> None:
        with self.lock:
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.metrics.append(row)

    def keep(self) -> None:
        with self.lock:
            if self.metrics:
                checkpoint.write(self.folder, self.model, self.optimizer, self.metrics, together=not self.alone)

    def keep_from_aside(self) -> None:
        """From another thread, which cannot speak with other ranks: whole weights are kept by the main one. What is
        shared the training threads keep together; if they are at it, that is waited for.
        """
        if not self.alone:
            with self.lock:
                return
        if ranks.is_main():
            self.keep()


def _set_rate(optimizer: Any, spec: FitSpec, step: int, total: int) -> float:
    rate = spec.learning_rate * lr_factor(spec.lr_scheduler, step, total, spec.warmup_ratio)
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate


def _finish(state: _State, spec: FitSpec, steps: int, after: Callable[[], None]) -> None:
    checkpoint.refuse_nonfinite(state.model, f"iteration {spec.iteration}, after the last step")
    if steps > spec.save_every:
        state.keep()  # what follows takes long where this took long
    if isinstance(state.optimizer, Zero):
        state.optimizer.release()
    sharing.gather(state.model)
    if ranks.is_main():
        after()
    ranks.wait()


def _without_dropout(model: PreTrainedModel, gradient_checkpointing: bool) -> None:
    """Eval mode: the loss compares the policy with log-probs that were scored without dropout."""
    model.eval()
    if gradient_checkpointing:
        _checkpointing(model, "enable")({"use_reentrant": False})
        for module in model.modules():
            if getattr(module, "gradient_checkpointing", False):
                _train_without_dropout(module)


def _gradients(
    scorer: Scorer,
    rows: Sequence[int],
    task: Task,
    spec: FitSpec,
    backward: Backward,
    where: str,
    poll: Callable[[], None],
) -> Metrics:
    """Accumulate a step's gradients over its micro-batches, and sum them over ranks; the step's mean metrics."""
    total: Metrics = {}
    scale, world, alone = task.weight(rows), ranks.world(), spec.sharding is Sharding.none
    dealt = sharing.turns(rows, task.slots, tokens=spec.batch_tokens, most=spec.micro_batch_size, world=world)
    for turn, micro in enumerate(dealt[ranks.rank()]):
        if world == 1:
            poll()
        idle = not micro  # where anything is sharded, others need this rank for each turn of theirs
        summed, metrics = (None, {}) if idle and alone else task.loss(scorer, micro or rows[:1])
        value = 0.0 if idle or summed is None else summed.item()

        def check(value: float = value, micro: Sequence[int] = micro) -> None:
            if world > 1:
                poll()
            _refuse_nonfinite(value, "loss", where, [task.name(i) for i in micro])

        sharing.agreed(check)
        if summed is not None:
            shared = 1 if alone else world  # FSDP and ZeRO take the mean over ranks
            backward(summed * (0.0 if idle else shared / scale), turn + 1 == len(dealt[0]))
        for key, part in ({"loss": value} | metrics).items() if micro else ():
            total[key] = total.get(key, 0.0) + part / scale
    if alone:
        sharing.add_up([p for p in scorer.parameters() if p.requires_grad])
    sharing.drop_unreached(scorer)
    return sharing.totals(total)


def _refuse_nonfinite(value: float, what: str, where: str, names: list[str]) -> None:
    if not math.isfinite(value):
        raise NonFiniteError(
            f"The {what} is {value}.",
            where=f"{where}; rows {', '.join(names)}",
            why="an update with it would spoil the policy, so none was made; the state before this step is kept",
            todo="look at these rows, lower schedule.learning_rate, or use hardware.precision=fp32",
        )
