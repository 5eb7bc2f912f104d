"""What a stage will leave on the disk: its tables, as what is there foretells them, its record, and what is beside."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from spin_reg import amounts, durable, rundir
from spin_reg.amounts import Amounts
from spin_reg.corpora import Toy, published
from spin_reg.plan import Stage
from spin_reg.specs import (
    AnswersSpec,
    DivergenceSpec,
    EvaluateSpec,
    GenerateSpec,
    PairsSpec,
    PrepareSpec,
    ScoreSpec,
    SftSpec,
    Split,
    TrainSpec,
)

VALUE, ENTRY = 40, 100  # bytes of a metric, and of what surrounds a sample or is said of another iterate, in JSON
ROW, TOKEN, SMALL = 216, 8, 1 << 15  # bytes at most: a row beside its tokens, a token (number and text), small files
HASH = "0" * 64
MADE = frozenset({"source", "data_logprob"})  # columns that not all data have
MODEL_FILES = 8  # of a stage that trains


def of(stage: Stage, iterate: int, have: Amounts) -> int:
    """Bytes of a finished stage; `iterate`: of an iterate's model. At most, where nothing is measured."""
    made = tabled(stage, have)
    tables = sum(_weighed(table, have) if have.measured else _most(table) for table in made)
    files, size = _beside(stage, have)
    size += iterate if isinstance(stage.spec, SftSpec | TrainSpec) else 0
    return round(tables + size) + record(stage, len(made) + files, have.records) + (0 if have.measured else SMALL)


def record(stage: Stage, files: int, seen: dict[Any, int]) -> int:
    """Bytes of the manifest of a stage with so many files.

    Args:
        seen: those of the plan so far. There may be hundreds of thousands; those of one shape differ by some digits.
    """
    draw = getattr(stage.spec, "draw", None)
    key = (stage.kind, files, len(stage.needs), 0 if draw is None else sum(map(len, draw.samplers)))
    if key not in seen:
        entries = {f"{i:015d}": {"size": 10**4, "sha256": HASH} for i in range(files)}
        seen[key] = len(durable.record(rundir.record(stage, dict.fromkeys(stage.needs, HASH), entries)))
    return seen[key]


@dataclass(frozen=True)
class Table:
    """A table of a stage.

    Attributes:
        schema: its name in `tables`. values: of columns that have not one value a row (tokens of ids, ids said once for
            many rows). null: columns without a value. split: of the data that it is about.
    """

    schema: str
    split: Split
    rows: float
    values: Mapping[str, float]
    null: frozenset[str] = frozenset()


def tabled(stage: Stage, have: Amounts) -> list[Table]:
    """The tables of a stage; at most, where lengths are not measured: no prompt is taken to be dealt to others."""
    spec = stage.spec
    if isinstance(spec, PrepareSpec):
        null = {split: MADE.difference(have.costs.get(split, {})) for split in have.rows}
        made = [Table("EXAMPLES", split, n, _asked(have, split, n), null[split]) for split, n in have.rows.items()]
        n, tokens = have.rows[Split.train], have.rows[Split.train] * have.real[Split.train]
        return made + [Table("PUBLISHED", Split.train, n, {"generated_ids": tokens})] * published(spec.dataset)
    if isinstance(spec, AnswersSpec):
        share = amounts.drawing(spec) if have.measured and isinstance(spec, GenerateSpec) else 1
        rows = share * have.rows[spec.split]
        tokens = rows * amounts.length(spec, have)
        scored = isinstance(spec, GenerateSpec) and spec.scored
        answers = Table("ANSWERS", spec.split, rows, {"generated_ids": tokens})
        return [answers, *[_scores(spec.split, rows, rows, tokens)] * scored]
    if isinstance(spec, ScoreSpec):
        most = (1, spec.real, spec.most - spec.real)
        read, real, drawn = amounts.scoring(stage, spec) if have.measured else most
        some = min(spec.first or have.rows[spec.split], have.rows[spec.split])
        tokens = some * (real * have.real[spec.split] + drawn * amounts.answer(stage, have))
        return [_scores(spec.split, some * (real + drawn), some * read, tokens, whole=not drawn)]
    if isinstance(spec, PairsSpec):
        rows = have.rows[Split.train] * (1 if spec.draw is not None else len(spec.window))
        values = _asked(have, Split.train, rows) | {"generated_ids": rows * amounts.answer(stage, have)}
        return [Table("PAIRS", Split.train, rows, values | {"example_id": have.rows[Split.train]})]
    if isinstance(spec, DivergenceSpec):
        return [Table("DIVERGENCES", Split.heldout, min(spec.first, have.rows[Split.heldout]), {})]
    return []


def _asked(have: Amounts, split: Split, rows: float) -> dict[str, float]:
    """Tokens of so many prompts and of their real answers."""
    return {"prompt_ids": rows * have.prompt[split], "real_ids": rows * have.real[split]}


def _scores(split: Split, rows: float, prompts: float, tokens: float, whole: bool = False) -> Table:
    """The tokens' own log-probs are kept of held-out answers. `whole`: real answers alone, which nobody drew."""
    null = {"token_logprobs"} if split is Split.train else set[str]()
    values = {"example_id": prompts, "token_logprobs": tokens}
    return Table("SCORES", split, rows, values, frozenset(null | ({"sampled_from"} if whole else set())))


def _weighed(table: Table, have: Amounts) -> float:
    from spin_reg import footers, tables  # a plan without data does not wait for them

    schema = getattr(tables, table.schema)
    return footers.weigh(schema, table.rows, table.values, have.costs[table.split], table.null)


def _most(table: Table) -> float:
    tokens = sum(n for name, n in table.values.items() if name != "example_id" and name not in table.null)
    return ROW * table.rows + TOKEN * tokens


def _beside(stage: Stage, have: Amounts) -> tuple[int, float]:
    """How many files of a stage are no tables and no weights, and what is known of their bytes."""
    spec = stage.spec
    if isinstance(spec, SftSpec | TrainSpec):
        return MODEL_FILES, 0.0
    if not isinstance(spec, EvaluateSpec):
        small = not isinstance(spec, GenerateSpec | ScoreSpec | PairsSpec)
        return small, small * ENTRY
    split = Split.heldout
    length = have.prompt[split] + have.real[split] + amounts.answer(stage, have)
    shown = min(spec.num_samples, have.rows[split]) * (ENTRY + length * _text(have))
    return 5, 2 * VALUE * values(stage) + ENTRY * (len(spec.matches) + spec.k) + shown


def values(stage: Stage) -> int:
    """How many metrics an evaluation has; a mean has its error too."""
    spec = stage.spec
    assert isinstance(spec, EvaluateSpec)
    known = 21 + 6 * isinstance(spec.dataset, Toy) + 7 * (spec.k > 0) + 2 * (spec.k > 1)
    known += 10 * (spec.game is not None) + (6 if spec.k > 0 else 5) * (spec.exact_match is not None)
    return known + 2 * sum(role.startswith("full_kl") for role in stage.needs)


def _text(have: Amounts) -> float:
    """Bytes of a token's text."""
    return have.costs[Split.train]["real"].unpacked if have.measured else TOKEN
