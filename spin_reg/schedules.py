"""Settings that may change from iteration to iteration: a number, or a list whose last value repeats."""

import math
from collections.abc import Sequence
from typing import Any


def per_iteration(
    name: str, value: Any, *, low: float, high: float = math.inf, open_low: bool = False, whole: bool = False
) -> list[float]:
    """A number or a list of numbers as a checked list of floats (of ints where `whole`).

    Raises:
        ValueError: not a number, not finite, out of [low, high] (of ]low, high] with `open_low`), or an empty list.
    """
    values = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    bounds = f"{'above' if open_low else 'from'} {low:g}" + ("" if math.isinf(high) else f" to {high:g}")
    kind = "whole number" if whole else "number"
    if not values:
        raise ValueError(f"{name} is an empty list; give a {kind} {bounds}, or a list of them, one an iteration")
    for v in values:
        number = isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v)
        if not number or v < low or v > high or (open_low and v == low) or (whole and v != int(v)):
            raise ValueError(f"{name}={v}: give a {kind} {bounds}, or a list of them, one an iteration")
    checked = [int(v) if whole else float(v) for v in values]
    while len(checked) > 1 and checked[-1] == checked[-2]:  # the last value repeats anyway: one meaning, one list
        checked.pop()
    return checked


def at(values: Sequence[float], t: int) -> float:
    """The value for iteration t; the last one repeats."""
    return values[min(t, len(values) - 1)]


def words_of(values: Sequence[float]) -> str:
    """A per-iteration setting as it reads in a folder name, for instance `0.5` or `0.1_0.5`."""
    return "_".join(f"{v:g}" for v in values)
