"""Runs that differ only in the seed, against numbers worked out by hand."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from spin_reg.groups import Run, by_seed, difference, differing, grouped, spread


def run(seed: int, *values: float, **settings: Any) -> Run:
    return Run(Path(f"{settings}{seed}"), {"seed": seed, **settings}, {k: {"m": v} for k, v in enumerate(values)})


def test_runs_are_grouped_by_all_but_the_seed() -> None:
    runs = [run(1, a=1), run(0, a=2), run(0, a=1), run(2, a=None), run(2)]
    assert [[(r.settings.get("a"), r.seed) for r in group] for group in grouped(runs)] == [
        [(1, 0), (1, 1)],
        [(2, 0)],
        [(None, 2)],
        [(None, 2)],
    ]
    assert grouped([]) == []


def test_runs_on_other_data_are_another_experiment_and_the_same_data_elsewhere_are_not() -> None:
    """What lies at a path may have changed between two runs."""
    here = {"sources.data": "aaaa", "sources.model": ""}
    runs = [run(seed, **{"dataset.path": path}) for seed, path in enumerate(["x", "x", "y"])]
    one, changed, moved = (replace(r, contents=here | {"sources.data": d}) for r, d in zip(runs, "aba", strict=True))
    assert [[r.seed for r in group] for group in grouped([one, changed, moved])] == [[0, 2], [1]]
    assert [[r.seed for r in group] for group in grouped(runs)] == [[0, 1], [2]]  # of which no hash is on record


def test_of_two_equal_runs_the_one_that_came_further_counts() -> None:
    ((only,),) = grouped([run(0, 1.0), run(0, 1.0, 2.0), run(0, 3.0, 4.0)])
    assert only.metrics[1] == {"m": 2.0}


def test_spread_is_the_mean_and_the_standard_deviation_of_a_sample() -> None:
    found = spread([1.0, 2.0, 6.0])
    assert found is not None and (found.mean, found.n) == (3.0, 3) and found.sd == pytest.approx(7**0.5)
    one = spread([5.0])
    assert one is not None and (one.mean, one.sd, one.n) == (5.0, None, 1)
    assert spread([]) is None


def test_differences_are_paired_by_seed() -> None:
    """Seeds 1 and 2 are in both: 10 - 1 and 30 - 3, whatever seeds 0 and 3 say."""
    one = [run(0, 100.0), run(1, 1.0), run(2, 3.0)]
    other = [run(1, 10.0), run(2, 30.0), run(3, -100.0)]
    found = difference(one, other, "m", 0)
    assert found is not None and found.mean == 18.0 and found.sd == pytest.approx(18 / 2**0.5) and found.n == 2
    assert difference(one, other, "m", 1) is None and difference(one, other, "else", 0) is None
    assert by_seed(one, "m", 0) == {0: 100.0, 1: 1.0, 2: 3.0}


def test_settings_that_differ() -> None:
    assert differing([{"a": 1, "b": 2}, {"a": 1, "b": 3}, {"b": 2, "c": None}]) == {"a": [1, 1, None], "b": [2, 3, 2]}
    assert differing([{"a": 1}]) == {} == differing([])
