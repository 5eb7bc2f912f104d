"""The settings of a run as plain values: the dataclasses behind the config groups.

A field marked `runtime()` changes how a result is made, never the result (up to rounding): it is no part of a
fingerprint. Nor is one marked `place()`: what lies there is, by its hash. Every other field is.
"""

import re
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from spin_reg.metrics import rule
from spin_reg.schedules import per_iteration

ALL_LINEAR = "all-linear"
MISSING = "???"  # the text OmegaConf knows as "must be given"


def runtime(default: Any) -> Any:
    """A dataclass field that does not change results."""
    return field(default=default, metadata={"runtime": True})


def place(default: Any) -> Any:
    """A dataclass field that says where something lies: it names a run, and what lies there has a hash of its own."""
    return field(default=default, metadata={"place": True})


def later(default: Any) -> Any:
    """A dataclass field that came when there were runs already: at its default, which must stay what it is, it is no
    part of a fingerprint, so that theirs are what they were. Another value changes results.
    """
    return field(default=default, metadata={"later": True})


def check(ok: bool, message: str) -> None:
    """Raise ValueError with the message unless ok; `config.load` turns it into a ConfigError."""
    if not ok:
        raise ValueError(message)


def positive(**values: Any) -> None:
    """Raise ValueError unless each value is None or at least 1; names are keys with `__` for the dot."""
    for name, v in values.items():
        check(v is None or v >= 1, f"{name.replace('__', '.')}={v}: give a whole number from 1")


