"""What the stages still to be made may take: tokens to draw, to score and to train on, and memory."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from spin_reg import sizes
from spin_reg.corpora import Dataset
from spin_reg.pace import Piece
from spin_reg.plan import Stage
from spin_reg.roles import answers_role
from spin_reg.settings import Dtype, Hardware, Model, Optimizer, Precision, Pretrained, Quantize
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
class Memory:
    """Bytes, by kind of stage: the most that one of the stages still to be made may hold."""

    by_kind: Mapping[str, int]

    def words(self, room: int) -> str:
        """For people; `room`: bytes of memory that the machine has."""
        if not self.by_kind:
            return "nothing left to load"
        listed = ", ".join(f"{kind} {human(size)}" for kind, size in self.by_kind.items())
        text = f"about {listed} (an estimate); {human(room)} here"
        if max(self.by_kind.values()) > room:
            text += ". It will not fit: lower hardware.batch_tokens or generation.batch_size, set "
            text += "hardware.gradient_checkpointing=true, model.lora.rank=16, or take another machine"
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

        generate   (b + a) P + B L l 2 c b + 12 B V                 weights laid out anew; the cache; the last logits
        score      b P + a N (8 h + 4 i + 2 c) + 8 min(C, R V)      one layer at a time; logits in float32, twice
        divergence 2 b P + a N (8 h + 4 i + 2 c) + 16 max(C, R V)   two models, and the logits of both
        train      b P + T (4 + 4 slots) + a N l (8 h + 4 i + 2 c) + 4 min(K, R V) + 12 min(C, R V)

    `slots`: numbers that the optimizer keeps of a weight. With gradient checkpointing a layer keeps h and one layer is
    made again at a time. Coarse: what kernels need for themselves, attention without flash and fragments that the
    allocator keeps are not counted, the libraries as 0.5 GB; and rows are mostly shorter than their limits.
    """
    widths = sizes.shape(model)
    if widths is None:
        return Memory({})
    found: dict[str, int] = {}
    weights, trained = sizes.parameters(model), sizes.trained_parameters(model)
    loaded = weights * (_quantized(model) or BYTES[model.dtype])
    for stage in todo:
        spec = stage.spec
        if not isinstance(spec, Heavy):
            continue
        need = (
            LIBRARIES + loaded * (1 + isinstance(spec, DivergenceSpec)) + _working(stage, spec, widths, model, trained)
        )
        found[stage.kind] = max(found.get(stage.kind, 0), round(need))
    return Memory(found)


def _quantized(model: Model) -> float | None:
    """Bytes a weight of a base that is held in 4 or 8 bits."""
    return QUANTIZED[model.lora.quantize] if isinstance(model, Pretrained) else None


LIBRARIES = 500_000_000  # bytes: Python, torch and transformers as imported


def _working(stage: Stage, spec: Heavy, widths: sizes.Shape, model: Model, trained: int) -> float:
    """Bytes beside the weights."""
    hardware: Hardware = spec.hardware
    b, data = BYTES[model.dtype], _dataset(stage)
    a = 2 if hardware.precision is Precision.bf16 or model.dtype is Dtype.bfloat16 else 4
    longest, response = _longest(stage), data.max_response_tokens
    layer = 8 * widths.hidden + 4 * widths.inner + 2 * widths.cached
    if isinstance(spec, GenerateSpec):
        rows, length = spec.generation.batch_size, data.max_prompt_tokens + spec.max_new_tokens
        laid_out = 0 if _quantized(model) else a * sizes.parameters(model)
        return laid_out + rows * (length * widths.layers * 2 * widths.cached * b + 12 * widths.vocabulary)
    if isinstance(spec, ScoreSpec):
        answers = spec.most * response
        tokens = _at_once(hardware.batch_tokens, longest - response + answers, hardware.score_batch_size)
        logits = tokens * answers // (longest - response + answers) * widths.vocabulary
        return a * tokens * layer + 8 * min(logits, sizes.LOGITS_AT_ONCE)
    if isinstance(spec, DivergenceSpec):  # all logits of a batch of both models; a batch is small, or one answer
        tokens = max(longest, min(hardware.batch_tokens, sizes.LOGITS_AT_ONCE // widths.vocabulary))
        return a * tokens * layer + 16 * max(sizes.LOGITS_AT_ONCE, response * widths.vocabulary)
    pair = longest + response if isinstance(spec, TrainSpec) and spec.loss.plays else longest
    tokens = _at_once(hardware.batch_tokens, pair, hardware.micro_batch_size)
    logits = tokens * (pair - data.max_prompt_tokens) // pair * widths.vocabulary
    slots = SLOTS[spec.optimizer] if isinstance(spec, TrainSpec) else SLOTS[Optimizer.adamw]
    kept = widths.layers * widths.hidden + layer if hardware.gradient_checkpointing else widths.layers * layer
    return (
        trained * (4 + 4 * slots)
        + a * tokens * kept
        + 4 * min(logits, sizes.LOGITS_KEPT)
        + 12 * min(logits, sizes.LOGITS_AT_ONCE)
    )


def _at_once(tokens: int, longest: int, most: int | None) -> int:
    """Tokens that a model reads at once: as many rows as the budget holds, or one row that is longer."""
    rows = max(1, tokens // longest)
    return longest * (rows if most is None else min(rows, most))
