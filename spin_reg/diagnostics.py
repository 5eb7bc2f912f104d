"""The arithmetic behind what is reported of an iterate: numbers over held-out answers in, named values out.

Every held-out prompt counts once, as an independent draw: a standard error (`NAME_se`) is that of a mean over prompts,
of the linear part where a value is no mean (the delta method). One prompt alone has none.
"""

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Values = dict[str, float]
Array = NDArray[np.float64]
BLEU_ORDER, BLEU_ANSWERS = 4, 512


def mean(name: str, values: ArrayLike) -> Values:
    """The mean and its standard error: sd / sqrt(n)."""
    array = np.asarray(values, dtype=np.float64)
    return _with_se(name, math.fsum(array.tolist()) / len(array), array)


def ratio(name: str, totals: ArrayLike, counts: ArrayLike) -> Values:
    """sum(totals) / sum(counts), for instance nats a token; its standard error counts answers, not tokens.

    Source: the delta method for a ratio of means; the linear part is (total - ratio * count) / mean(count).
    """
    x, n = np.asarray(totals, dtype=np.float64), np.asarray(counts, dtype=np.float64)
    value = math.fsum(x.tolist()) / float(n.sum())
    return _with_se(name, value, (x - value * n) / n.mean())


def _with_se(name: str, value: float, linear: Array) -> Values:
    n = len(linear)
    return {name: value} | ({f"{name}_se": float(linear.std(ddof=1) / math.sqrt(n))} if n > 1 else {})


def gaps(z: ArrayLike) -> Array:
    """log 2 - log(1 + exp(-z)) of each pair, z = beta * Delta the discriminator's score of real against generated.

    Their mean is the distinguishability gap, in nats. Of the best discriminator it is the Jensen-Shannon divergence of
    (real, generated) and (generated, real), from 0 to log 2; of ours no more than that in expectation. Over iterations
    it should fall to 0: what training can still find. Below 0 the policy is over-fitted.
    Source: the logistic loss of SPIN (arXiv 2401.01335) against that of a coin; Goodfellow et al. (arXiv 1406.2661).
    """
    return np.asarray(math.log(2) - np.logaddexp(0.0, -np.asarray(z, dtype=np.float64)))


def misaligned(delta: ArrayLike, real: ArrayLike, generated: ArrayLike) -> Array:
    """1 for each pair that the margin orders rightly (Delta > 0) and the likelihood wrongly (log pi(real) < log
    pi(generated)), else 0. Log-probs in nats a sequence. The share should not rise.
    Source: T-SPIN (arXiv 2601.08198), where it is nearly half.
    """
    won = np.asarray(delta) > 0
    return (won & (np.asarray(real) < np.asarray(generated))).astype(np.float64)


def preferred(name: str, ours: ArrayLike, theirs: ArrayLike) -> Values:
    """The share of answers that our policy gives a higher log-prob than theirs (ties half), 0 to 1: a win rate without
    a judge. 0.5 is no preference; of real answers, above it is progress, whatever the size of the steps.

    Args:
        ours, theirs: log-probs of the same answers in one order, nats a sequence.
    """
    x, y = np.asarray(ours, dtype=np.float64), np.asarray(theirs, dtype=np.float64)
    return mean(name, (x > y) + (x == y) / 2)


def k3(policy: Sequence[float], other: Sequence[float]) -> float:
    """The k3 estimate of KL(policy || other) along one answer that the policy sampled: token log-probs in, nats out.

    The sum over tokens of exp(l) - 1 - l, l = log other - log policy: never negative, unbiased for the token's KL.
    Source: Schulman, Approximating KL divergence (2020), token by token.
    """
    gap = np.asarray(other, dtype=np.float64) - np.asarray(policy, dtype=np.float64)
    return float(np.sum(np.expm1(gap) - gap))


