"""What an iteration plays against: who answers the prompts, and what the loss compares the policy with.

A reference is a small frozen tree over iterates, built bottom-up in a canonical form: zero weights are dropped, equal
parts merged, a single part replaced by itself, the rest sorted (trees within trees stay as they are). Hence at
iteration 0, where the history holds one policy, every regularizer *is* `Iterate(0)`, and `alpha = 0` is SPIN, bit for
bit.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Any

from spin_reg.fingerprint import uniform


class ReferenceKind(StrEnum):
    """How several iterates become one reference."""

    arithmetic = "arithmetic"
    geometric = "geometric"
    generator = "generator"
    last = "last"


class Pairs(StrEnum):
    """Which answers an iteration trains on when its window holds several iterates."""

    fresh = "fresh"
    reuse = "reuse"
    union = "union"


@dataclass(frozen=True)
class Iterate:
    """log r = log pi_k."""

    k: int


@dataclass(frozen=True)
class Geometric:
    """log r = sum_j w_j log r_j: unnormalised; the missing log Z(x) cancels between two answers to one prompt."""

    parts: tuple[tuple[float, "Reference"], ...]


@dataclass(frozen=True)
class Arithmetic:
    """log r = logsumexp_j(log w_j + log r_j) of *sequence* log-probs: the log-density of a mixture of policies."""

    parts: tuple[tuple[float, "Reference"], ...]


@dataclass(frozen=True)
class Generator:
    """log r = log pi_k of the iterate k that gave this pair's generated answer (the same k for the real one)."""

    members: tuple[int, ...]


Reference = Iterate | Geometric | Arithmetic | Generator


def _merge(parts: Iterable[tuple[float, Reference]]) -> tuple[tuple[float, Reference], ...]:
    weights: dict[Reference, float] = {}
    for weight, node in parts:
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"a reference weight must be finite and not negative, not {weight}")
        if weight > 0:
            weights[node] = weights.get(node, 0.0) + weight
    if not math.isclose(sum(weights.values()), 1.0, abs_tol=1e-9):
        raise ValueError(f"reference weights must sum to 1, not {sum(weights.values())}")
    return tuple(sorted(((w, n) for n, w in weights.items()), key=lambda part: repr(part[1])))


def geometric(parts: Iterable[tuple[float, Reference]]) -> Reference:
    """The weighted geometric mean of references (weights sum to 1), in canonical form."""
    merged = _merge(parts)
    return merged[0][1] if len(merged) == 1 else Geometric(merged)


def arithmetic(parts: Iterable[tuple[float, Reference]]) -> Reference:
    """The mixture of references (weights sum to 1), in canonical form."""
    merged = _merge(parts)
    return merged[0][1] if len(merged) == 1 else Arithmetic(merged)


def support(node: Reference) -> frozenset[int]:
    """The iterates whose log-probs of *real* answers the reference reads."""
    if isinstance(node, Iterate):
        return frozenset({node.k})
    if isinstance(node, Generator):
        return frozenset(node.members)
    return frozenset().union(*(support(part) for _, part in node.parts))


def scorers(node: Reference, sampled_from: int) -> frozenset[int]:
    """The iterates whose log-probs of an answer given by `sampled_from` the reference reads."""
    if isinstance(node, Iterate):
        return frozenset({node.k})
    if isinstance(node, Generator):
        return frozenset({sampled_from})
    return frozenset().union(*(scorers(part, sampled_from) for _, part in node.parts))


def normalised(node: Reference) -> bool:
    """Whether exp(log r) sums to 1 over answers; a geometric mixture does not (it misses log Z(x))."""
    if isinstance(node, Geometric):
        return False
    return not isinstance(node, Arithmetic) or all(normalised(part) for _, part in node.parts)


def evaluate(node: Reference, logprobs: Mapping[int, float], sampled_from: int) -> float:
    """log r of one answer.

    Args:
        logprobs: {k: log pi_k(y|x)}, sums over the answer's tokens in nats (float64). A missing k raises KeyError.
        sampled_from: the iterate that gave the pair's generated answer.
    """
    if isinstance(node, Iterate):
        return logprobs[node.k]
    if isinstance(node, Generator):
        return logprobs[sampled_from]
    values = [(w, evaluate(part, logprobs, sampled_from)) for w, part in node.parts]
    if isinstance(node, Geometric):
        return math.fsum(w * v for w, v in values)
    terms = [math.log(w) + v for w, v in values]
    top = max(terms)
    return top if math.isinf(top) else top + math.log(math.fsum(math.exp(term - top) for term in terms))


def to_json(node: Reference) -> Any:
    """The tree as JSON values; `from_json` reads it back."""
    if isinstance(node, Iterate):
        return {"iterate": node.k}
    if isinstance(node, Generator):
        return {"generator": list(node.members)}
    return {type(node).__name__.lower(): [[w, to_json(part)] for w, part in node.parts]}


