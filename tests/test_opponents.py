"""Who an iteration plays against: references against brute force, identities of regularizers, dealing of prompts."""

import copy
import functools
import itertools
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from random import Random

import pytest

from spin_reg.opponents import (
    Arithmetic,
    Draw,
    Geometric,
    Iterate,
    Opponent,
    Pairs,
    Reference,
    ReferenceKind,
    Regularizer,
    arithmetic,
    combine,
    evaluate,
    from_json,
    geometric,
    normalised,
    scorers,
    support,
    to_json,
    uniform_sampler,
    window,
)
from spin_reg.regularizers import REGULARIZERS, name_of
from spin_reg.regularizers.fictitious_play import FictitiousPlay
from spin_reg.regularizers.kl import KL
from spin_reg.regularizers.mixture_of_two import MixtureOfTwo
from spin_reg.regularizers.none import Plain

CONF = Path(__file__).parents[1] / "conf" / "regularizer"
ITERATIONS = range(7)
BUILDERS = {"arithmetic": arithmetic, "geometric": geometric}

VARIANTS: dict[str, Callable[[], Regularizer]] = dict(REGULARIZERS) | {
    "kl alpha 0": lambda: KL(alpha=0),
    "kl alpha 1": lambda: KL(alpha=1),
    "kl alpha list": lambda: KL(alpha=[0.1, 0.7, 0.3]),
    "kl history 2": lambda: KL(alpha=0.3, history=2),
    "kl history all, geometric": lambda: KL(alpha=0.3, history=None, reference=ReferenceKind.geometric),
    "kl history 3, generator": lambda: KL(alpha=0.3, history=3, reference=ReferenceKind.generator),
    "fictitious_play history 3": lambda: FictitiousPlay(history=3),
    "fictitious_play geometric": lambda: FictitiousPlay(reference=ReferenceKind.geometric),
    "fictitious_play generator": lambda: FictitiousPlay(reference=ReferenceKind.generator, pairs=Pairs.reuse),
    "fictitious_play last": lambda: FictitiousPlay(reference=ReferenceKind.last),
    "mixture_of_two as released": lambda: MixtureOfTwo(reference=ReferenceKind.last, pairs=Pairs.union),
    "mixture_of_two generator": lambda: MixtureOfTwo(reference=ReferenceKind.generator),
}
every_variant = pytest.mark.parametrize("make", VARIANTS.values(), ids=VARIANTS.keys())


def random_logprobs(rng: Random, members: Iterable[int]) -> dict[int, float]:
    return {k: rng.uniform(-60.0, -0.1) for k in members}


def random_weights(rng: Random, n: int) -> list[float]:
    raw = [rng.uniform(0.05, 1.0) for _ in range(n)]
    return [w / sum(raw) for w in raw]


def random_policies(rng: Random, n: int, outcomes: int) -> list[list[float]]:
    return [[math.log(w) for w in random_weights(rng, outcomes)] for _ in range(n)]


def total_mass(node: Reference, policies: list[list[float]], sampled_from: int) -> float:
    """sum_y r(y) over all answers."""
    answers = range(len(policies[0]))
    return math.fsum(
        math.exp(evaluate(node, {k: logp[y] for k, logp in enumerate(policies)}, sampled_from)) for y in answers
    )


# ---------------------------------------------------------------------------------------------------------------------
# References
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_references_match_brute_force(seed: int) -> None:
    """Arithmetic: log sum_k w_k pi_k. Geometric: log prod_k pi_k^w_k. Both written here with probabilities."""
    rng = Random(seed)
    n = rng.randint(2, 5)
    weights, logp = random_weights(rng, n), random_logprobs(rng, range(n))
    parts = [(w, Iterate(k)) for k, w in enumerate(weights)]
    mixture = math.log(sum(w * math.exp(logp[k]) for k, w in enumerate(weights)))
    product = math.log(math.prod(math.exp(logp[k]) ** w for k, w in enumerate(weights)))
    assert evaluate(arithmetic(parts), logp, 0) == pytest.approx(mixture, rel=1e-12)
    assert evaluate(geometric(parts), logp, 0) == pytest.approx(product, rel=1e-12)
    nested = geometric([(0.25, Iterate(0)), (0.75, arithmetic(parts))])
    assert evaluate(nested, logp, 0) == pytest.approx(0.25 * logp[0] + 0.75 * mixture, rel=1e-12)


