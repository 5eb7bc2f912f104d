"""What the stages still to be made may take: tokens to draw, to score and to train on, and memory."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from spin_reg import sizes
from spin_reg.corpora import Dataset
from spin_reg.pace import Piece
from spin_reg.plan import Stage
from spin_reg.roles import answers_role
from spin_reg.settings import Dtype, Hardware, Lora, Model, Optimizer, Precision, Pretrained, Quantize, Sharding
from spin_reg.space import BYTES, SLOTS, human
from spin_reg.specs import (
    BenchmarkSpec,
    ConverseSpec,
    DivergenceSpec,
    GenerateSpec,
    JudgeSpec,
    PrepareSpec,
    ScoreSpec,
    SftSpec,
    Split,
    TrainSpec,
)

Heavy = GenerateSpec | ScoreSpec | DivergenceSpec | SftSpec | TrainSpec
QUANTIZED = {Quantize.none: None, Quantize.nf4: 0.55, Quantize.int8: 1.05}  # bytes a weight, with their scales


@dataclass(frozen=True)
class Work:
    """Tokens at most: every prompt and answer at its limit. `pairs`: how many are trained on, over all epochs."""

    drawn: int
    scored: int
    trained: int
    pairs: int

    @property
    def tokens(self) -> int:
        """All of them."""
        return self.drawn + self.scored + self.trained

    def words(self) -> str:
        if not self.tokens:
            return "none left"
        listed = ", ".join(f"{count(getattr(self, name))} {name}" for name in ("drawn", "scored", "trained"))
        return f"at most {listed} on" + (f" ({count(self.pairs)} pairs)" if self.pairs else "")


@dataclass(frozen=True)
class Held:
    """Bytes that one process of a stage holds at its fullest, by what they are for."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    cache: int
    libraries: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(vars(self).values())


@dataclass(frozen=True)
class Memory:
    """By kind of stage, what the heaviest of those still to be made may hold; so many `processes` hold as much each."""

    by_kind: Mapping[str, Held]
    processes: int = 1

    @property
    def most(self) -> int:
        """Bytes of the heaviest stage, of all its processes."""
        return self.processes * max((held.total for held in self.by_kind.values()), default=0)

    def words(self, room: int, help: str | None = None) -> str:
        """For people; `room`: bytes of memory that the machine has. `help`: as `helps` found it."""
        if not self.by_kind:
            return "nothing left to load"
        listed = ", ".join(f"{kind} {human(held.total)}" for kind, held in self.by_kind.items())
        each = f" in each of {self.processes} processes" if self.processes > 1 else ""
        text = f"about {listed}{each} (an estimate); {human(room)} of RAM here"
        if self.most > room:
            over = [kind for kind, held in self.by_kind.items() if self.processes * held.total > room]
            text += f". It will not fit ({', '.join(over)}): "
            text += help or "no single setting of ours helps enough; combine them, or take another machine"
        return text


def count(number: float) -> str:
    """A number as people read it."""
    for unit in ("", "k", "M", "G"):
        if number < 1000:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g}T"


