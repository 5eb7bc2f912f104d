"""What each stage is given, as frozen plain values; a stage's fingerprint covers all but the `runtime` fields."""

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, ClassVar

from spin_reg.corpora import Dataset
from spin_reg.exact import ExactMatch
from spin_reg.generation import Backend, Generation
from spin_reg.judged import BenchmarkSpec as BenchmarkSpec
from spin_reg.judged import ConverseSpec as ConverseSpec
from spin_reg.judged import JudgeSpec as JudgeSpec
from spin_reg.judged import QuestionsSpec as QuestionsSpec
from spin_reg.kept import Kept as Kept
from spin_reg.kept import Policy as Policy
from spin_reg.opponents import Draw
from spin_reg.settings import (
    Hardware,
    LengthNorm,
    Lora,
    Loss,
    LrScheduler,
    Model,
    Optimizer,
    Pretrained,
    Sft,
    runtime,
)

WEIGHTS = {"sha256": "files of the model", "tokenizer": "its tokenizer and chat template"}
CHECKED = 8  # pairs that the self-check reads: each costs a forward pass at the start of every iteration


class Split(StrEnum):
    """The parts of a prepared data set; the last two exist where p_data is known."""

    train = "train"
    heldout = "heldout"
    retained_train = "retained_train"
    retained_heldout = "retained_heldout"


@dataclass(frozen=True)
class PrepareSpec(Kept):
    """Data into token ids, split into train and held-out."""

    kind: ClassVar[str] = "prepare"
    version: ClassVar[int] = 2
    hashed: ClassVar[Mapping[str, str]] = {
        "source": "content of the data",
        "tokenizer": "the model's tokenizer and chat template",
    }

    model: Model = field(metadata={"runtime": True})  # only its tokenizer matters here
    tokenizer: str
    dataset: Dataset
    source: str | None


@dataclass(frozen=True)
class BaseSpec(Kept):
    """Iterate 0 is the base as it is; what is fine-tuned later, and how, is no part of it."""

    kind: ClassVar[str] = "base"
    version: ClassVar[int] = 1
    precious: ClassVar[bool] = True
    hashed: ClassVar[Mapping[str, str]] = WEIGHTS

    model: Pretrained = field(metadata={"runtime": True})
    revision: str | None
    sha256: str
    tokenizer: str  # its chat template too, which may come from elsewhere


@dataclass(frozen=True)
class SftSpec(Kept):
    """Iterate 0 is fitted to the real answers."""

    kind: ClassVar[str] = "sft"
    version: ClassVar[int] = 2
    precious: ClassVar[bool] = True
    hashed: ClassVar[Mapping[str, str]] = WEIGHTS

    model: Model
    sha256: str | None
    sft: Sft
    seed: int
    policy: Policy
    hardware: Hardware
    save_every: int = runtime(200)


@dataclass(frozen=True)
class GenerateSpec(Kept):
    """Answers of one iterate to the prompts of a split that `draw` deals to it (all of them without a draw)."""

    kind: ClassVar[str] = "generate"
    version: ClassVar[int] = 2

    k: int
    split: Split
    round: int
    draw: Draw | None
    generation: Generation
    max_new_tokens: int
    seed: int
    policy: Policy
    hardware: Hardware

    @property
    def scored(self) -> bool:
        """Whether an answer is drawn with the log-prob that a score stage would find, so that none is needed: from the
        policy itself, in arithmetic that hardly depends on batch companions, by our own kernels.
        """
        ours = self.generation.backend is Backend.transformers
        plain = self.generation.temperature == 1 and self.generation.top_p == 1
        return ours and plain and self.policy.layout is None

    def asked(self, names: Sequence[str]) -> list[int]:
        """The places of the examples that this iterate answers."""
        return [i for i, name in enumerate(names) if self.draw is None or self.draw.deal(name) == self.k]


@dataclass(frozen=True)
class PublishedSpec(Kept):
    """Answers to the training prompts that the data set brings with it, in place of iterate k's own."""

    kind: ClassVar[str] = "published"
    version: ClassVar[int] = 1

    k: int
    split: Split
    max_new_tokens: int
    model: Model = field(metadata={"runtime": True})  # only its tokenizer matters here, and the data have that


