"""Held-out metrics on distributions where the value is known: closed forms, enumeration, brute force."""

import math
from collections.abc import Callable
from itertools import combinations

import numpy as np
import pytest

from spin_reg import diagnostics, metrics
from spin_reg.diagnostics import Values

RNG = np.random.default_rng(0)


def jackknife(made: Callable[..., Values], *columns: np.ndarray) -> float:
    """The standard error by leaving out one prompt after the other; asymptotically the delta method's."""
    n = len(columns[0])
    left = [made("x", *(np.delete(column, i) for column in columns))["x"] for i in range(n)]
    return math.sqrt((n - 1) / n * sum((value - sum(left) / n) ** 2 for value in left))


def test_a_mean_and_its_standard_error() -> None:
    found = diagnostics.mean("x", [0.5, 1.5, 1.0, 3.0])
    assert found["x"] == pytest.approx(1.5)
    assert found["x_se"] == pytest.approx(np.std([0.5, 1.5, 1.0, 3.0], ddof=1) / 2)
    assert diagnostics.mean("x", [True, False, True]) == pytest.approx({"x": 2 / 3, "x_se": 1 / 3})
    assert diagnostics.mean("x", [2.0]) == {"x": 2.0}  # one value says nothing of its error


def test_a_ratio_counts_answers() -> None:
    totals, counts = RNG.gamma(2.0, size=200) * 5, RNG.integers(1, 30, size=200).astype(float)
    found = diagnostics.ratio("x", totals, counts)
    assert found["x"] == pytest.approx(totals.sum() / counts.sum())
    assert found["x_se"] == pytest.approx(jackknife(diagnostics.ratio, totals, counts), rel=0.03)
    same = diagnostics.ratio("x", totals, np.full(200, 4.0))  # equal lengths: the mean over answers, by length
    assert same == pytest.approx(diagnostics.mean("x", totals / 4))


def test_token_entropy_is_that_of_the_sampled_paths() -> None:
    """Expected -log p over expected tokens, by enumeration: the entropy of a path over its mean length."""
    p = {(0,): 0.5, (1, 0): 0.3, (1, 1, 0): 0.2}
    entropy, length = (-sum(q * math.log(q) for q in p.values()), sum(q * len(path) for path, q in p.items()))
    drawn = [path for path, q in p.items() for _ in range(round(10 * q))]  # each as often as its probability says
    found = diagnostics.ratio("x", [-math.log(p[path]) for path in drawn], [len(path) for path in drawn])
    assert found["x"] == pytest.approx(entropy / length)


def divergences(p: np.ndarray, s: np.ndarray) -> float:
    """JS(p x s, s x p) from its definition."""
    first, second = np.outer(p, s), np.outer(s, p)
    middle = (first + second) / 2
    return float(np.sum(first * np.log(first / middle)) + np.sum(second * np.log(second / middle))) / 2


def test_the_gap_of_the_best_discriminator_is_a_jensen_shannon_divergence() -> None:
    p, s = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.2, 0.6])
    ratios = np.log(p / s)
    weights, z = np.outer(p, s), ratios[:, None] - ratios[None, :]  # real y ~ p in rows, generated y' ~ s in columns
    best = float(np.sum(weights * diagnostics.gaps(z)))
    assert best == pytest.approx(divergences(p, s), abs=1e-12)
    for other in (0.5 * z, 2 * z, -z, z + RNG.normal(size=z.shape)):
        assert float(np.sum(weights * diagnostics.gaps(other))) < best
    assert diagnostics.gaps([0.0, np.inf]).tolist() == pytest.approx([0.0, math.log(2)])


def test_misaligned_pairs_win_in_margin_and_lose_in_likelihood() -> None:
    delta, real, generated = [1.0, 1.0, -1.0, 0.0], [-2.0, -1.0, -2.0, -2.0], [-1.0, -2.0, -1.0, -1.0]
    assert diagnostics.misaligned(delta, real, generated).tolist() == [1, 0, 0, 0]


def test_k3_is_unbiased_and_never_negative() -> None:
    """Averaged over draws from p it gives KL(p || q) exactly: here by enumeration, not by sampling."""
    p, q = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.2, 0.6])
    kl = float(np.sum(p * np.log(p / q)))
    values = [diagnostics.k3([math.log(a)], [math.log(b)]) for a, b in zip(p, q, strict=True)]
    assert min(values) >= 0
    assert sum(a * v for a, v in zip(p, values, strict=True)) == pytest.approx(kl, abs=1e-12)


def test_k3_sums_over_tokens_and_is_zero_for_equals() -> None:
    a, b = [-1.0, -2.0], [-1.5, -0.5]
    assert diagnostics.k3(a, b) == pytest.approx(diagnostics.k3(a[:1], b[:1]) + diagnostics.k3(a[1:], b[1:]))
    assert diagnostics.k3(a, a) == 0.0


def test_auc_is_the_share_of_pairs_won() -> None:
    generated, real = RNG.integers(3, 12, size=150).astype(float), RNG.integers(1, 10, size=150).astype(float)
    found = diagnostics.auc("x", generated, real)
    won = [(a > b) + (a == b) / 2 for a in generated for b in real]
    assert found["x"] == pytest.approx(sum(won) / len(won))
    assert found["x_se"] == pytest.approx(jackknife(diagnostics.auc, generated, real), rel=0.03)
    assert diagnostics.auc("x", real, real) == pytest.approx({"x": 0.5, "x_se": 0.0})
    assert diagnostics.auc("x", real + 20, real)["x"] == 1.0