def test_references_by_hand() -> None:
    """0.5 * 0.5 + 0.5 * 0.125 = 0.3125; sqrt(0.5 * 0.125) = 0.25."""
    logp = {0: math.log(0.5), 3: math.log(0.125)}
    parts = [(0.5, Iterate(0)), (0.5, Iterate(3))]
    assert evaluate(arithmetic(parts), logp, 3) == pytest.approx(math.log(0.3125), abs=1e-15)
    assert evaluate(geometric(parts), logp, 3) == pytest.approx(math.log(0.25), abs=1e-15)
    assert evaluate(Iterate(3), logp, 0) == math.log(0.125)


@pytest.mark.parametrize("seed", range(20))
def test_arithmetic_lies_between_geometric_and_the_largest(seed: int) -> None:
    """max_k(log w_k + log pi_k) <= arithmetic <= max_k log pi_k, and arithmetic > geometric where iterates differ."""
    rng = Random(100 + seed)
    n = rng.randint(2, 5)
    weights, logp = random_weights(rng, n), random_logprobs(rng, range(n))
    parts = [(w, Iterate(k)) for k, w in enumerate(weights)]
    value = evaluate(arithmetic(parts), logp, 0)
    assert max(math.log(w) + logp[k] for k, w in enumerate(weights)) <= value <= max(logp.values())
    assert value > evaluate(geometric(parts), logp, 0)


@pytest.mark.parametrize("kind", list(ReferenceKind))
def test_identical_iterates_make_all_references_equal(kind: ReferenceKind) -> None:
    logp = dict.fromkeys(range(5), -37.25)
    for members in [(0,), (3, 4), (0, 1, 2), (0, 1, 2, 3, 4)]:
        assert evaluate(combine(kind, members), logp, members[0]) == pytest.approx(-37.25, abs=1e-12)


@pytest.mark.parametrize("kind", BUILDERS)
def test_the_order_of_parts_does_not_matter(kind: str) -> None:
    """Neither for the tree (equal values) nor for its value (parts in any order)."""
    rng = Random(7)
    parts = [(w, Iterate(k)) for k, w in enumerate(random_weights(rng, 4))]
    shuffled = [parts[i] for i in (2, 0, 3, 1)]
    assert BUILDERS[kind](parts) == BUILDERS[kind](shuffled)
    node = {"arithmetic": Arithmetic, "geometric": Geometric}[kind]
    logp = random_logprobs(rng, range(4))
    assert evaluate(node(tuple(parts)), logp, 0) == pytest.approx(evaluate(node(tuple(shuffled)), logp, 0), abs=1e-12)


def test_long_answers_do_not_overflow() -> None:
    """exp(-2000) is 0 in float64; the mixture is then the larger part and its weight."""
    parts = [(0.25, Iterate(0)), (0.75, Iterate(1))]
    assert evaluate(arithmetic(parts), {0: -2000.0, 1: -2000.0}, 0) == pytest.approx(-2000.0, abs=1e-12)
    assert evaluate(arithmetic(parts), {0: -2000.0, 1: -2500.0}, 0) == pytest.approx(-2000.0 + math.log(0.25))
    assert evaluate(geometric(parts), {0: -2000.0, 1: -2400.0}, 0) == pytest.approx(-2300.0)


@pytest.mark.parametrize("kind", BUILDERS)
def test_an_answer_that_an_iterate_cannot_give(kind: str) -> None:
    """pi_1(y) = 0: half of the mixture is left, and nothing of the product; no nan either way."""
    node = BUILDERS[kind]([(0.5, Iterate(0)), (0.5, Iterate(1))])
    expected = {"arithmetic": -3.0 + math.log(0.5), "geometric": -math.inf}[kind]
    assert evaluate(node, {0: -3.0, 1: -math.inf}, 0) == pytest.approx(expected)
    assert evaluate(node, {0: -math.inf, 1: -math.inf}, 0) == -math.inf


@pytest.mark.parametrize("kind", BUILDERS)
def test_parts_are_canonical(kind: str) -> None:
    """Zero weights vanish, equal parts merge, a part alone is itself."""
    build = BUILDERS[kind]
    assert build([(0.0, Iterate(0)), (1.0, Iterate(2))]) == Iterate(2)
    assert build([(0.3, Iterate(2)), (0.7, Iterate(2))]) == Iterate(2)
    merged = build([(0.25, Iterate(0)), (0.5, Iterate(1)), (0.25, Iterate(0))])
    assert merged == build([(0.5, Iterate(1)), (0.5, Iterate(0))])
    assert hash(merged) == hash(build([(0.5, Iterate(0)), (0.5, Iterate(1))]))


