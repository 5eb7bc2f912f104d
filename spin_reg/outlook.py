"""A planned run: its stages, how each stood, and what those still to be made may cost."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path

from spin_reg import amounts, estimate, judges, known, machine, pace, remedies, results, runner, space, stored
from spin_reg.amounts import Amounts
from spin_reg.config import Config
from spin_reg.plan import Sources, Stage
from spin_reg.results import Stop
from spin_reg.runner import State, Status
from spin_reg.specs import GenerateSpec, Split


@dataclass(frozen=True)
class Planned:
    """A run, its folder, its stages, and how each stood when it was planned; `made`: since then, what was missing.

    `stop`: the game ends early, and the stages end there. `moved`: what lies elsewhere by now, by its key.
    """

    config: Config
    root: Path
    outputs: Path
    sources: Sources
    stages: list[Stage]
    states: list[State]
    config_whole: bool
    whole: bool = True  # False where only evaluations were planned
    made: bool = False
    stop: Stop | None = None
    moved: Mapping[str, str] = field(default_factory=dict)

    @property
    def finished(self) -> bool:
        done = all(state.status is Status.done for state in self.states) and results.recorded(self.root, self.stop)
        recorded = self.config_whole and not self.moved
        return done and recorded and runner.metrics_whole(self.root, self.stages)

    @property
    def future(self) -> frozenset[str]:
        """Names of the stages that one more iteration would need."""
        settings = self.config
        if self.stop is not None:
            settings = replace(settings, schedule=replace(settings.schedule, iterations=self.stop.iterate))
        return space.future(settings, self.sources)

    @property
    def todo(self) -> list[Stage]:
        """The stages still to be made."""
        both = zip(self.stages, self.states, strict=True)
        return [stage for stage, state in both if state.status is Status.todo]

    def folder(self, stage: Stage) -> Path:
        """Where a stage's files lie, or will: here, or in the run they are taken over from."""
        copies = [] if (self.root / stage.folder).is_dir() else known.elsewhere(self.outputs, stage)
        return next(iter(copies), self.root / stage.folder)

    @cached_property
    def iterate(self) -> int:
        """Bytes of an iterate's model."""
        return space.iterate(self.config.model)

    @cached_property
    def have(self) -> Amounts:
        """How many examples there are and how long they are: as prepared, and as the newest answers are; or at most."""
        drawn = [
            (stage.spec.split, stage)
            for stage, state in zip(self.stages, self.states, strict=True)
            if isinstance(stage.spec, GenerateSpec)
            and stage.spec.generation == self.config.generation
            and state.status in (Status.done, Status.reuse)
        ]
        newest = [(split, self.folder(stage) / "answers.parquet") for split, stage in drawn[-1:]]
        return amounts.measured(self.folder(self.stages[0]), *newest) or amounts.limits(self.config.dataset)


def disk(planned: Planned, read: Mapping[Split, int] | None = None) -> space.Need:
    """What the stages still to be made may need on disk; `read`: how many examples the data were found to have.

    The peak, which must find room, is always reckoned with every row at its limits.
    """
    settings, have = planned.config, planned.have
    needed = partial(
        space.need,
        planned.stages,
        planned.todo,
        settings.model,
        keep=settings.keep_iterates,
        future=planned.future,
    )
    bound = needed(replace(_most(planned, read), records=have.records))  # a manifest is the same either way
    return replace(needed(have), peak=bound.peak) if have.measured else bound


def of_stage(planned: Planned, stage: Stage, state: State) -> dict[str, int | None]:
    """`tokens` and bytes on `disk` of a stage, 0 where it is made; None: how many tokens a benchmark reads."""
    if state.status is not Status.todo:
        return {"tokens": 0, "disk": 0}
    (piece,) = estimate.pieces([stage], planned.have)
    return {"tokens": piece.tokens, "disk": stored.of(stage, planned.iterate, planned.have)}


def estimates(planned: Planned) -> tuple[estimate.Work, estimate.Memory, str | None, judges.Cost]:
    """Of the stages still to be made: tokens, memory, what makes that fit where it does not, what a judge is asked."""
    todo, have, model = planned.todo, planned.have, planned.config.model
    memory, room = estimate.memory(todo, model, have.rows), machine.memory()
    helps = remedies.helps(todo, model, room, have.rows) if memory.most > room else None
    return estimate.work(todo, have), memory, helps, judges.expected(todo, planned.sources.mt_bench, planned.root)


def time_left(planned: Planned) -> pace.Left:
    """Seconds that the stages still to be made may take, at the pace that the run's log tells of."""
    path = planned.root / "run.log"
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    return pace.left(pieces(planned), {stage.name for stage in planned.todo}, text)


def pieces(planned: Planned, read: Mapping[Split, int] | None = None) -> list[pace.Piece]:
    """All stages with their tokens, every row at its limits: a run that was stopped plans as one that was not.

    `read`: as in `disk`.
    """
    return estimate.pieces(planned.stages, _most(planned, read))


def _most(planned: Planned, read: Mapping[Split, int] | None) -> Amounts:
    return amounts.limits(planned.config.dataset, read or (planned.have.rows if planned.have.measured else None))