def auc(name: str, generated: ArrayLike, real: ArrayLike) -> Values:
    """P(a generated answer is longer than a real one) + P(as long) / 2: what length alone tells. 0.5 is healthy; above
    it answers are too long.

    Args:
        generated, real: lengths by prompt, in one order.

    Source: Mann and Whitney; the standard error by the U statistic's projections (DeLong), both of a prompt together.
    """
    x, y = np.asarray(generated, dtype=np.float64), np.asarray(real, dtype=np.float64)
    wins = _above(x, y)
    return _with_se(name, float(wins.mean()), wins - _above(y, x))


def _above(some: Array, others: Array) -> Array:
    """For each of some the share of the others that it is above, ties half."""
    ranked = np.sort(others)
    both = np.searchsorted(ranked, some, side="left") + np.searchsorted(ranked, some, side="right")
    return np.asarray(both / (2 * len(others)))


def distinct(answers: Iterable[Sequence[Hashable]], n: int) -> float:
    """Different n-grams of token ids over all n-grams, within answers: 0 to 1, and no collapse is healthy.

    It falls with the number of answers, so compare it over the same prompts alone. 0 where no answer has n tokens.
    Source: Li et al., A diversity-promoting objective function (arXiv 1510.03055).
    """
    grams = [tuple(ids[i : i + n]) for ids in answers for i in range(len(ids) - n + 1)]
    return len(set(grams)) / max(len(grams), 1)


def self_bleu(answers: Sequence[Sequence[Hashable]]) -> Values:
    """eval/self_bleu: the mean BLEU of each answer against all others as references, 0 to 1, over the first 512. It
    rises as answers come to be alike: no collapse is healthy. No value of one answer alone.

    With c_n(g) the count of the n-gram g in an answer of length l, m_n(g) its largest count in another one, and r the
    other length that is nearest (the shorter of two), BLEU = min(1, exp(1 - r / l)) times the geometric mean of
    p_n = sum_g min(c_n, m_n) / sum_g c_n over n = 1 to 4, as far as the answer has n tokens; 0.1 stands for a sum of 0.

    It compares answers to different prompts, so only over the same prompts is it the same measure.
    Source: Texygen (arXiv 1802.01886); BLEU of Papineni et al. (2002), smoothed by Chen and Cherry's first method.
    """
    some = answers[:BLEU_ANSWERS]
    if len(some) < 2:
        return {}
    logs: list[list[float]] = [[] for _ in some]
    for n in range(1, BLEU_ORDER + 1):
        counts = [Counter(tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)) for ids in some]
        best: dict[Hashable, tuple[int, int]] = {}  # the two largest counts, so that an answer can be left out
        for count in counts:
            for gram, c in count.items():
                first, second = best.get(gram, (0, 0))
                best[gram] = (c, first) if c >= first else (first, max(c, second))
        for log, count in zip(logs, counts, strict=True):
            others = ((c, best[gram][c == best[gram][0]]) for gram, c in count.items())
            if count:
                log.append(math.log(max(sum(min(both) for both in others), 0.1) / count.total()))
    lengths = sorted(len(ids) for ids in some)
    brevity = [min(0.0, 1 - _nearest(lengths, len(ids)) / len(ids)) for ids in some]
    values = [math.exp(b + math.fsum(log) / len(log)) for b, log in zip(brevity, logs, strict=True)]
    return {"eval/self_bleu": math.fsum(values) / len(values)}


def _nearest(lengths: Sequence[int], length: int) -> int:
    """Of sorted lengths, one of which is ours, the nearest other one; the shorter of two."""
    i = bisect_left(lengths, length)
    return min((*lengths[max(i - 1, 0) : i], *lengths[i + 1 : i + 2]), key=lambda other: (abs(other - length), other))


def correlation(name: str, a: ArrayLike, b: ArrayLike) -> Values:
    """Pearson's r and its standard error (the linear part of r is a b - r (a^2 + b^2) / 2, standardised); nothing
    where one side does not vary, which leaves r without a value.
    """
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if min(len(x), len(y)) < 2 or x.std() == 0 or y.std() == 0:
        return {}
    x, y = (x - x.mean()) / x.std(), (y - y.mean()) / y.std()
    r = float(np.mean(x * y))
    return _with_se(name, r, x * y - r * (x * x + y * y) / 2)
