"""Which single setting would make the memory of a plan fit."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from spin_reg import processes
from spin_reg.estimate import Heavy, memory
from spin_reg.plan import Stage
from spin_reg.settings import Lora, Model, Pretrained, Sharding
from spin_reg.space import human
from spin_reg.specs import GenerateSpec, Split


def helps(todo: Sequence[Stage], model: Model, room: int, rows: Mapping[Split, int] | None = None) -> str | None:
    """The first setting that makes the estimate fit, with what would then be held; None where it fits, or none does."""
    now = memory(todo, model, rows)
    if now.most <= room:
        return None
    for word, stages, other in _remedies(todo, model):
        then = memory(stages, other, rows)
        if then.most <= room:
            return f"{word} would make it {human(then.most)} in place of {human(now.most)}"
    return None


def _remedies(todo: Sequence[Stage], model: Model) -> Iterator[tuple[str, list[Stage], Model]]:
    """One setting changed at a time: as words, and the stages and the model as they are then."""
    heavy = [stage for stage in todo if isinstance(stage.spec, Heavy)]
    specs = [stage.spec for stage in heavy if isinstance(stage.spec, Heavy)]
    if not all(spec.hardware.gradient_checkpointing for spec in specs):
        yield "hardware.gradient_checkpointing=true", _with(heavy, gradient_checkpointing=True), model
    for tokens in _halves(max(spec.hardware.batch_tokens for spec in specs)):
        yield f"hardware.batch_tokens={tokens}", _with(heavy, batch_tokens=tokens), model
    for size in _halves(max((s.generation.batch_size for s in specs if isinstance(s, GenerateSpec)), default=1)):
        yield f"generation.batch_size={size}", [_drawing(stage, size) for stage in heavy], model
    if isinstance(model, Pretrained) and model.lora.rank == 0:
        yield "model.lora.rank=16", heavy, replace(model, lora=Lora(rank=16))
    if any(processes.count(spec.hardware) > 1 and spec.hardware.sharding is Sharding.none for spec in specs):
        yield "hardware.sharding=full", _with(heavy, sharding=Sharding.full), model


def _halves(number: int) -> list[int]:
    return [number >> n for n in range(1, number.bit_length())]


def _with(stages: Sequence[Stage], **changed: Any) -> list[Stage]:
    found = []
    for stage in stages:
        assert isinstance(stage.spec, Heavy)
        found.append(replace(stage, spec=replace(stage.spec, hardware=replace(stage.spec.hardware, **changed))))
    return found


def _drawing(stage: Stage, size: int) -> Stage:
    if not isinstance(stage.spec, GenerateSpec):
        return stage
    return replace(stage, spec=replace(stage.spec, generation=replace(stage.spec.generation, batch_size=size)))