@pytest.mark.parametrize("kind", BUILDERS)
@pytest.mark.parametrize("weights", [(0.5, 0.4), (0.6, 0.5), (-0.5, 1.5), (math.nan, 1.0), (math.inf, 0.0), ()])
def test_weights_that_do_not_make_a_mixture_are_refused(kind: str, weights: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="weight"):
        BUILDERS[kind]([(w, Iterate(k)) for k, w in enumerate(weights)])


def test_sampler_weights_must_sum_to_one() -> None:
    with pytest.raises(ValueError, match="sum to 1"):
        Opponent(sampler=((0, 0.5), (1, 0.4)), reference=Iterate(0))


def test_generator_reads_the_pairs_own_iterate_and_last_the_newest() -> None:
    """A pair kept from iteration 1 is compared with pi_1 under `generator`, and with pi_4 under `last`."""
    logp = {k: -10.0 - k for k in range(5)}
    generator = FictitiousPlay(reference=ReferenceKind.generator).opponent(4).reference
    last = FictitiousPlay(reference=ReferenceKind.last).opponent(4).reference
    assert [evaluate(generator, logp, k) for k in range(5)] == [-10.0, -11.0, -12.0, -13.0, -14.0]
    assert [evaluate(last, logp, k) for k in range(5)] == [-14.0] * 5
    mixed = KL(alpha=0.25, history=None, reference=ReferenceKind.generator).opponent(4).reference
    assert evaluate(mixed, logp, 2) == pytest.approx(0.25 * -10.0 + 0.75 * -12.0)


@every_variant
def test_scorers_are_just_what_evaluation_reads(make: Callable[[], Regularizer]) -> None:
    """The iterates named suffice, none can be left out, and together they are the support."""
    rng = Random(3)
    for t in ITERATIONS:
        opponent = make().opponent(t)
        everything = random_logprobs(rng, range(t + 1))
        for k in opponent.window:
            read = scorers(opponent.reference, k)
            known = {j: everything[j] for j in read}
            assert evaluate(opponent.reference, known, k) == evaluate(opponent.reference, everything, k)
            for missing in read:
                with pytest.raises(KeyError):
                    evaluate(opponent.reference, {j: v for j, v in known.items() if j != missing}, k)
        union = frozenset().union(*(scorers(opponent.reference, k) for k in opponent.window))
        assert union == support(opponent.reference)


@every_variant
def test_normalised_tells_whether_the_reference_sums_to_one(make: Callable[[], Regularizer]) -> None:
    """A geometric mixture of different policies has less mass than 1 (for some pair); all else is a density."""
    policies = random_policies(Random(5), n=len(ITERATIONS), outcomes=6)
    for t in ITERATIONS:
        opponent = make().opponent(t)
        masses = [total_mass(opponent.reference, policies, k) for k in opponent.window]
        if normalised(opponent.reference):
            assert masses == pytest.approx([1.0] * len(masses), abs=1e-12)
        else:
            assert max(masses) < 1 + 1e-12 and min(masses) < 1 - 1e-4


def test_a_mixture_with_an_unnormalised_part_is_unnormalised() -> None:
    part = geometric([(0.5, Iterate(0)), (0.5, Iterate(1))])
    node = arithmetic([(0.5, Iterate(0)), (0.5, part)])
    assert total_mass(node, random_policies(Random(6), n=2, outcomes=4), 0) < 1 - 1e-4
    assert not normalised(node)


# ---------------------------------------------------------------------------------------------------------------------
# Contract of every regularizer
# ---------------------------------------------------------------------------------------------------------------------


def test_regularizers_and_yaml_files_have_the_same_names() -> None:
    assert {path.stem for path in CONF.glob("*.yaml")} == set(REGULARIZERS)
    assert {"none", "kl", "mixture_of_two", "fictitious_play", "base"} <= set(REGULARIZERS)


@pytest.mark.parametrize("name", REGULARIZERS)
def test_a_regularizer_knows_its_name_and_explains_itself(name: str) -> None:
    kind = REGULARIZERS[name]
    assert name_of(kind()) == name
    docstring = kind.__dict__.get("__doc__") or ""
    assert len(docstring) > 20 and not docstring.startswith(f"{kind.__name__}(")  # a dataclass writes that one itself