def room() -> int:
    """Bytes of memory that this machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def pieces(stages: Sequence[Stage], rows: Mapping[Split, int]) -> list[Piece]:
    """The stages of a plan with their tokens; how many a benchmark reads is not known here."""
    return [
        Piece(
            stage.name,
            stage.kind,
            stage.folder,
            None if isinstance(stage.spec, BenchmarkSpec | JudgeSpec) else work([stage], rows).tokens,
        )
        for stage in stages
    ]


def work(todo: Sequence[Stage], rows: Mapping[Split, int]) -> Work:
    """The tokens of the stages still to be made.

    Args:
        rows: how many examples each split has, or may have. A draw deals a prompt to one of the window's iterates: its
            stages are counted as if each drew its equal share.
    """
    drawn = scored = trained = pairs = 0
    for stage in todo:
        spec = stage.spec
        if isinstance(spec, GenerateSpec):
            share = 1.0 if spec.draw is None else _share(spec.draw.samplers[-1], spec.k)
            drawn += round(rows[spec.split] * share) * spec.max_new_tokens
        elif isinstance(spec, ConverseSpec):
            drawn += spec.answers * spec.max_new_tokens
        elif isinstance(spec, ScoreSpec):
            some = rows[spec.split] if spec.first is None else min(spec.first, rows[spec.split])
            scored += _scored(stage, spec, some)
        elif isinstance(spec, DivergenceSpec):
            scored += 2 * min(spec.first, rows[Split.heldout]) * _longest(stage)
        elif isinstance(spec, SftSpec):
            trained += spec.sft.epochs * (rows[Split.train] + rows.get(Split.retained_train, 0)) * _longest(stage)
        elif isinstance(spec, TrainSpec) and not spec.loss.plays:
            trained += spec.epochs * rows[Split.train] * _longest(stage)
        elif isinstance(spec, TrainSpec):
            made = rows[Split.train] * (len(spec.window) if _union(stage) else 1) * spec.epochs
            pairs += made
            trained += made * (2 * _longest(stage) - _dataset(stage).max_prompt_tokens)  # the prompt is read once
    return Work(drawn, scored, trained, pairs)


def _scored(stage: Stage, spec: ScoreSpec, prompts: int) -> int:
    """Tokens that a score stage reads of so many prompts: each prompt once, with the answers that are dealt to it."""
    shares = [1.0] if spec.real else []
    for j in spec.window:
        made = stage.needs[answers_role(j)].spec
        drawn = spec.draw or (made.draw if isinstance(made, GenerateSpec) else None)  # under `reuse`: what is left
        shares.append(1.0 if drawn is None else _share(drawn.samplers[-1], j))
    data = _dataset(stage)
    read = 1.0 if spec.real else min(1.0, sum(shares))
    return round(prompts * (read * data.max_prompt_tokens + sum(shares) * data.max_response_tokens))


def _share(sampler: Sequence[tuple[int, float]], k: int) -> float:
    return dict(sampler).get(k, 0.0)


def _union(stage: Stage) -> bool:
    return getattr(stage.needs["pairs"].spec, "draw", None) is None


def _dataset(stage: Stage) -> Dataset:
    while not isinstance(stage.spec, PrepareSpec):
        stage = stage.needs["data"] if "data" in stage.needs else stage.needs["pairs"]
    return stage.spec.dataset


def _longest(stage: Stage) -> int:
    """The most tokens that a prompt and an answer have together."""
    data = _dataset(stage)
    return data.max_prompt_tokens + data.max_response_tokens


def memory(todo: Sequence[Stage], model: Model) -> Memory:
    """The memory of the heaviest stage of each kind, every row at its limits.

    With P weights of b bytes, T of them trained, N tokens read at once (R of them in answers), B rows of L tokens that
    are drawn, l layers of widths h (hidden), i (inner) and c (keys, as values), V tokens in the vocabulary, a bytes a
    number of the forward pass, and at most C logits made at a time, K kept:

        parameters  b P, 2 b P in divergence (two models); under autocast of float32 weights 2 P more, since what is
                    cast is kept while a stage (in training, a micro-batch) uses it; else in generate b P more, since
                    on a CPU weights are laid out anew for drawing
        gradients   4 T                  train, sft
        optimizer   4 slots T            train, sft; `slots`: numbers that it keeps of a weight
        activations a N l (8 h + 4 i + 2 c)   train, sft; elsewhere, one layer at a time, without the l
        logits      12 B V               generate: the last ones and their sums
                    8 min(C, R V)        score: in float32, twice
                    16 max(C, R V)       divergence: of both models
                    4 min(K, R V) + 12 min(C, R V)   train, sft
        cache       B L l 2 c a          generate
        libraries   Python, torch and transformers as imported

    With gradient checkpointing a layer keeps h and one layer is made again at a time. `sharding=full` divides the
    parameters, gradients and optimizer of training by the processes. Coarse: what kernels need for themselves,
    attention without flash and fragments that the allocator keeps are not counted; rows are mostly shorter.
    """
    widths = sizes.shape(model)
    heavy = [stage for stage in todo if isinstance(stage.spec, Heavy)]
    if widths is None or not heavy:
        return Memory({})
    found: dict[str, Held] = {}
    for stage in heavy:
        held = _held(stage, widths, model)
        if stage.kind not in found or held.total > found[stage.kind].total:
            found[stage.kind] = held
    hardware = [stage.spec.hardware for stage in heavy if isinstance(stage.spec, Heavy)]
    return Memory(found, max(one.processes for one in hardware))


LIBRARIES = 500_000_000  # bytes: Python, torch and transformers as imported


def _held(stage: Stage, widths: sizes.Shape, model: Model) -> Held:
    spec = stage.spec
    assert isinstance(spec, Heavy)
    trains = isinstance(spec, SftSpec | TrainSpec)
    weights, trained = sizes.parameters(model), sizes.trained_parameters(model) if trains else 0
    quantized = QUANTIZED[model.lora.quantize] if isinstance(model, Pretrained) else None
    cast = spec.hardware.precision is Precision.bf16 and model.dtype is Dtype.float32
    copy = 0 if quantized or not (cast or isinstance(spec, GenerateSpec)) else 2 if cast else BYTES[model.dtype]
    parameters = weights * ((quantized or BYTES[model.dtype]) * (1 + isinstance(spec, DivergenceSpec)) + copy)
    optimizer = spec.optimizer if isinstance(spec, TrainSpec) else Optimizer.adamw
    share = spec.hardware.processes if trains and spec.hardware.sharding is Sharding.full else 1
    activations, logits, cache = _working(stage, spec, widths, model)
    return Held(
        parameters=round(parameters / share),
        gradients=4 * trained // share,
        optimizer=4 * SLOTS[optimizer] * trained // share,
        activations=activations,
        logits=logits,
        cache=cache,
        libraries=LIBRARIES,
    )


def _working(stage: Stage, spec: Heavy, widths: sizes.Shape, model: Model) -> tuple[int, int, int]:
    """Bytes of activations, logits and cache."""
    hardware: Hardware = spec.hardware
    data = _dataset(stage)
    a = 2 if hardware.precision is Precision.bf16 or model.dtype is Dtype.bfloat16 else 4
    longest, response = _longest(stage), data.max_response_tokens
    layer = 8 * widths.hidden + 4 * widths.inner + 2 * widths.cached
    if isinstance(spec, GenerateSpec):
        rows, length = spec.generation.batch_size, data.max_prompt_tokens + spec.max_new_tokens
        return 0, 12 * rows * widths.vocabulary, a * rows * length * widths.layers * 2 * widths.cached
    if isinstance(spec, ScoreSpec):
        answers = spec.most * response
        tokens = _at_once(hardware.batch_tokens, longest - response + answers, hardware.score_batch_size)
        logits = tokens * answers // (longest - response + answers) * widths.vocabulary
        return a * tokens * layer, 8 * min(logits, sizes.LOGITS_AT_ONCE), 0
    if isinstance(spec, DivergenceSpec):  # all logits of a batch of both models; a batch is small, or one answer
        tokens = max(longest, min(hardware.batch_tokens, sizes.LOGITS_AT_ONCE // widths.vocabulary))
        return a * tokens * layer, 16 * max(sizes.LOGITS_AT_ONCE, response * widths.vocabulary), 0
    pair = longest + response if isinstance(spec, TrainSpec) and spec.loss.plays else longest
    tokens = _at_once(hardware.batch_tokens, pair, hardware.micro_batch_size)
    logits = tokens * (pair - data.max_prompt_tokens) // pair * widths.vocabulary
    kept = widths.layers * widths.hidden + layer if hardware.gradient_checkpointing else widths.layers * layer
    return a * tokens * kept, 4 * min(logits, sizes.LOGITS_KEPT) + 12 * min(logits, sizes.LOGITS_AT_ONCE), 0


def helps(todo: Sequence[Stage], model: Model, room: int) -> str | None:
    """The first setting that makes the estimate fit, with what would then be held; None where it fits, or none does."""
    now = memory(todo, model)
    if now.most <= room:
        return None
    for word, stages, other in _remedies(todo, model):
        then = memory(stages, other)
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
    if any(spec.hardware.processes > 1 and spec.hardware.sharding is Sharding.none for spec in specs):
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


def _at_once(tokens: int, longest: int, most: int | None) -> int:
    """Tokens that a model reads at once: as many rows as the budget holds, or one row that is longer."""
    rows = max(1, tokens // longest)
    return longest * (rows if most is None else min(rows, most))