class Dtype(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"


class Precision(StrEnum):
    fp32 = "fp32"
    bf16 = "bf16"


class Optimizer(StrEnum):
    adamw = "adamw"
    rmsprop = "rmsprop"


class Sharding(StrEnum):
    """What ranks share that train together: nothing, the optimizer (ZeRO), its gradients too, or all (FSDP2)."""

    none = "none"
    zero1 = "zero1"
    zero2 = "zero2"
    full = "full"


class LrScheduler(StrEnum):
    linear = "linear"
    cosine = "cosine"
    constant = "constant"


class LossName(StrEnum):
    logistic = "logistic"
    hinge = "hinge"
    exponential = "exponential"
    ipo = "ipo"
    sft = "sft"


class Quantize(StrEnum):
    none = "none"
    nf4 = "nf4"
    int8 = "int8"


class KeepIterates(StrEnum):
    """Whose weights stay: all; those that the rest of the run or one more iteration needs; the last iterate's."""

    all = "all"
    needed = "needed"
    last = "last"


class LengthNorm(StrEnum):
    none = "none"
    mean = "mean"


@dataclass
class Sft:
    """An SFT stage that makes iterate 0: AdamW, cosine with 10 % warmup, mean NLL of the answers' tokens."""

    epochs: int = 0
    learning_rate: float = 2e-5
    batch_size: int = 16

    def __post_init__(self) -> None:
        check(self.epochs >= 0, f"model.sft.epochs={self.epochs}: give 0 (no SFT stage) or more")
        check(self.learning_rate > 0, f"model.sft.learning_rate={self.learning_rate}: give a number above 0")
        positive(model__sft__batch_size=self.batch_size)


@dataclass
class Model:
    """What every model has."""

    dtype: Dtype = Dtype.float32
    attn_implementation: str | None = None
    sft: Sft = field(default_factory=Sft)


@dataclass
class Tiny(Model):
    """A random Llama-shaped model with a byte-level tokenizer, made on the spot and fitted by the SFT stage."""

    hidden_size: int = 128
    num_layers: int = 4
    num_heads: int = 4
    init_seed: int = 0

    def __post_init__(self) -> None:
        positive(model__hidden_size=self.hidden_size, model__num_layers=self.num_layers)
        positive(model__num_heads=self.num_heads)
        even = self.hidden_size % (2 * self.num_heads) == 0
        check(even, f"model.hidden_size={self.hidden_size}: give a multiple of 2 * model.num_heads")


@dataclass
class Lora:
    """A low-rank adapter that is trained in place of the weights; `rank` 0: none. Scaled by alpha / rank.

    `alpha` null means 2 * rank. `target_modules`: `all-linear` (all but the output layer), or a list of layers' names.
    `quantize`: the frozen base in 4 or 8 bits (QLoRA, arXiv 2305.14314), for scoring and sampling too.
    """

    rank: int = 0
    alpha: int | None = None
    target_modules: Any = ALL_LINEAR
    quantize: Quantize = Quantize.none

    def __post_init__(self) -> None:
        check(self.rank >= 0, f"model.lora.rank={self.rank}: give 0 (no adapter) or more")
        positive(model__lora__alpha=self.alpha)
        names = self.target_modules
        ok = names == ALL_LINEAR or (isinstance(names, list) and bool(names) and all(isinstance(n, str) for n in names))
        check(ok, f"model.lora.target_modules={names}: give all-linear, or a list of names as [q_proj,v_proj]")
        if self.rank == 0:
            for key, off in (("alpha", None), ("target_modules", ALL_LINEAR), ("quantize", Quantize.none)):
                value = getattr(self, key)
                check(
                    value == off, f"model.lora.{key}={value}: without an adapter it does nothing; set model.lora.rank"
                )

    def scale(self) -> int:
        """LoRA's alpha."""
        return 2 * self.rank if self.alpha is None else self.alpha


@dataclass
class Pretrained(Model):
    """A causal language model with a chat template: a local Hugging Face folder, or a Hub name with a revision.

    `gguf_file`: the name of a GGUF file in it, read in place of safetensors, its weights written out in `dtype`.
    `chat_template`: a file with a Jinja template in place of the tokenizer's own, or of a missing one.
    `template_kwargs`: what else the template is given by name. Both are saved with the tokenizer of every iterate.
    """

    name_or_path: str = place(MISSING)
    revision: str | None = None
    gguf_file: str | None = None
    trust_remote_code: bool = False
    chat_template: str | None = place(None)
    template_kwargs: Any = None
    lora: Lora = field(default_factory=Lora)

    def __post_init__(self) -> None:
        name = self.gguf_file
        ok = name is None or (name.endswith(".gguf") and "/" not in name and "\\" not in name)
        check(ok, f"model.gguf_file={name}: give the name of one .gguf file in the model's folder")
        ok = name is None or self.lora.quantize is Quantize.none
        check(ok, f"model.gguf_file={name}: its weights are written out when read; leave model.lora.quantize out")
        pinned = re.fullmatch(r"[0-9a-f]{40}", self.revision or "") is not None
        check(
            pinned or not self.trust_remote_code,
            "model.trust_remote_code=true: code is run only from a commit that cannot move; give model.revision=COMMIT "
            "with all its 40 hex digits, and read that code first",
        )
        named = self.template_kwargs or {}
        ok = isinstance(named, dict) and all(isinstance(name, str) for name in named)
        check(ok, f"model.template_kwargs={named}: give names and values as {{enable_thinking: false}}")
        self.template_kwargs = named


@dataclass
class Schedule:
    """How long, how fast, how far. `learning_rate`, `beta` and `epochs` take a number or a list, one an iteration.

    `stop_when`: null, or {metric: eval/heldout_nll, worse: 2} to end the game once a metric of the newest iterates got
    worse so many times in a row.
    """

    iterations: int = 3
    epochs: Any = 1
    batch_size: int = 16
    learning_rate: Any = 5e-7
    beta: Any = 0.1
    optimizer: Optimizer = Optimizer.adamw
    lr_scheduler: LrScheduler = LrScheduler.linear
    warmup_ratio: float = 0.1
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    save_every: int = runtime(200)
    stop_when: Any = runtime(None)  # as iterations, no part of a run's identity

    def __post_init__(self) -> None:
        positive(schedule__iterations=self.iterations, schedule__batch_size=self.batch_size)
        positive(schedule__save_every=self.save_every)
        self.epochs = per_iteration("schedule.epochs", self.epochs, low=1, whole=True)
        self.learning_rate = per_iteration("schedule.learning_rate", self.learning_rate, low=0, open_low=True)
        if self.beta is not None:  # null: of a loss without an opponent, which `config.load` sees to
            self.beta = per_iteration("schedule.beta", self.beta, low=0, open_low=True)
        self.stop_when = rule("schedule.stop_when", self.stop_when)
        ok = 0 <= self.warmup_ratio <= 1
        check(ok, f"schedule.warmup_ratio={self.warmup_ratio}: give a share of the steps, 0 to 1")
        check(self.weight_decay >= 0, f"schedule.weight_decay={self.weight_decay}: give a number from 0")
        check(self.max_grad_norm > 0, f"schedule.max_grad_norm={self.max_grad_norm}: give a number above 0")


@dataclass
class Loss:
    """The preference loss; `length_norm=mean` divides each answer's log-ratio by its number of tokens."""

    name: LossName = LossName.logistic
    length_norm: LengthNorm = LengthNorm.none

    @property
    def plays(self) -> bool:
        """Whether there is an opponent: `sft` fits the real answers alone."""
        return self.name is not LossName.sft


@dataclass
class Evaluation:
    """Whether iterates are judged, and how many held-out samples are shown. `crossplay`: every iterate scores every
    other's held-out answers, for the whole cross-play matrix.
    """

    enabled: bool = True
    num_samples: int = 8
    crossplay: bool = False

    def __post_init__(self) -> None:
        check(self.num_samples >= 0, f"evaluation.num_samples={self.num_samples}: give 0 or more")


TRACKERS = ("none", "wandb", "tensorboard", "mlflow", "trackio", "swanlab", "comet_ml", "aim", "clearml", "dvclive")


@dataclass
class Tracker:
    """Where metrics are mirrored to; `metrics.jsonl` in the run folder is the truth.

    `patience`: seconds that a finished run waits at most for the tracker to take what is left.
    """

    name: str = "none"
    patience: float = runtime(60.0)

    def __post_init__(self) -> None:
        check(self.name in TRACKERS, f"tracker.name={self.name}: give one of {', '.join(TRACKERS)}")
        ok = 0 <= self.patience <= 86400
        check(ok, f"tracker.patience={self.patience}: give seconds, 0 to 86400 (a day)")


@dataclass
class Wandb(Tracker):
    """One Weights & Biases run over the whole loop; offline where no key is set."""

    name: str = "wandb"
    project: str = "spin-reg"
    entity: str | None = None
    group: str | None = None
    log_model: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.name == "wandb", f"tracker.name={self.name}: choose a tracker with tracker={self.name}")


