"""What each stage is given, as frozen plain values; a stage's fingerprint covers all but the `runtime` fields."""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from spin_reg.opponents import Draw
from spin_reg.settings import (
    Dataset,
    Evaluation,
    Generation,
    Hardware,
    Loss,
    LrScheduler,
    Model,
    Optimizer,
    Pretrained,
    Sft,
    runtime,
)


class Split(StrEnum):
    """The parts of a prepared data set; the last two exist where p_data is known."""

    train = "train"
    heldout = "heldout"
    retained_train = "retained_train"
    retained_heldout = "retained_heldout"


@dataclass(frozen=True)
class PrepareSpec:
    """Data into token ids, split into train and held-out."""

    model: Model = field(metadata={"runtime": True})  # only its tokenizer matters here
    tokenizer: str
    dataset: Dataset
    source: str | None


@dataclass(frozen=True)
class BaseSpec:
    """Iterate 0 is the base as it is."""

    model: Pretrained
    sha256: str


@dataclass(frozen=True)
class SftSpec:
    """Iterate 0 is fitted to the real answers."""

    model: Model
    sha256: str | None
    sft: Sft
    seed: int
    hardware: Hardware
    save_every: int = runtime(200)


@dataclass(frozen=True)
class GenerateSpec:
    """Answers of one iterate to the prompts of a split that `draw` deals to it (all of them without a draw)."""

    k: int
    split: Split
    round: int
    draw: Draw | None
    generation: Generation
    max_new_tokens: int
    seed: int
    hardware: Hardware


@dataclass(frozen=True)
class ScoreSpec:
    """Log-probs under iterate k: of a split's real answers, or of answers of iterate `j` (where `draw` deals so)."""

    k: int
    split: Split
    j: int | None
    draw: Draw | None
    hardware: Hardware


@dataclass(frozen=True)
class PairsSpec:
    """Answers and scores joined into the pairs of iteration t; `reference` as `opponents.to_json` writes it."""

    t: int
    reference: Any
    draw: Draw | None
    window: tuple[int, ...]


@dataclass(frozen=True)
class TrainSpec:
    """One iteration's training: iterate t + 1 from iterate t."""

    t: int
    learning_rate: float
    beta: float
    epochs: int
    optimizer: Optimizer
    lr_scheduler: LrScheduler
    batch_size: int
    warmup_ratio: float
    weight_decay: float
    max_grad_norm: float
    loss: Loss
    seed: int
    hardware: Hardware
    save_every: int = runtime(200)


@dataclass(frozen=True)
class EvaluateSpec:
    """What is reported of iterate k, from tables alone."""

    k: int
    beta: float | None
    reference: Any
    draw: Draw | None
    evaluation: Evaluation
