"""What the stages still to be made may take: tokens to draw, to score and to train on, and memory."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from spin_reg import amounts, processes, sizes, vllm_engine
from spin_reg.amounts import Amounts
from spin_reg.corpora import Dataset
from spin_reg.generation import Backend
from spin_reg.pace import Piece
from spin_reg.plan import Stage
from spin_reg.settings import Dtype, Hardware, Model, Optimizer, Precision, Pretrained, Quantize, Sharding
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
    """Tokens. `pairs`: how many are trained on, over all epochs. `measured`: of prompts and answers as long as those
    there are; else at most, every one at its limit.
    """

    drawn: int
    scored: int
    trained: int
    pairs: int
    measured: bool = False

    @property
    def tokens(self) -> int:
        """All of them."""
        return self.drawn + self.scored + self.trained

    def __add__(self, other: "Work") -> "Work":
        drawn, scored, trained = self.drawn + other.drawn, self.scored + other.scored, self.trained + other.trained
        return Work(drawn, scored, trained, self.pairs + other.pairs, self.measured and other.measured)

    def words(self) -> str:
        if not self.tokens:
            return "none left"
        listed = ", ".join(f"{count(getattr(self, name))} {name}" for name in ("drawn", "scored", "trained"))
        return f"{'about' if self.measured else 'at most'} {listed} on" + (
            f" ({count(self.pairs)} pairs)" if self.pairs else ""
        )


@dataclass(frozen=True)
class Held:
    """Bytes that one process of a stage holds at its fullest, by what they are for."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    cache: int
    kernels: int
    mapped: int
    libraries: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(vars(self).values())


@dataclass(frozen=True)
class Memory:
    """By kind of stage, what the heaviest of those still to be made may hold; so many `processes` hold as much each.

    `here`: how many of them are on this machine. `vllm`: whether answers are drawn by vLLM, whose memory is nothing
    that we reckon.
    """

    by_kind: Mapping[str, Held]
    processes: int = 1
    here: int = 1
    vllm: bool = False

    @property
    def most(self) -> int:
        """Bytes of the heaviest stage, of all its processes on this machine."""
        return self.here * max((held.total for held in self.by_kind.values()), default=0)

    def words(self, room: int, help: str | None = None) -> str:
        """For people; `room`: bytes of memory that the machine has. `help`: as `helps` found it."""
        if not self.by_kind:
            return _of_vllm() if self.vllm else "nothing left to load"
        listed = ", ".join(f"{kind} {human(held.total)}" for kind, held in self.by_kind.items())
        some = f", {self.here} of them here" if self.here < self.processes else ""
        each = f" in each of {self.processes} processes{some}" if self.processes > 1 else ""
        text = f"about {listed}{each} (an estimate); {human(room)} of RAM here"
        if self.most > room:
            over = [kind for kind, held in self.by_kind.items() if self.here * held.total > room]
            text += f". It will not fit ({', '.join(over)}): "
            text += help or "no single setting of ours helps enough; combine them, or take another machine"
        return f"{text}; {_of_vllm()}" if self.vllm else text


def _of_vllm() -> str:
    """What can be said of a program whose memory is not ours to reckon."""
    room = os.environ.get("VLLM_CPU_KVCACHE_SPACE", vllm_engine.ROOM["VLLM_CPU_KVCACHE_SPACE"])
    return f"beside it vLLM, not reckoned: the weights, {room} GiB of cache on a CPU, its own share of a GPU"


def count(number: float) -> str:
    """A number as people read it."""
    for unit in ("", "k", "M", "G"):
        if number < 1000:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g}T"


def pieces(stages: Sequence[Stage], have: Amounts) -> list[Piece]:
    """The stages of a plan with their tokens; how many a benchmark reads is not known here."""
    return [
        Piece(
            stage.name,
            stage.kind,
            stage.folder,
            None if isinstance(stage.spec, BenchmarkSpec | JudgeSpec) else work([stage], have).tokens,
        )
        for stage in stages
    ]