@every_variant
def test_opponents_are_a_pure_function_of_t(make: Callable[[], Regularizer]) -> None:
    """Asked in another order, twice, or of another object with the same settings: the same answer."""
    once = make()
    before = copy.deepcopy(once)
    forward = [once.opponent(t) for t in ITERATIONS]
    backward = [once.opponent(t) for t in reversed(ITERATIONS)][::-1]
    assert forward == backward == [make().opponent(t) for t in ITERATIONS]
    assert once == before


@every_variant
def test_nothing_newer_than_t_is_played_against(make: Callable[[], Regularizer]) -> None:
    for t in ITERATIONS:
        opponent = make().opponent(t)
        assert set(opponent.window) <= set(range(t + 1)) and opponent.window == tuple(sorted(opponent.window))
        assert support(opponent.reference) <= set(range(t + 1))
        for k in opponent.window:
            assert scorers(opponent.reference, k) <= set(range(t + 1))


@every_variant
def test_weights_sum_to_one(make: Callable[[], Regularizer]) -> None:
    """Of the sampler; and of the reference, which at log pi_k = c for all k is c whatever c."""
    for t in ITERATIONS:
        opponent = make().opponent(t)
        assert all(weight > 0 for _, weight in opponent.sampler)
        assert math.fsum(weight for _, weight in opponent.sampler) == pytest.approx(1.0, abs=1e-12)
        for k in opponent.window:
            value = evaluate(opponent.reference, dict.fromkeys(range(t + 1), -1000.0), k)
            assert value == pytest.approx(-1000.0, abs=1e-9)


@every_variant
def test_references_survive_json(make: Callable[[], Regularizer]) -> None:
    for t in ITERATIONS:
        reference = make().opponent(t).reference
        assert from_json(json.loads(json.dumps(to_json(reference)))) == reference


# ---------------------------------------------------------------------------------------------------------------------
# Identities
# ---------------------------------------------------------------------------------------------------------------------


@every_variant
def test_iteration_0_is_spins_for_every_regularizer(make: Callable[[], Regularizer]) -> None:
    """Exactly, so that iteration 0 can be trained once and shared."""
    opponent = make().opponent(0)
    assert opponent.reference == Iterate(0)
    assert opponent.sampler == ((0, 1.0),)


@pytest.mark.parametrize("t", ITERATIONS)
def test_none_plays_the_newest_iterate(t: int) -> None:
    assert Plain().opponent(t) == Opponent(sampler=((t, 1.0),), reference=Iterate(t))


@pytest.mark.parametrize("t", ITERATIONS)
def test_alpha_0_is_none(t: int) -> None:
    assert KL(alpha=0).opponent(t) == Plain().opponent(t)


@pytest.mark.parametrize("t", ITERATIONS)
def test_alpha_1_keeps_the_base_as_reference_and_samples_the_newest(t: int) -> None:
    opponent = KL(alpha=1).opponent(t)
    assert opponent.reference == Iterate(0)
    assert opponent.sampler == ((t, 1.0),)
    assert KL(alpha=1, history=2).opponent(t).reference == Iterate(0)


@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.75])
def test_kl_reference_mixes_newest_and_base(alpha: float) -> None:
    """log r = (1 - alpha) log pi_t + alpha log pi_0, answers from pi_t."""
    opponent = KL(alpha=alpha).opponent(3)
    assert opponent.sampler == ((3, 1.0),)
    logp = {0: -11.0, 3: -7.0}
    assert evaluate(opponent.reference, logp, 3) == pytest.approx((1 - alpha) * -7.0 + alpha * -11.0, abs=1e-12)


def test_kl_with_history_mixes_the_windows_mixture_and_the_base() -> None:
    """log r = (1 - alpha) log((pi_2 + pi_3) / 2) + alpha log pi_0."""
    opponent = KL(alpha=0.25, history=2).opponent(3)
    assert opponent.sampler == ((2, 0.5), (3, 0.5))
    logp = {0: math.log(0.1), 2: math.log(0.2), 3: math.log(0.6)}
    assert evaluate(opponent.reference, logp, 3) == pytest.approx(0.75 * math.log(0.4) + 0.25 * math.log(0.1))