def from_json(tree: Any) -> Reference:
    """The reference that `to_json` wrote."""
    ((kind, value),) = tree.items()
    if kind == "iterate":
        return Iterate(value)
    if kind == "generator":
        return Generator(tuple(value))
    build = {"geometric": geometric, "arithmetic": arithmetic}[kind]
    return build((w, from_json(part)) for w, part in value)


def formula(node: Reference) -> str:
    """log r as one would write it, the newest iterate first, for instance `0.5 log pi_1 + 0.5 log pi_0`."""
    if isinstance(node, Generator):
        return "log pi_k, k the one that answered"
    if isinstance(node, Geometric):
        return " + ".join(f"{w:.3g} {formula(part)}" for w, part in reversed(node.parts))
    return f"log {_density(node)}" if isinstance(node, Iterate) else f"log({_density(node)})"


def _density(node: Reference) -> str:
    """r, where its logarithm is no sum."""
    if isinstance(node, Iterate):
        return f"pi_{node.k}"
    if isinstance(node, Arithmetic):
        return " + ".join(f"{w:.3g} {_density(part)}" for w, part in reversed(node.parts))
    return f"exp({formula(node)})"


@dataclass(frozen=True)
class Opponent:
    """What one iteration plays against.

    Attributes:
        sampler: ((k, weight), ...), weights positive and summing to 1: who answers.
        reference: what the loss compares with.
        pairs: which answers are trained on when several iterates answer.
    """

    sampler: tuple[tuple[int, float], ...]
    reference: Reference
    pairs: Pairs = Pairs.fresh

    def __post_init__(self) -> None:
        weights = [w for _, w in self.sampler]
        if min(weights) <= 0 or not math.isclose(sum(weights), 1.0, abs_tol=1e-9):
            raise ValueError("sampler weights must be positive and sum to 1")
        if self.pairs is Pairs.reuse and max(weights) - min(weights) > 1e-9:
            raise ValueError("regularizer.pairs=reuse: it deals evenly, so the sampler's weights must be equal")

    @cached_property
    def window(self) -> tuple[int, ...]:
        """The iterates that answer, oldest first."""
        return tuple(sorted(k for k, _ in self.sampler))


@dataclass
class Regularizer:
    """What a regularizer is: one method. Its fields are the settings of the config group `regularizer`."""

    def opponent(self, t: int) -> Opponent:
        """What iteration t (from 0) plays against; a pure function of the settings and t."""
        raise TypeError(f"{type(self).__name__} does not say what it plays against: define opponent(t)")

    def words(self) -> str:
        """The parameters as words of the run's folder name; empty where the regularizer has none to tell."""
        return ""


def window(t: int, history: int | None) -> tuple[int, ...]:
    """The last `history` iterates up to t (None: all of them); shorter while the history is."""
    return tuple(range(0 if history is None else max(0, t + 1 - history), t + 1))


def uniform_sampler(members: Sequence[int]) -> tuple[tuple[int, float], ...]:
    """Equal weights over the members."""
    return tuple((k, 1.0 / len(members)) for k in members)


def combine(kind: ReferenceKind, members: Sequence[int]) -> Reference:
    """The reference over a window of iterates with equal weights (for `last`, its newest)."""
    parts = [(1.0 / len(members), Iterate(k)) for k in members]
    if kind is ReferenceKind.last or len(members) == 1:
        return Iterate(members[-1])
    if kind is ReferenceKind.generator:
        return Generator(tuple(members))
    return arithmetic(parts) if kind is ReferenceKind.arithmetic else geometric(parts)


@dataclass(frozen=True)
class Draw:
    """How an iteration's prompts are dealt to the iterates of its window: the values that the dealing depends on.

    Attributes:
        seed, t: part of the key of every draw.
        samplers: for `fresh`, this iteration's sampler; for `reuse`, those of iterations 0..t.
        reuse: keep the dealing of the iteration before and move only what must move.
    """

    seed: int
    t: int
    samplers: tuple[tuple[tuple[int, float], ...], ...]
    reuse: bool

    def deal(self, example_id: str) -> int:
        """The iterate that answers this prompt.

        `fresh`: k ~ sampler. `reuse`: when the window grows to n iterates each prompt moves to the newest with
        probability 1/n; when it slides, the prompts of the iterate that left move to the newest. Either way the index
        is uniform over the window, and depends on nothing but (seed, example_id, t).
        """
        if not self.reuse:
            point = uniform(self.seed, example_id, self.t, "opponent")
            return _inverse_cdf(self.samplers[-1], point)
        owner = self.samplers[0][0][0]
        for t, sampler in enumerate(self.samplers):
            members = [k for k, _ in sampler]
            grew = t > 0 and len(members) > len(self.samplers[t - 1])
            moves = grew and uniform(self.seed, example_id, t, "mover") < 1.0 / len(members)
            if moves or owner not in members:
                owner = members[-1]
        return owner


def _inverse_cdf(sampler: tuple[tuple[int, float], ...], point: float) -> int:
    total = 0.0
    for k, weight in sampler:
        total += weight
        if point < total:
            return k
    return sampler[-1][0]