def work(todo: Sequence[Stage], have: Amounts) -> Work:
    """The tokens of the stages still to be made; answers for MT-Bench, which nothing tells of, at their limit."""
    drawn = scored = trained = 0.0
    pairs = 0
    for stage in todo:
        spec = stage.spec
        if isinstance(spec, GenerateSpec):
            drawn += have.rows[spec.split] * amounts.drawing(spec) * min(have.drawn, spec.max_new_tokens)
        elif isinstance(spec, ConverseSpec):
            drawn += spec.answers * spec.max_new_tokens
        elif isinstance(spec, ScoreSpec):
            read, real, made = amounts.scoring(stage, spec)
            some = have.rows[spec.split] if spec.first is None else min(spec.first, have.rows[spec.split])
            a_prompt = (
                read * have.prompt[spec.split] + real * have.real[spec.split] + made * amounts.answer(stage, have)
            )
            scored += some * a_prompt
        elif isinstance(spec, DivergenceSpec):
            some = min(spec.first, have.rows[Split.heldout])
            scored += 2 * some * (have.prompt[Split.heldout] + amounts.answer(stage, have))
        elif isinstance(spec, SftSpec):
            splits = [split for split in (Split.train, Split.retained_train) if split in have.rows]
            trained += spec.sft.epochs * sum(have.rows[one] * (have.prompt[one] + have.real[one]) for one in splits)
        elif isinstance(spec, TrainSpec):
            made = len(spec.window) if spec.loss.plays and _union(stage) else 1
            some = have.rows[Split.train] * made * spec.epochs
            pairs += some if spec.loss.plays else 0
            answers = have.real[Split.train] + (amounts.answer(stage, have) if spec.loss.plays else 0)
            trained += some * (have.prompt[Split.train] + answers)  # the prompt is read once
    return Work(round(drawn), round(scored), round(trained), pairs, have.measured)


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


def memory(todo: Sequence[Stage], model: Model, rows: Mapping[Split, int] | None = None) -> Memory:
    """The memory of the heaviest stage of each kind, every row at its limits.

    With P weights of b bytes, T of them trained, N tokens read at once (R of them in answers), B rows of L tokens that
    are drawn, l layers of widths h (hidden), i (inner) and c (keys, as values), V tokens in the vocabulary, a bytes a
    number of the forward pass, and at most C logits made at a time, K kept:

        parameters  b P, 2 b P in divergence (two models); under autocast of float32 weights 2 P more, since what is
                    cast is kept while a stage (in training, a micro-batch) uses it; else in generate b P more, since
                    on a CPU weights are laid out anew for drawing
        gradients   b T                  train, sft; for an adapter and ZeRO 4 in place of b
        optimizer   b slots T            train, sft; `slots`: numbers that it keeps of a weight
        activations a N l (8 h + 4 i + 2 c)   train, sft; elsewhere, one layer at a time, without the l
        logits      12 B V               generate: the last ones and their sums
                    4 min(C, R V)        score: in float32
                    16 max(C, R V)       divergence: of both models
                    4 min(K, R V) + 12 min(C, R V)   train, sft
        cache       B L l 2 c a          generate
        kernels     of products, as many as `processes.bound` allows
        mapped      the file of the weights, where they have another dtype there: while it is read all of it counts as
                    resident, but what comes after takes its place
        libraries   Python, torch and transformers as imported

    With gradient checkpointing a layer keeps h and one layer is made again at a time. `sharding` divides what it shares
    of training's parameters, gradients and optimizer, to which ZeRO adds 4 T, by the processes. Not counted: what the
    main rank reads whole before a model is laid out (each rank does, of a quantized base, a GGUF file, or where weights
    are cast under an adapter). Coarse: kernels' own needs, attention without flash or in float32 under bf16, and
    fragments that the allocator keeps, are not counted; rows are mostly shorter.

    Args:
        rows: how many examples each split has, or may have, so that none is counted that is not there.
    """
    widths = sizes.shape(model)
    heavy = [stage for stage in todo if isinstance(stage.spec, Heavy)]
    ours = [stage for stage in heavy if not _by_vllm(stage)]
    if widths is None or not ours:
        return Memory({}, vllm=len(ours) < len(heavy))
    mapped = sizes.cast_from(model, BYTES[model.dtype])
    weights = _Weights(sizes.parameters(model), sizes.trained_parameters(model), mapped)
    found: dict[str, Held] = {}
    for stage in ours:
        held = _held(stage, widths, weights, model, rows or {})
        if stage.kind not in found or held.total > found[stage.kind].total:
            found[stage.kind] = held
    hardware = [stage.spec.hardware for stage in heavy if isinstance(stage.spec, Heavy)]
    many, here = (max(map(of, hardware)) for of in (processes.count, processes.here))
    return Memory(found, many, here, vllm=len(ours) < len(heavy))


def _by_vllm(stage: Stage) -> bool:
    return isinstance(stage.spec, GenerateSpec) and stage.spec.generation.backend is Backend.vllm


LIBRARIES = 500_000_000  # bytes: Python, torch and transformers as imported
KERNEL = 2**19  # bytes: code and plan of a product
SHARED = {
    "parameters": {Sharding.full},
    "gradients": {Sharding.full, Sharding.zero2},
    "optimizer": {Sharding.full, Sharding.zero2, Sharding.zero1},
}