@dataclass(frozen=True)
class ScoreSpec(Kept):
    """Log-probs under iterate k of answers to a split's prompts, read together where a prompt has several.

    Attributes:
        real: the real answers are among them. window: the iterates whose answers are.
        draw: of those, only the answers that it deals. first: only those to the first so many prompts.
    """

    kind: ClassVar[str] = "score"
    version: ClassVar[int] = 2

    k: int
    split: Split
    real: bool
    window: tuple[int, ...]
    draw: Draw | None
    first: int | None
    policy: Policy
    hardware: Hardware

    @property
    def most(self) -> int:
        """How many answers one prompt may have here."""
        return self.real + (len(self.window) if self.draw is None else bool(self.window))

    def asked(self, names: Sequence[str], answered: Mapping[int, Container[str]]) -> dict[int, tuple[int | None, ...]]:
        """The places of the examples that have something to score, with the iterates whose answers that are.

        None stands for the real answer. It takes no answers, so that a plan can be counted before anything is drawn.

        Args:
            answered: the examples that each iterate of the window answered.
        """
        found: dict[int, tuple[int | None, ...]] = {}
        kept: dict[tuple[int | None, ...], tuple[int | None, ...]] = {}  # few are different
        for i, name in enumerate(names[: self.first]):
            dealt = self.window if self.draw is None else (self.draw.deal(name),)
            given = tuple(j for j in self.window if j in dealt and name in answered[j])
            if self.real or given:
                whose = (None, *given) if self.real else given
                found[i] = kept.setdefault(whose, whose)
        return found


@dataclass(frozen=True)
class PairsSpec(Kept):
    """Answers and scores joined into the pairs of iteration t; `reference` as `opponents.to_json` writes it."""

    kind: ClassVar[str] = "pairs"
    version: ClassVar[int] = 1

    t: int
    window: tuple[int, ...]
    reference: Any
    draw: Draw | None


@dataclass(frozen=True)
class TrainSpec(Kept):
    """One iteration's training: iterate t + 1 from iterate t. `window` and `reference` are those of its pairs; a loss
    without an opponent has neither them nor a beta, and is given the real answers.
    """

    kind: ClassVar[str] = "train"
    version: ClassVar[int] = 2
    precious: ClassVar[bool] = True

    t: int
    window: tuple[int, ...]
    reference: Any
    learning_rate: float
    beta: float | None
    epochs: int
    batch_size: int
    optimizer: Optimizer
    lr_scheduler: LrScheduler
    warmup_ratio: float
    weight_decay: float
    max_grad_norm: float
    loss: Loss
    lora: Lora | None
    seed: int
    policy: Policy
    hardware: Hardware
    save_every: int = runtime(200)


@dataclass(frozen=True)
class EvaluateSpec(Kept):
    """What is reported of iterate k, from tables alone; `game` is None for an iterate that played none.

    `matches`: each what iteration t played, against the answers of one iterate, so that iterate t + 1 is the
    discriminator. `exact_match`: how the answers of the inputs `results/KK` are compared with the real ones, if at all.
    """

    kind: ClassVar[str] = "evaluate"
    version: ClassVar[int] = 4
    remade: ClassVar[bool] = True  # evaluation settings are no part of a run's identity: others make it anew

    k: int
    game: PairsSpec | None
    matches: tuple[PairsSpec, ...]
    beta: float | None
    length_norm: LengthNorm
    num_samples: int
    exact_match: ExactMatch | None
    model: Model = field(metadata={"runtime": True})  # only its tokenizer matters here, and the data have that
    dataset: Dataset = field(metadata={"runtime": True})  # it is part of what the data are


@dataclass(frozen=True)
class DivergenceSpec(Kept):
    """KL(pi_k || pi_other) over the whole vocabulary, along iterate k's own answers to the `first` held-out prompts."""

    kind: ClassVar[str] = "divergence"
    version: ClassVar[int] = 1

    k: int
    other: int
    first: int
    policy: Policy
    hardware: Hardware


AnswersSpec = GenerateSpec | PublishedSpec
Judged = EvaluateSpec | DivergenceSpec | BenchmarkSpec | ConverseSpec | JudgeSpec
Spec = PrepareSpec | BaseSpec | SftSpec | AnswersSpec | ScoreSpec | PairsSpec | TrainSpec | Judged | QuestionsSpec