def test_distinct_counts_n_grams_within_answers() -> None:
    answers = [[1, 2, 1, 2], [2, 1], [3]]
    assert diagnostics.distinct(answers, 1) == 3 / 7
    assert diagnostics.distinct(answers, 2) == 2 / 4  # 12 21 12 | 21: none over a border
    assert diagnostics.distinct([[5]], 2) == 0.0


def test_preferred_counts_ties_half() -> None:
    found = diagnostics.preferred("x", [-1.0, -2.0, -3.0, -4.0], [-2.0, -1.0, -3.0, -5.0])
    assert found == pytest.approx(diagnostics.mean("x", [1.0, 0.0, 0.5, 1.0])) and found["x"] == 0.625
    u, v = RNG.normal(size=(2, 50))
    one, other = (diagnostics.preferred("x", *both) for both in ((u, v), (v, u)))
    assert one["x"] + other["x"] == pytest.approx(1.0) and one["x_se"] == pytest.approx(other["x_se"])
    assert diagnostics.preferred("x", u, u) == {"x": 0.5, "x_se": 0.0}


def bleu(answer: list[int], others: list[list[int]]) -> float:
    """From the definition, every reference looked at."""

    def grams(ids: list[int], n: int) -> list[tuple[int, ...]]:
        return [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]

    precisions = []
    for n in range(1, min(4, len(answer)) + 1):
        mine = grams(answer, n)
        kept = sum(min(mine.count(g), max(grams(other, n).count(g) for other in others)) for g in set(mine))
        precisions.append(max(kept, 0.1) / len(mine))
    nearest = min((len(other) for other in others), key=lambda r: (abs(r - len(answer)), r))
    return float(min(1.0, math.exp(1 - nearest / len(answer))) * np.prod(precisions) ** (1 / len(precisions)))


def test_self_bleu_is_the_mean_bleu_against_the_others() -> None:
    answers = [RNG.integers(0, 4, size=n).tolist() for n in (1, 2, 3, 5, 8, 8, 13, 21, 3, 30)]
    wanted = [bleu(answer, answers[:i] + answers[i + 1 :]) for i, answer in enumerate(answers)]
    assert diagnostics.self_bleu(answers)["eval/self_bleu"] == pytest.approx(np.mean(wanted), rel=1e-12)
    assert diagnostics.self_bleu([[1, 2, 3, 4, 5]] * 3)["eval/self_bleu"] == pytest.approx(1.0)
    apart = diagnostics.self_bleu([[10 * i + j for j in range(9)] for i in range(5)])["eval/self_bleu"]
    assert apart < 0.02 < diagnostics.self_bleu(answers)["eval/self_bleu"]
    assert diagnostics.self_bleu([[1, 2]]) == {} == diagnostics.self_bleu([])


def test_correlation() -> None:
    a, noise = RNG.normal(size=(2, 300))
    b = 0.6 * a + 0.8 * noise
    found = diagnostics.correlation("x", a, b)
    assert found["x"] == pytest.approx(np.corrcoef(a, b)[0, 1])
    assert found["x_se"] == pytest.approx(jackknife(diagnostics.correlation, a, b), rel=0.03)
    assert diagnostics.correlation("x", a, 3 - 2 * a) == pytest.approx({"x": -1.0, "x_se": 0.0})
    assert diagnostics.correlation("x", a, np.ones(300)) == {} == diagnostics.correlation("x", [1.0], [2.0])


@pytest.mark.parametrize("m", [[1.0, 3.0, 2.0, 2.5, 0.5], [1.0, 2.0, 3.0], [3.0, 2.0, 1.0], [1.0], []])
def test_instability_and_drawdown(m: list[float]) -> None:
    """Of a higher-is-better metric m, by the formulas; `metrics` takes its negative."""
    bad = [-value for value in m]
    assert metrics.instability(bad) == sum(max(0.0, a - b) for a, b in zip(m, m[1:], strict=False))
    assert metrics.drawdown(bad) == max([0.0, *(a - b for a, b in combinations(m, 2))])


def test_worsenings_at_the_end_of_a_curve() -> None:
    curves = {(): 0, (1,): 0, (1, 2): 1, (1, 2, 3): 2, (3, 2, 3): 1, (1, 2, 2): 0, (1, 2, 3, 0): 0}
    assert {curve: metrics.worsenings(curve) for curve in curves} == curves


def test_the_best_iterate_is_on_the_healthy_side() -> None:
    values = {0: 0.9, 1: 0.4, 2: 0.2}
    names = ("eval/heldout_nll", "eval/heldout_real_logprob", "eval/length_auc", "eval/margin")
    assert [metrics.best(name, values) for name in names] == [2, 0, 1, None]
    assert metrics.best("eval/heldout_nll", {0: 1.0}) is None and metrics.best("eval/heldout_nll", {}) is None
    assert metrics.best("eval/stop_rate", {0: 1.0, 1: 1.0}) is None
