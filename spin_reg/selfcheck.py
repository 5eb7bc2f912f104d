"""What must hold when an iteration's training begins: the policy in memory is the iterate whose log-probs are on disk.

Before the first update the training forward's log-probs of both answers equal the stored ones of iterate t, and the
margin is beta * [(log pi_t(y) - log r(y)) - (log pi_t(y') - log r(y'))] from the tables alone: 0, and a logistic loss
of log 2, where the reference is iterate t (plain SPIN). A wrong model, template, truncation, dropout, position, dtype
or reference shows here at once.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from spin_reg.errors import NonFiniteError, SelfCheckError
from spin_reg.opponents import Reference, evaluate, scorers
from spin_reg.specs import CHECKED
from spin_reg.tables import Row

Scores = Mapping[int, Mapping[str, float]]
SHOWN = 8  # rows named in one error
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tolerance:
    """Nats a token: the largest gap of an answer, and (where arithmetic is coarse) the mean of the signed gaps.

    In float32 a log-prob hardly depends on its batch companions; drawing on a CPU rounds otherwise than training does,
    which moves single tokens by up to 7.5e-5. In bfloat16 companions move them, by up to a nat and more: single answers
    may be far off, but a mean that is off says that scoring and training do not compute the same thing. A longer answer
    averages that out: few tokens are allowed more.

    Attributes:
        total: nats that the sum over an answer may be off, where that is more. spread: the mean may be off by this over
            the root of all tokens, where that is more: so falls the deviation of a mean of independent gaps.
    """

    largest: float
    mean: float
    total: float = 0.0
    spread: float = 0.0

    def of_answer(self, length: int) -> float:
        """The largest gap of an answer of so many tokens, nats a token."""
        return max(self.largest, self.total / length)

    def of_mean(self, tokens: int) -> float:
        """The largest mean of the gaps of answers of so many tokens together, nats a token."""
        return max(self.mean, self.spread / math.sqrt(tokens))


FLOAT32, BFLOAT16 = Tolerance(1e-5, 1e-5), Tolerance(0.1, 0.02, total=2.0, spread=0.22)


@dataclass(frozen=True)
class Stored:
    """A pair, and what the score tables hold of its real and its generated answer: log pi_t and log r, nats."""

    pair: Row
    real: float
    generated: float
    reference_real: float
    reference_generated: float

    @property
    def name(self) -> str:
        return f"{self.pair['example_id']} (answer of iterate {self.pair['sampled_from']})"

    @property
    def lengths(self) -> tuple[int, int]:
        return len(self.pair["real_ids"]), len(self.pair["generated_ids"])


def to_check(
    pairs: Sequence[Row], t: int, reference: Reference, real: Scores, generated: Mapping[int, Scores]
) -> list[Stored]:
    """The first pairs for which iterate t's log-probs of both answers are stored.

    Args:
        real: log-probs of real answers by scoring iterate and example_id. generated: the same of generated answers, by
            the iterate that gave them.
    """
    found: list[Stored] = []
    for pair in pairs:
        name, j = pair["example_id"], pair["sampled_from"]
        if name in real[t] and name in generated[j][t]:
            tables = (real, generated[j])
            own = [table[t][name] for table in tables]
            mixed = [evaluate(reference, {k: table[k][name] for k in scorers(reference, j)}, j) for table in tables]
            found.append(Stored(pair, own[0], own[1], mixed[0], mixed[1]))
        if len(found) == CHECKED:
            break
    return found


def compare(
    stored: Sequence[Stored],
    terms: Callable[[Sequence[Row]], dict[str, Tensor]],
    *,
    t: int,
    beta: float,
    length_norm: bool,
    tolerance: Tolerance,
) -> dict[str, Any]:
    """Compare the training forward with the stored log-probs.

    Args:
        terms: pairs -> {real_logprob, generated_logprob, margin, loss}, each (B,), as training computes them.

    Returns:
        What was found, for the record: rows, gaps (nats a token), margins and mean loss.

    Raises:
        SelfCheckError: a gap is over its tolerance, with the rows. NonFiniteError: a number is NaN or infinite.
    """
    live = {name: values.tolist() for name, values in terms([s.pair for s in stored]).items()}
    for name, values in live.items():
        _refuse_nonfinite(name, values, stored, t)
    gaps = [
        ((real - s.real) / s.lengths[0], (generated - s.generated) / s.lengths[1])
        for s, real, generated in zip(stored, live["real_logprob"], live["generated_logprob"], strict=True)
    ]
    expected = [beta * _delta(s, length_norm) for s in stored]
    wrong = []
    for s, gap, margin, wanted in zip(stored, gaps, live["margin"], expected, strict=True):
        allowed = [tolerance.of_answer(length) for length in s.lengths]
        room = beta * math.fsum(a if length_norm else a * n for a, n in zip(allowed, s.lengths, strict=True))
        near = all(abs(g) <= a for g, a in zip(gap, allowed, strict=True))
        if not (near and abs(margin - wanted) <= room):  # also where one is NaN
            wrong.append(
                f"{s.name}: {gap[0]:+.2g} and {gap[1]:+.2g} nats a token, margin {margin:.4g} for {wanted:.4g}"
            )
    mean = math.fsum(g for gap in gaps for g in gap) / (2 * len(gaps))
    mean_allowed = tolerance.of_mean(sum(sum(s.lengths) for s in stored))
    found = {
        "rows": len(stored),
        "largest_gap": max(abs(g) for gap in gaps for g in gap),
        "mean_gap": mean,
        "margin": math.fsum(live["margin"]) / len(stored),
        "expected_margin": math.fsum(expected) / len(stored),
        "loss": math.fsum(live["loss"]) / len(stored),
        "tolerance": asdict(tolerance),
    }
    if wrong or not abs(mean) <= mean_allowed:
        few = f" (an answer {tolerance.total:g} where that is more)" if tolerance.total else ""
        raise SelfCheckError(
            f"The training forward does not give the stored log-probs of iterate {t}.",
            where=f"iteration {t}, {len(wrong)} of {len(stored)} rows: " + "; ".join(wrong[:SHOWN]),
            why=f"allowed: {tolerance.largest:g} nats a token{few}, {mean_allowed:.2g} in the mean; "
            f"the mean is {mean:+.2g}",
            todo="the model, its packages or a table is not what was scored: look at run.log for versions that differ, "
            "and begin the run anew under another run_name if they do",
        )
    log.info("self-check of iteration %d: %s", t, found)
    return found


def _refuse_nonfinite(name: str, values: Sequence[float], stored: Sequence[Stored], t: int) -> None:
    rows = [s.name for s, value in zip(stored, values, strict=True) if not math.isfinite(value)]
    if rows:
        raise NonFiniteError(
            f"The {name} is not a finite number.",
            where=f"iteration {t}, before its first step; rows {', '.join(rows[:SHOWN])}",
            why="the policy's weights or its arithmetic are broken",
            todo="look at the training curve of this iterate; try hardware.precision=fp32",
        )


def _delta(s: Stored, length_norm: bool) -> float:
    """Delta of a pair from the tables alone."""
    ratios = [s.real - s.reference_real, s.generated - s.reference_generated]
    if length_norm:
        ratios = [ratio / length for ratio, length in zip(ratios, s.lengths, strict=True)]
    return float(ratios[0] - ratios[1])