@dataclass
class Hardware:
    """Where and how models run. `precision=bf16` is autocast over the weights' own dtype.

    `batch_tokens`: what the model reads at once in training and scoring; one prompt with its answers always fits.
    `micro_batch_size` pairs and `score_batch_size` answers are the most, where that is to be fewer.
    `isolate`: each stage that loads a model is a process of its own. `processes`: so many work on it together, through
    torchrun, with `threads` each. They are dealt shards of `shard_size` prompts, null: as many as the stage's kind has.
    `sharding`: in training, `full` lays weights, gradients and optimizer across them (FSDP2); `zero1` the optimizer,
    `zero2` its gradients too (DeepSpeed). `deterministic`: training takes kernels that give the same bits every time,
    as those of CPUs do; GPUs have quicker ones.
    """

    precision: Precision = Precision.fp32
    batch_tokens: int = runtime(2048)
    micro_batch_size: int | None = runtime(None)
    score_batch_size: int | None = runtime(None)
    gradient_checkpointing: bool = runtime(False)
    threads: int | None = runtime(None)
    isolate: bool = runtime(False)
    processes: int = runtime(1)
    shard_size: int | None = runtime(None)
    sharding: Sharding = runtime(Sharding.none)
    deterministic: bool = runtime(True)

    def __post_init__(self) -> None:
        positive(hardware__processes=self.processes, hardware__shard_size=self.shard_size)
        positive(hardware__micro_batch_size=self.micro_batch_size, hardware__threads=self.threads)
        positive(hardware__score_batch_size=self.score_batch_size, hardware__batch_tokens=self.batch_tokens)

    def shard(self, most: int) -> int:
        """How many prompts one process works on at a time, where a kind of stage has at most so many."""
        return min(most, self.shard_size or most)