def test_alpha_may_change_with_the_iteration() -> None:
    """The last value of a list repeats."""
    scheduled = KL(alpha=[0.2, 0.9, 0.6])
    assert [scheduled.opponent(t) for t in (1, 2, 5)] == [
        KL(alpha=0.9).opponent(1),
        KL(alpha=0.6).opponent(2),
        KL(alpha=0.6).opponent(5),
    ]


@pytest.mark.parametrize("alpha", [-0.1, 1.01, math.nan, math.inf, [], [0.5, 2.0], True])
def test_alpha_outside_zero_to_one_is_refused(alpha: object) -> None:
    with pytest.raises(ValueError, match="alpha"):
        KL(alpha=alpha)


@pytest.mark.parametrize("kind", [KL, FictitiousPlay])
@pytest.mark.parametrize("history", [0, -1])
def test_a_history_without_iterates_is_refused(kind: type[KL] | type[FictitiousPlay], history: int) -> None:
    with pytest.raises(ValueError, match="history"):
        kind(history=history)


@pytest.mark.parametrize("t", ITERATIONS)
def test_a_history_of_one_is_none(t: int) -> None:
    for kind in ReferenceKind:
        assert FictitiousPlay(history=1, reference=kind).opponent(t) == Plain().opponent(t)


@pytest.mark.parametrize("t", ITERATIONS)
def test_a_history_longer_than_there_are_iterates_is_all_of_them(t: int) -> None:
    full = FictitiousPlay(history=t + 1).opponent(t)
    assert full.window == tuple(range(t + 1))
    assert FictitiousPlay(history=t + 2).opponent(t) == full
    assert FictitiousPlay(history=t + 50).opponent(t) == full
    assert FictitiousPlay().opponent(t) == full


@pytest.mark.parametrize("t", ITERATIONS)
def test_mixture_of_two_is_a_history_of_two(t: int) -> None:
    for kind in ReferenceKind:
        assert MixtureOfTwo(reference=kind).opponent(t) == FictitiousPlay(history=2, reference=kind).opponent(t)


def test_mixture_of_two_halves_the_two_newest() -> None:
    """log r = log((pi_3 + pi_4) / 2)."""
    opponent = MixtureOfTwo().opponent(4)
    assert opponent.sampler == ((3, 0.5), (4, 0.5))
    logp = {3: math.log(0.2), 4: math.log(0.6)}
    assert evaluate(opponent.reference, logp, 4) == pytest.approx(math.log(0.4))


def test_fictitious_play_weighs_all_iterates_alike() -> None:
    """log r = log((pi_0 + pi_1 + pi_2) / 3)."""
    opponent = FictitiousPlay().opponent(2)
    assert opponent.sampler == ((0, 1 / 3), (1, 1 / 3), (2, 1 / 3))
    logp = {0: math.log(0.1), 1: math.log(0.3), 2: math.log(0.5)}
    assert evaluate(opponent.reference, logp, 0) == pytest.approx(math.log(0.3))


@pytest.mark.parametrize("t", ITERATIONS)
def test_base_never_moves(t: int) -> None:
    assert REGULARIZERS["base"]().opponent(t) == Opponent(sampler=((0, 1.0),), reference=Iterate(0))


def test_windows_grow_then_slide() -> None:
    assert [window(t, 3) for t in range(5)] == [(0,), (0, 1), (0, 1, 2), (1, 2, 3), (2, 3, 4)]
    assert window(4, None) == (0, 1, 2, 3, 4)


# ---------------------------------------------------------------------------------------------------------------------
# Dealing prompts to iterates. Draws are keyed, so a count never changes; tolerances are 4 standard deviations.
# ---------------------------------------------------------------------------------------------------------------------

IDS = [f"prompt-{i}" for i in range(3000)]


def tolerance(share: float, n: int = len(IDS)) -> float:
    return 4 * math.sqrt(share * (1 - share) / n)


WINDOWS = {
    "growing": FictitiousPlay(),
    "sliding by 2": MixtureOfTwo(),
    "growing then sliding by 3": FictitiousPlay(history=3),
    "one iterate": Plain(),
}


@functools.cache
def deals(name: str, seed: int = 0) -> list[list[int]]:
    """The owner of every prompt at iterations 0..5 under `reuse`."""
    samplers = tuple(WINDOWS[name].opponent(t).sampler for t in range(6))
    return [[Draw(seed, t, samplers[: t + 1], True).deal(i) for i in IDS] for t in range(6)]


