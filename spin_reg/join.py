"""Answers and scores joined by id into pairs with reference log-probs; the same for training and held-out rows."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from spin_reg import opponents, tables
from spin_reg.errors import DamagedError
from spin_reg.opponents import Draw, Reference
from spin_reg.roles import answers_role, generated_role, real_role
from spin_reg.specs import PairsSpec, Split
from spin_reg.tables import Row

Found = TypeVar("Found")


@dataclass(frozen=True)
class Pair:
    """A prompt with its real answer, one generated answer, and the reference log-probs of both (nats, sums)."""

    example: Row
    answer: Row
    reference_real: float
    reference_generated: float


def scores(folder: Path, j: int | None) -> dict[str, float]:
    """The log-probs of iterate j's answers (None: of the real ones) by example_id: nats, sums over their tokens."""
    return tables.numbers_by_id("logprob", folder / "scores.parquet", {"sampled_from": j})


def token_logprobs(folder: Path, j: int | None) -> tables.ById:
    """The same for every token: rows with `token_logprobs` by example_id; of held-out answers alone."""
    return tables.ById(folder / "scores.parquet", ["token_logprobs"], {"sampled_from": j})


def pairs(spec: PairsSpec, inputs: Mapping[str, Path], split: Split) -> Iterator[Pair]:
    """The pairs of an iteration, one at a time, in the order of (example, iterate that answered).

    Raises:
        DamagedError: a prompt without its answer, or an answer without a log-prob: missing is never 0.
    """
    reference = opponents.from_json(spec.reference)
    examples = tables.read(inputs["data"] / f"{split}.parquet")
    answers = {j: tables.ById(inputs[answers_role(j)] / "answers.parquet") for j in spec.window}
    real = {k: scores(inputs[real_role(k)], None) for k in opponents.support(reference)}
    generated = {
        j: {k: scores(inputs[generated_role(k, j)], j) for k in opponents.scorers(reference, j)} for j in spec.window
    }
    for example in examples:
        for j in _answerers(spec.window, spec.draw, example["example_id"]):
            answer = _found(answers[j], example["example_id"], f"answers of iterate {j}")
            both = [_mixed(reference, table, example["example_id"], j) for table in (real, generated[j])]
            yield Pair(example, answer, *both)


def _answerers(window: tuple[int, ...], draw: Draw | None, example_id: str) -> tuple[int, ...]:
    return window if draw is None else (draw.deal(example_id),)


def _mixed(reference: Reference, table: Mapping[int, Mapping[str, float]], example_id: str, j: int) -> float:
    logprobs = {k: _found(table[k], example_id, f"log-probs of iterate {k}") for k in opponents.scorers(reference, j)}
    return opponents.evaluate(reference, logprobs, j)


def _found(rows: Mapping[str, Found], example_id: str, what: str) -> Found:
    if example_id not in rows:
        raise DamagedError(
            f"A row is missing among the {what}.",
            where=f"example_id {example_id}",
            why="every pair needs it, and a missing log-prob is never taken for 0",
            todo="delete that stage's folder; the next call makes it again",
        )
    return rows[example_id]
