"""The settings of data sets as plain values: what is read, what counts as one conversation, and the limits."""

import math
from dataclasses import dataclass, field, fields
from enum import StrEnum
from fractions import Fraction
from pathlib import Path
from typing import Any

from spin_reg.settings import MISSING, check, place, positive


class Generated(StrEnum):
    """Whose answers iteration 0 trains on: drawn from the run's own base, or read from the data.

    `published` is the user's word that the base of this run gave them: nothing here can check that.
    """

    own = "own"
    published = "published"


class Turns(StrEnum):
    """Which answer of a conversation is the real one: its last, after all that was said; or its first, as in SPIN."""

    last = "last"
    first = "first"


class Unique(StrEnum):
    """What makes two rows one: the same conversation, or the same prompt (the first row's answer counts)."""

    conversation = "conversation"
    prompt = "prompt"


@dataclass
class Dataset:
    """What every data set has. A prompt or an answer over its limit drops the row, counted and listed."""

    seed: int = 0
    num_prompts: int | None = None
    num_heldout: int = 64
    max_prompt_tokens: int = 512
    max_response_tokens: int = 512
    max_dropped: float = 0.05

    def __post_init__(self) -> None:
        positive(dataset__num_prompts=self.num_prompts, dataset__max_prompt_tokens=self.max_prompt_tokens)
        positive(dataset__max_response_tokens=self.max_response_tokens, dataset__num_heldout=self.num_heldout)
        ok = 0 <= self.max_dropped <= 1
        check(ok, f"dataset.max_dropped={self.max_dropped}: give the share of rows that may be dropped, 0 to 1")


@dataclass
class Toy(Dataset):
    """The embedded language with a known distribution; `num_prompts` pairs, and as many of a retained skill."""

    smoothing: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.num_prompts is not None, "dataset.num_prompts=null: the toy has no end; give a number")
        check(self.num_heldout > 1, "dataset.num_heldout=1: the toy's standard errors need 2 or more")
        ok = 0 < self.smoothing < 0.5
        check(ok, f"dataset.smoothing={self.smoothing}: give a probability above 0 (full support) and below 0.5")


@dataclass
class Corpus(Dataset):
    """What is read row by row.

    `system_prompt`: a system message for the rows that have none of their own. `heldout_share`: a prompt whose hash, as
    a number in [0, 1), is below it never trains, whatever else the data hold; held-out prompts come from these alone.
    `fold_system`: for chat templates without a system role, put a system message in front of the user's.
    """

    generated: Generated = Generated.own
    turns: Turns = Turns.last
    system_prompt: str | None = None
    unique: Unique = Unique.conversation
    heldout_share: float | None = None
    fold_system: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        ok = self.system_prompt is None or bool(self.system_prompt.strip())
        check(ok, f"dataset.system_prompt={self.system_prompt}: give a text, or null for none")
        ok = self.heldout_share is None or 0 < self.heldout_share < 1
        check(ok, f"dataset.heldout_share={self.heldout_share}: give a share above 0 and below 1, or null")


@dataclass
class Jsonl(Corpus):
    """A local .jsonl, .json or .parquet file."""

    path: str = place(MISSING)


@dataclass
class Hub(Corpus):
    """A data set of the Hugging Face Hub at a revision, or a folder laid out like one."""

    path: str = place(MISSING)
    subset: str | None = None
    revision: str | None = None
    split: str = "train"


FILES = (".jsonl", ".json", ".parquet")


@dataclass
class Part:
    """One data set of a mixture: a file (where the path is one, or ends like one), else a Hub name or a folder like it.

    `weight`: its share of the training rows and of the held-out prompts, relative to the others'.
    """

    path: str = MISSING
    weight: float = 1.0
    subset: str | None = None
    revision: str | None = None
    split: str = "train"

    def __post_init__(self) -> None:
        ok = math.isfinite(self.weight) and self.weight > 0
        check(ok, f"dataset.parts: {self.path} has weight={self.weight}: give a number above 0")
        plain = self.subset is None and self.revision is None and self.split == "train"
        ok = plain or not self.is_file()
        check(ok, f"dataset.parts: {self.path} is a file: leave out subset, revision and split")

    def is_file(self) -> bool:
        return self.path.endswith(FILES) or Path(self.path).expanduser().is_file()


@dataclass
class Mixture(Corpus):
    """Several data sets in one, each with its share of the rows."""

    parts: list[Part] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        check(bool(self.parts), "dataset.parts=[]: give a list of {path: ..., weight: ...}")
        labels = [label(part) for part in parts(self)]
        check(len(set(labels)) == len(labels), f"dataset.parts: {', '.join(labels)}: give each data set once")


def parts(dataset: Corpus) -> list[Jsonl | Hub]:
    """The data sets that a data set is made of, each with the settings of the whole; of one it is itself."""
    if not isinstance(dataset, Mixture):
        assert isinstance(dataset, Jsonl | Hub)
        return [dataset]
    shared: dict[str, Any] = {f.name: getattr(dataset, f.name) for f in fields(Corpus)}
    return [
        Jsonl(**shared, path=part.path)
        if part.is_file()
        else Hub(**shared, path=part.path, subset=part.subset, revision=part.revision, split=part.split)
        for part in dataset.parts
    ]


def label(part: Jsonl | Hub) -> str:
    """How a part is called where rows are told apart by it."""
    if isinstance(part, Jsonl):
        return part.path
    return ":".join(filter(None, [part.path, part.subset, part.split if part.split != "train" else None]))


def _weights(dataset: Corpus) -> list[Fraction]:
    """The weights as they were typed, so that their ratios are exact: 0.3 to 0.1 is 3 to 1, whatever floats say."""
    return [Fraction(repr(part.weight)) for part in dataset.parts] if isinstance(dataset, Mixture) else [Fraction(1)]


def shares(dataset: Corpus, total: int) -> list[int]:
    """How many of so many rows each part gives: in proportion to the weights, the largest remainders rounded up; of
    equal ones the first."""
    weights = _weights(dataset)
    exact = [total * weight / sum(weights) for weight in weights]
    given = [math.floor(share) for share in exact]
    by_remainder = sorted(range(len(given)), key=lambda i: given[i] - exact[i])
    for i in by_remainder[: total - sum(given)]:
        given[i] += 1
    return given


def most(dataset: Corpus, there: list[int]) -> int:
    """The most rows that all parts together can give by their shares, where the parts have so many."""
    weights = _weights(dataset)
    bounds = [(count + 1) * sum(weights) / weight for count, weight in zip(there, weights, strict=True)]
    total = min(sum(there), math.ceil(min(bounds)))  # a share is off by less than one row
    while any(share > count for share, count in zip(shares(dataset, total), there, strict=True)):
        total -= 1
    return total


def published(dataset: Dataset) -> bool:
    """Whether iteration 0 trains on answers that the data bring with them."""
    return isinstance(dataset, Corpus) and dataset.generated is Generated.published