@pytest.mark.parametrize(
    "sampler",
    [((0, 0.2), (3, 0.8)), ((1, 0.5), (2, 0.5)), tuple(zip(range(4), (0.1, 0.2, 0.3, 0.4), strict=True)), ((5, 1.0),)],
)
def test_fresh_deals_by_the_samplers_weights(sampler: tuple[tuple[int, float], ...]) -> None:
    counts = Counter(Draw(0, 3, (sampler,), False).deal(i) for i in IDS)
    assert set(counts) == {k for k, _ in sampler}
    for k, weight in sampler:
        assert counts[k] / len(IDS) == pytest.approx(weight, abs=tolerance(weight) + 1e-12)


def test_fresh_deals_a_prompt_alone_as_in_company() -> None:
    """Nothing but the key counts: other prompts, their order and earlier samplers do not."""
    sampler = uniform_sampler((0, 1, 2))
    forward = {i: Draw(1, 2, (sampler,), False).deal(i) for i in IDS}
    one = Draw(1, 2, (uniform_sampler((0,)), uniform_sampler((0, 1)), sampler), False)
    assert {i: one.deal(i) for i in reversed(IDS)} == forward


@pytest.mark.parametrize(("seed", "t"), [(8, 2), (7, 3)])
def test_fresh_deals_anew_for_another_seed_or_iteration(seed: int, t: int) -> None:
    """Two independent draws from two iterates differ on half of the prompts."""
    samplers = (uniform_sampler((0, 1)),)
    draw, other = Draw(7, 2, samplers, False), Draw(seed, t, samplers, False)
    differ = sum(draw.deal(i) != other.deal(i) for i in IDS) / len(IDS)
    assert differ == pytest.approx(0.5, abs=tolerance(0.5))


@pytest.mark.parametrize("name", WINDOWS)
def test_reuse_stays_uniform_over_the_window(name: str) -> None:
    for t, owners in enumerate(deals(name)):
        members = WINDOWS[name].opponent(t).window
        counts = Counter(owners)
        assert set(counts) == set(members)
        share = 1 / len(members)
        for k in members:
            assert counts[k] / len(IDS) == pytest.approx(share, abs=tolerance(share) + 1e-12)


@pytest.mark.parametrize("name", WINDOWS)
def test_reuse_moves_prompts_to_the_newest_iterate_only(name: str) -> None:
    for t, (before, after) in enumerate(itertools.pairwise(deals(name)), start=1):
        assert {new for old, new in zip(before, after, strict=True) if old != new} == {t}


def test_reuse_moves_one_in_n_when_the_window_grows_to_n() -> None:
    """The least that keeps the deal uniform; who does not move keeps the answer it has."""
    for t, (before, after) in enumerate(itertools.pairwise(deals("growing")), start=1):
        share = 1 / (t + 1)
        moved = sum(old != new for old, new in zip(before, after, strict=True)) / len(IDS)
        assert moved == pytest.approx(share, abs=tolerance(share))


def test_reuse_moves_movers_from_all_iterates_alike() -> None:
    """A mover is drawn without a look at its owner: iterates 0, 1, 2 each lose a quarter when iterate 3 comes."""
    before, after = deals("growing")[2:4]
    for k in range(3):
        kept = [new == k for old, new in zip(before, after, strict=True) if old == k]
        assert sum(kept) / len(kept) == pytest.approx(0.75, abs=tolerance(0.75, len(kept)))


@pytest.mark.parametrize(("name", "width"), [("sliding by 2", 2), ("growing then sliding by 3", 3), ("one iterate", 1)])
def test_reuse_moves_just_the_prompts_of_the_iterate_that_left(name: str, width: int) -> None:
    history = deals(name)
    for t in range(width, 6):
        assert history[t] == [t if old == t - width else old for old in history[t - 1]]


def test_reuse_deals_a_prompt_alone_as_in_company() -> None:
    """Another process, another order, a resumed run: the same owners."""
    samplers = tuple(FictitiousPlay().opponent(t).sampler for t in range(4))
    again = {i: Draw(0, 3, samplers, True).deal(i) for i in reversed(IDS[::10])}
    assert [again[i] for i in IDS[::10]] == deals("growing")[3][::10]


def test_reuse_deals_differ_between_seeds() -> None:
    one, other = deals("sliding by 2", 0)[1], deals("sliding by 2", 1)[1]
    differ = sum(a != b for a, b in zip(one, other, strict=True)) / len(IDS)
    assert differ == pytest.approx(0.5, abs=tolerance(0.5))
