"""The names of what is reported of an iterate, where each should go, and how a curve over the iterates behaves."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise
from typing import Any


class Healthy(StrEnum):
    """Where a metric should go over the iterations."""

    low = "low"
    high = "high"
    half = "half"  # toward 0.5: what is compared can no longer be told apart


HEALTHY = {  # what is not here has no side that is better by itself: margins, divergences between iterates, lengths
    "eval/heldout_nll": Healthy.low,
    "eval/heldout_nll_change": Healthy.low,
    "eval/heldout_real_logprob": Healthy.high,
    "eval/preferred_to_base": Healthy.high,
    "eval/exact_match": Healthy.high,
    "eval/exact_match_answered": Healthy.high,
    "eval/exact_match_change": Healthy.high,
    "eval/kl_data": Healthy.low,
    "eval/kl_data_reverse": Healthy.low,
    "eval/kl_off": Healthy.low,
    "eval/length_auc": Healthy.half,
    "eval/stop_rate": Healthy.high,
    "eval/cutoff_share": Healthy.low,
}
EXACT_MATCH = ("eval/exact_match", "eval/exact_match_answered", "eval/exact_match_change")  # only where asked for
KNOWN_LANGUAGE = ("eval/kl_data", "eval/kl_data_reverse", "eval/kl_off")  # only where p_data is known


def badness(name: str, value: float) -> float:
    """A number that falls as this metric gets better."""
    healthy = HEALTHY[name]
    return abs(value - 0.5) if healthy is Healthy.half else value if healthy is Healthy.low else -value


def best(name: str, values: Mapping[int, float]) -> int | None:
    """The iterate that is best (the first of equals); None where no side is better, or all are as good."""
    if name not in HEALTHY or len(set(values.values())) < 2:
        return None
    return min(values, key=lambda k: badness(name, values[k]))


def worsenings(bad: Sequence[float]) -> int:
    """How many steps at the end of a curve of badness go up without a break."""
    count = 0
    for before, after in pairwise(bad):
        count = count + 1 if after > before else 0
    return count


def instability(bad: Sequence[float]) -> float:
    """The sum of all that a curve of badness goes up, step by step: sum_t max(0, b_{t+1} - b_t).

    In the metric's unit. 0 for a curve that never gets worse, and for one that never moves: read it beside the best and
    the last value. For a higher-is-better metric m = -b it is sum_t max(0, m_t - m_{t+1}).
    """
    return sum(max(0.0, after - before) for before, after in pairwise(bad))


def drawdown(bad: Sequence[float]) -> float:
    """The largest loss against what was reached before: max over s < t of b_t - b_s, and at least 0."""
    lowest, worst = float("inf"), 0.0
    for value in bad:
        lowest = min(lowest, value)
        worst = max(worst, value - lowest)
    return worst


@dataclass(frozen=True)
class StopWhen:
    """Play no further iteration once `metric` of the newest iterates got worse `worse` times in a row."""

    metric: str
    worse: int


def rule(key: str, value: Any) -> StopWhen | None:
    """A setting as a checked rule; None is none.

    Raises:
        ValueError: it is no such mapping, or the metric has no side that is better.
    """
    if value is None or isinstance(value, StopWhen):
        return value
    if not isinstance(value, dict) or set(value) != {"metric", "worse"}:
        raise ValueError(f"{key}: give null, or both as in {{metric: eval/heldout_nll, worse: 2}}")
    metric, worse = value["metric"], value["worse"]
    if metric not in HEALTHY:
        raise ValueError(f"{key}.metric={metric}: give one of {', '.join(HEALTHY)}")
    if not isinstance(worse, int) or isinstance(worse, bool) or worse < 1:
        raise ValueError(f"{key}.worse={worse}: give a whole number from 1")
    return StopWhen(metric, worse)