@dataclass(frozen=True)
class _Weights:
    """How many a model has and how many are trained; bytes of the files that they are cast from."""

    count: int
    trained: int
    cast_from: int


def _held(stage: Stage, widths: sizes.Shape, of: _Weights, model: Model, rows: Mapping[Split, int]) -> Held:
    spec = stage.spec
    assert isinstance(spec, Heavy)
    trains = isinstance(spec, SftSpec | TrainSpec)
    weights, trained = of.count, of.trained if trains else 0
    quantized = QUANTIZED[model.lora.quantize] if isinstance(model, Pretrained) else None
    cast = spec.hardware.precision is Precision.bf16 and model.dtype is Dtype.float32
    copy = 0 if quantized or not (cast or isinstance(spec, GenerateSpec)) else 2 if cast else BYTES[model.dtype]
    plain = weights * (quantized or BYTES[model.dtype]) * (1 + isinstance(spec, DivergenceSpec))
    optimizer = spec.optimizer if isinstance(spec, TrainSpec) else Optimizer.adamw
    sharding = spec.hardware.sharding if trains else Sharding.none
    over = {part: processes.count(spec.hardware) if sharding in kinds else 1 for part, kinds in SHARED.items()}
    zero = sharding in (Sharding.zero1, Sharding.zero2)  # a copy of the weights is in the share
    adapter = isinstance(model, Pretrained) and model.lora.rank > 0
    own = 4 if zero or adapter else BYTES[model.dtype]
    activations, logits, cache = _working(stage, spec, widths, model, rows)
    held = Held(
        parameters=round((plain + weights * copy) / over["parameters"]),
        gradients=own * trained // over["gradients"],
        optimizer=own * (SLOTS[optimizer] + zero) * trained // over["optimizer"],
        activations=activations,
        logits=logits,
        cache=cache,
        kernels=KERNEL * sizes.KERNELS,
        mapped=0,
        libraries=LIBRARIES,
    )
    later = held.total - LIBRARIES - round(plain / over["parameters"])
    return replace(held, mapped=max(0, of.cast_from - later))


def _working(
    stage: Stage, spec: Heavy, widths: sizes.Shape, model: Model, rows: Mapping[Split, int]
) -> tuple[int, int, int]:
    """Bytes of activations, logits and cache."""
    hardware: Hardware = spec.hardware
    data = _dataset(stage)
    a = 2 if hardware.precision is Precision.bf16 or model.dtype is Dtype.bfloat16 else 4
    longest, response = _longest(stage), data.max_response_tokens
    layer = 8 * widths.hidden + 4 * widths.inner + 2 * widths.cached
    if isinstance(spec, GenerateSpec):
        drawn = _fewest(spec.generation.batch_size, hardware.shard_size, rows.get(spec.split)) or 1
        length = data.max_prompt_tokens + spec.max_new_tokens
        return 0, 12 * drawn * widths.vocabulary, a * drawn * length * widths.layers * 2 * widths.cached
    if isinstance(spec, ScoreSpec):
        answers = spec.most * response
        most = _fewest(hardware.score_batch_size, spec.first, rows.get(spec.split))
        tokens = _at_once(hardware.batch_tokens, longest - response + answers, most)
        logits = tokens * answers // (longest - response + answers) * widths.vocabulary
        return a * tokens * layer, 4 * min(logits, sizes.LOGITS_AT_ONCE), 0
    if isinstance(spec, DivergenceSpec):  # all logits of a batch of both models; a batch is small, or one answer
        tokens = max(longest, min(hardware.batch_tokens, sizes.LOGITS_AT_ONCE // widths.vocabulary))
        return a * tokens * layer, 16 * max(sizes.LOGITS_AT_ONCE, response * widths.vocabulary), 0
    pair = longest + response if isinstance(spec, TrainSpec) and spec.loss.plays else longest
    step = spec.batch_size if isinstance(spec, TrainSpec) else spec.sft.batch_size
    tokens = _at_once(hardware.batch_tokens, pair, _fewest(hardware.micro_batch_size, step))
    logits = tokens * (pair - data.max_prompt_tokens) // pair * widths.vocabulary
    kept = widths.layers * widths.hidden + layer if hardware.gradient_checkpointing else widths.layers * layer
    return a * tokens * kept, 4 * min(logits, sizes.LOGITS_KEPT) + 12 * min(logits, sizes.LOGITS_AT_ONCE), 0


def _fewest(*limits: int | None) -> int | None:
    """The least of those that are known."""
    return min((limit for limit in limits if limit), default=None)


def _at_once(tokens: int, longest: int, most: int | None) -> int:
    """Tokens that a model reads at once: as many as the budget holds or the rows have, or one row that is longer."""
    return max(longest, tokens if most is None else min(tokens, most * longest))
