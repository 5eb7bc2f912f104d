"""How many examples a run has and how long they are: as prepared and drawn so far, or at most by the settings."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spin_reg.corpora import Dataset, Toy
from spin_reg.errors import DamagedError
from spin_reg.plan import Stage
from spin_reg.roles import answers_role
from spin_reg.specs import AnswersSpec, GenerateSpec, ScoreSpec, Split

if TYPE_CHECKING:
    from spin_reg.footers import Cost

log = logging.getLogger(__name__)
DRAWN = {"generated_ids": "real_ids", "generated": "real"}  # columns of drawn answers, what they are taken to be like


@dataclass(frozen=True)
class Amounts:
    """Examples, tokens and bytes.

    Attributes:
        rows: examples of each split, or as many as the settings allow (0: unknown).
        prompt, real: tokens of a prompt and of its real answer, the means of a split.
        drawn: tokens of an answer that an iterate draws, the mean, where its own limit is no lower.
        costs: of each split what the columns of a table weigh; empty: nothing is measured yet.
        records: what `stored` reckoned of stages' manifests.
        measured: whether these are means that were measured; else every number is the most that it can be.
    """

    rows: Mapping[Split, int]
    prompt: Mapping[Split, float]
    real: Mapping[Split, float]
    drawn: float = math.inf
    costs: Mapping[Split, Mapping[str, "Cost"]] = field(default_factory=dict)
    records: dict[Any, int] = field(default_factory=dict, compare=False)
    measured: bool = False


def limits(dataset: Dataset, rows: Mapping[Split, int] | None = None) -> Amounts:
    """Every prompt and answer at its limit, and at most as many `rows`, or as the settings ask for."""
    train, held = dataset.num_prompts or 0, dataset.num_heldout
    both = {Split.train: train, Split.heldout: held}
    if isinstance(dataset, Toy):
        both |= {Split.retained_train: train, Split.retained_heldout: held}
    return Amounts(
        rows=both if rows is None else rows,
        prompt=dict.fromkeys(Split, float(dataset.max_prompt_tokens)),
        real=dict.fromkeys(Split, float(dataset.max_response_tokens)),
    )


def measured(data: Path, answers: tuple[Split, Path] | None = None) -> Amounts | None:
    """The means of prepared data and of a table of answers, read off the ends of their files; None where they are not
    there, or cannot be read: the stage that needs them says why.

    Args:
        data: the folder of the prepared data. answers: a table drawn from a split of them; None: drawn answers are
            taken to be as the real ones.
    """
    paths = {split: data / f"{split}.parquet" for split in Split}
    paths = {split: path for split, path in paths.items() if path.is_file()}
    if not paths:
        return None
    from spin_reg import footers, tables  # a plan without data does not wait for them

    try:
        ends = {split: footers.columns(path) for split, path in paths.items()}
        drawn = None if answers is None else footers.columns(answers[1])
    except DamagedError as error:
        log.debug("no lengths of %s: %s", data, error)
        return None
    real = {split: table.mean("real_ids") for split, table in ends.items()}
    costs = {split: footers.costs(table, tables.EXAMPLES) for split, table in ends.items()}
    beside = {name: 1.0 for name in DRAWN}
    if answers is not None and drawn is not None:
        made, given = footers.costs(drawn, tables.ANSWERS), costs[answers[0]]
        beside = {name: made[name].value / given[like].value for name, like in DRAWN.items() if given[like].value}
    for own in costs.values():
        own |= {name: own[like].times(beside.get(name, 1.0)) for name, like in DRAWN.items()}
    return Amounts(
        rows={split: table.rows for split, table in ends.items()},
        prompt={split: table.mean("prompt_ids") for split, table in ends.items()},
        real=real,
        drawn=real[Split.train] if drawn is None else drawn.mean("generated_ids"),
        costs=costs,
        measured=True,
    )


def length(spec: AnswersSpec, have: Amounts) -> float:
    """Tokens of an answer; those that were published are kept whole, whatever the limit of drawn ones."""
    drawn = min(have.drawn, spec.max_new_tokens)
    return drawn if isinstance(spec, GenerateSpec) else max(drawn, have.real[spec.split])


def answer(stage: Stage, have: Amounts) -> float:
    """Tokens of an answer, no real one, that a stage reads, itself or in its pairs."""
    near = [stage, *(need for role, need in stage.needs.items() if role == "pairs")]
    specs = [need.spec for one in near for need in one.needs.values()]
    return max((length(spec, have) for spec in specs if isinstance(spec, AnswersSpec)), default=0.0)


def drawing(spec: GenerateSpec) -> float:
    """The share of a split's prompts that an iterate draws an answer to.

    A draw deals every prompt to one of the window's iterates: each is counted as if it got its share.
    """
    return 1.0 if spec.draw is None else _share(spec.draw.samplers[-1], spec.k)


def scoring(stage: Stage, spec: ScoreSpec) -> tuple[float, float, float]:
    """The shares of a split's prompts, of their real answers and of drawn ones (may be above 1) that a stage reads."""
    shares = []
    for j in spec.window:
        made = stage.needs[answers_role(j)].spec
        drawn = spec.draw or (made.draw if isinstance(made, GenerateSpec) else None)  # under `reuse`: what is left
        shares.append(1.0 if drawn is None else _share(drawn.samplers[-1], j))
    return 1.0 if spec.real else min(1.0, sum(shares)), float(spec.real), sum(shares)


def _share(sampler: Sequence[tuple[int, float]], k: int) -> float:
    return dict(sampler).get(k, 0.0)
