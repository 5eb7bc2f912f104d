"""Self-play on a handful of answers, exactly: the project's losses and references against closed forms.

A policy is a vector u = log pi over K answers to one prompt, p is the data distribution, s_t the sampler's mixture and
r_t the reference of a regularizer's `opponent(t)`. For the logistic loss the exact best response of an iteration is
u_{t+1} = log r_t + (log p - log s_t) / beta up to a constant (arXiv 2401.01335, theorem 5.4, where r_t = s_t = pi_t).
"""

import itertools
import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from spin_reg.losses import LOSSES, log_ratio_difference
from spin_reg.opponents import Opponent, ReferenceKind, Regularizer, evaluate, scorers
from spin_reg.regularizers.fictitious_play import FictitiousPlay
from spin_reg.regularizers.kl import KL
from spin_reg.regularizers.mixture_of_two import MixtureOfTwo
from spin_reg.regularizers.none import Plain

OUTCOMES = 5
last, geometric, generator = ReferenceKind.last, ReferenceKind.geometric, ReferenceKind.generator

REGULARIZERS: dict[str, Regularizer] = {
    "none": Plain(),
    "kl": KL(alpha=0.3),
    "kl, history": KL(alpha=0.3, history=None),
    "mixture_of_two": MixtureOfTwo(),
    "mixture_of_two, last": MixtureOfTwo(reference=last),
    "fictitious_play": FictitiousPlay(),
    "fictitious_play, geometric": FictitiousPlay(reference=geometric),
}


def random_policy(seed: int, spread: float = 0.7) -> Tensor:
    """log pi of random answers."""
    noise = torch.randn(OUTCOMES, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return (spread * noise).log_softmax(0)


def sampler_logprobs(opponent: Opponent, policies: Sequence[Tensor]) -> Tensor:
    """log s = log sum_k w_k pi_k."""
    return sum(weight * policies[k].exp() for k, weight in opponent.sampler).log()  # type: ignore[union-attr]


def reference_logprobs(opponent: Opponent, policies: Sequence[Tensor], sampled_from: int) -> Tensor:
    """log r of every answer, by the project's own evaluation."""
    known = {k: policies[k].tolist() for k in scorers(opponent.reference, sampled_from)}
    answers = [{k: u[y] for k, u in known.items()} for y in range(len(policies[0]))]
    values = [evaluate(opponent.reference, logprobs, sampled_from) for logprobs in answers]
    return torch.tensor(values, dtype=torch.float64)


def population_loss(
    loss: str, opponent: Opponent, policies: Sequence[Tensor], p: Tensor, beta: float
) -> Callable[[Tensor], Tensor]:
    """u -> E_{y~p, k~w, y'~pi_k} l(Delta(y, y')): the expectation of what a training run minimises."""
    rows, columns = (i.flatten() for i in torch.meshgrid(*[torch.arange(len(p))] * 2, indexing="ij"))
    terms = []
    for k, weight in opponent.sampler:
        reference = reference_logprobs(opponent, policies, k)
        mass = weight * p.exp()[rows] * policies[k].exp()[columns]
        terms.append((mass, reference[rows], reference[columns]))

    def expectation(u: Tensor) -> Tensor:
        losses = (
            LOSSES[loss](log_ratio_difference(u[rows], u[columns], real, generated), beta)
            for _, real, generated in terms
        )
        return torch.stack([(mass * value).sum() for (mass, _, _), value in zip(terms, losses, strict=True)]).sum()

    return expectation


def minimise(function: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """Newton's method with step halving for a convex function that a constant added to u does not change."""
    u = start.clone()
    for _ in range(100):
        leaf = u.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(function(leaf), leaf)
        if gradient.abs().max() < 1e-12:
            break
        hessian = torch.autograd.functional.hessian(function, u)
        step = torch.linalg.solve(hessian + torch.ones_like(hessian) / len(u), gradient)
        size = 1.0
        while function(u - size * step) > function(u) and size > 1e-6:
            size /= 2
        u = u - size * step
    return u.log_softmax(0)


def exact_step(policies: Sequence[Tensor], p: Tensor, opponent: Opponent, beta: float) -> Tensor:
    """u_{t+1} = log r_t + (log p - log s_t) / beta, normalised."""
    reference = reference_logprobs(opponent, policies, opponent.window[-1])
    return (reference + (p - sampler_logprobs(opponent, policies)) / beta).log_softmax(0)


def path(regularizer: Regularizer, start: Tensor, p: Tensor, beta: float, steps: int) -> list[Tensor]:
    """Iterates 0..steps of exact play."""
    policies = [start]
    for t in range(steps):
        policies.append(exact_step(policies, p, regularizer.opponent(t), beta))
    return policies


def distance(u: Tensor, v: Tensor) -> float:
    """max_y |log pi(y) - log pi'(y)|."""
    return (u - v).abs().max().item()


# ---------------------------------------------------------------------------------------------------------------------
# One iteration
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REGULARIZERS)
@pytest.mark.parametrize("beta", [0.5, 2.0])
@pytest.mark.parametrize("loss", ["logistic", "exponential", "ipo"])
def test_best_responses_have_their_closed_form(loss: str, beta: float, name: str) -> None:
    """logistic: r (p/s)^(1/beta). exponential: r (p/s)^(1/(2 beta)). ipo: r exp(gamma (p-s)/(p+s)), with

    gamma = 1/(beta (2 + D)), D = sum (p-s)^2/(p+s). All up to a normaliser, against direct minimisation.
    """
    policies, p = [random_policy(i) for i in range(4)], random_policy(9)
    opponent = REGULARIZERS[name].opponent(3)
    found = minimise(population_loss(loss, opponent, policies, p, beta), policies[3])
    log_s, log_r = sampler_logprobs(opponent, policies), reference_logprobs(opponent, policies, 3)
    if loss == "ipo":
        data, sampler = p.exp(), log_s.exp()
        spread = ((data - sampler) ** 2 / (data + sampler)).sum()
        tilt = (data - sampler) / (data + sampler) / (beta * (2 + spread))
    else:
        tilt = (p - log_s) / {"logistic": beta, "exponential": 2 * beta}[loss]
    assert distance(found, (log_r + tilt).log_softmax(0)) < 1e-7
    assert distance(found, policies[3]) > 1e-2


@pytest.mark.parametrize("beta", [0.3, 1.0, 4.0])
def test_spin_moves_by_the_density_ratio_to_one_over_beta(beta: float) -> None:
    """pi_{t+1} prop. to pi_t (p / pi_t)^(1/beta): theorem 5.4 of arXiv 2401.01335."""
    policies, p = [random_policy(i) for i in range(3)], random_policy(9)
    found = minimise(population_loss("logistic", Plain().opponent(2), policies, p, beta), policies[2]).exp()
    expected = policies[2].exp() * (p.exp() / policies[2].exp()) ** (1 / beta)
    torch.testing.assert_close(found, expected / expected.sum(), rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", ["none", "mixture_of_two", "fictitious_play"])
def test_at_beta_1_a_matched_reference_lands_on_the_data(name: str) -> None:
    """r = s: r p / s = p, whatever the history; a reference that is not the sampler's density misses it."""
    policies, p = [random_policy(i) for i in range(4)], random_policy(9)
    opponent = REGULARIZERS[name].opponent(3)
    assert distance(exact_step(policies, p, opponent, 1.0), p) < 1e-12
    assert distance(minimise(population_loss("logistic", opponent, policies, p, 1.0), policies[3]), p) < 1e-7
    for other in ("kl", "mixture_of_two, last", "fictitious_play, geometric"):
        assert distance(exact_step(policies, p, REGULARIZERS[other].opponent(3), 1.0), p) > 1e-2


def test_generator_and_arithmetic_agree_to_first_order() -> None:
    """Near the data, where iterates are p (1 + eps ...): they differ by eps^2; `last` differs by eps already."""
    p, eps = random_policy(9), 1e-3
    policies = [(p + eps * random_policy(i)).log_softmax(0) for i in range(4)]
    start = policies[3]

    def best_response(reference: ReferenceKind) -> Tensor:
        opponent = FictitiousPlay(reference=reference).opponent(3)
        return minimise(population_loss("logistic", opponent, policies, p, 0.5), start)

    matched = best_response(ReferenceKind.arithmetic)
    assert distance(best_response(generator), matched) < 10 * eps**2
    assert distance(best_response(geometric), matched) < 10 * eps**2
    assert distance(best_response(last), matched) > eps / 10


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", REGULARIZERS)
def test_answers_like_the_data_leave_the_reference_the_best_policy(name: str, loss: str) -> None:
    """s = p: by Jensen E l(Delta) >= l(E Delta) = l(0), which pi_theta = r attains."""
    policies, p = [random_policy(i) for i in range(4)], random_policy(9)
    opponent = REGULARIZERS[name].opponent(3)
    expectation = population_loss(loss, opponent, policies, sampler_logprobs(opponent, policies), 0.5)
    reference = reference_logprobs(opponent, policies, 3)
    at_reference = expectation(reference).item()
    assert at_reference == pytest.approx(LOSSES[loss](torch.zeros(1, dtype=torch.float64), 0.5).item(), abs=1e-12)
    for seed in range(5):
        elsewhere = expectation(reference + 4 * random_policy(100 + seed)).item()
        assert elsewhere > at_reference + 1e-3
    toward_data = population_loss(loss, opponent, policies, p, 0.5)
    leaf = reference.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(toward_data(leaf), leaf)
    assert gradient.abs().max() > 1e-3  # and with s != p it is not


@pytest.mark.parametrize("name", REGULARIZERS)
@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_the_gap_to_log_2_is_a_jensen_shannon_divergence(beta: float, name: str) -> None:
    """log 2 - min E l = JS(p x s, s x p): what the best discriminator of real and generated answers still finds."""
    policies, p = [random_policy(i) for i in range(4)], random_policy(9)
    opponent = REGULARIZERS[name].opponent(3)
    expectation = population_loss("logistic", opponent, policies, p, beta)
    gap = math.log(2) - expectation(minimise(expectation, policies[3])).item()
    data = p.exp().tolist()
    sampler = [sum(w * policies[k][y].exp().item() for k, w in opponent.sampler) for y in range(OUTCOMES)]
    divergence = 0.0
    for y, other in itertools.product(range(OUTCOMES), repeat=2):
        right, swapped = data[y] * sampler[other], sampler[y] * data[other]
        middle = (right + swapped) / 2
        divergence += (right * math.log(right / middle) + swapped * math.log(swapped / middle)) / 2
    assert gap == pytest.approx(divergence, abs=1e-12)
    assert 1e-3 < gap < math.log(2)


# ---------------------------------------------------------------------------------------------------------------------
# The opponent's problem: which penalty gives which reference
# ---------------------------------------------------------------------------------------------------------------------


def kl(q: Tensor, r: Tensor) -> Tensor:
    """KL(q || r) of log-probs."""
    return (q.exp() * (q - r)).sum()


def maximise(function: Callable[[Tensor], Tensor], start: Tensor) -> tuple[Tensor, float]:
    """(log q*, J(q*)) over distributions q, by L-BFGS on their logits."""
    logits = start.clone().requires_grad_()
    optimiser = torch.optim.LBFGS(
        [logits], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        value = -function(logits.log_softmax(0))
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimiser.step(closure)
    best = logits.detach().log_softmax(0)
    return best, function(best).item()


def assert_solves(
    objective: Callable[[Tensor], Tensor], scores: Tensor, beta: float, regularizer: Regularizer, policies: list[Tensor]
) -> None:
    """The numerical maximiser is r exp(f / beta) / Z_f, and the maximum beta log Z_f."""
    t = len(policies) - 1
    tilted = reference_logprobs(regularizer.opponent(t), policies, t) + scores / beta
    best, value = maximise(objective, policies[t])
    assert distance(best, tilted.log_softmax(0)) < 1e-5
    assert value == pytest.approx(beta * tilted.logsumexp(0).item(), abs=1e-9)


@pytest.mark.parametrize(("beta_prev", "beta_base"), [(0.6, 0.2), (0.3, 0.9), (0.7, 0.0), (0.0, 0.7)])
def test_two_kl_penalties_are_one_penalty_to_the_kl_reference(beta_prev: float, beta_base: float) -> None:
    """max_q E_q f - beta_prev KL(q||pi_t) - beta_base KL(q||pi_0), with alpha = beta_base / (beta_prev + beta_base)."""
    policies, scores = [random_policy(i) for i in range(3)], random_policy(8)
    beta = beta_prev + beta_base

    def objective(q: Tensor) -> Tensor:
        return (q.exp() * scores).sum() - beta_prev * kl(q, policies[2]) - beta_base * kl(q, policies[0])

    assert_solves(objective, scores, beta, KL(alpha=beta_base / beta), policies)


def test_a_penalty_to_the_average_gives_the_arithmetic_reference() -> None:
    """max_q E_q f - beta KL(q || mean_k pi_k)."""
    policies, scores, beta = [random_policy(i) for i in range(3)], random_policy(8), 0.4
    average = (sum(u.exp() for u in policies) / 3).log()  # type: ignore[union-attr]
    assert_solves(lambda q: (q.exp() * scores).sum() - beta * kl(q, average), scores, beta, FictitiousPlay(), policies)


def test_an_average_of_penalties_gives_the_geometric_reference() -> None:
    """max_q E_q f - beta mean_k KL(q || pi_k)."""
    policies, scores, beta = [random_policy(i) for i in range(3)], random_policy(8), 0.4
    assert_solves(
        lambda q: (q.exp() * scores).sum() - beta * sum(kl(q, u) for u in policies) / 3,
        scores,
        beta,
        FictitiousPlay(reference=geometric),
        policies,
    )


@pytest.mark.parametrize("name", REGULARIZERS)
def test_a_policy_is_the_best_opponent_under_its_own_score(name: str) -> None:
    """f = beta (log pi_theta - log r): then Z_f = 1, and no normaliser is ever needed."""
    policies, theta, beta = [random_policy(i) for i in range(3)], random_policy(7), 0.6
    reference = reference_logprobs(REGULARIZERS[name].opponent(2), policies, 2)
    scores = beta * (theta - reference)
    best, value = maximise(lambda q: (q.exp() * scores).sum() - beta * kl(q, reference), policies[2])
    assert distance(best, theta) < 1e-5
    assert value == pytest.approx(0.0, abs=1e-9)


def test_mixing_token_by_token_is_not_mixing_answers() -> None:
    """log pi_tok(y) = log r(y) - sum_j log Z_j(y_<j), Z_j = sum_v pi_t(v|y_<j)^(1-alpha) pi_0(v|y_<j)^alpha <= 1.

    On all answers of 4 tokens out of 3: the last sum depends on y, so the two mixtures are different policies.
    """
    tokens, length, alpha = 3, 4, 0.4
    prefixes = [prefix for n in range(length) for prefix in itertools.product(range(tokens), repeat=n)]
    generator = torch.Generator().manual_seed(2)
    tables = [
        {x: torch.randn(tokens, dtype=torch.float64, generator=generator).log_softmax(0) for x in prefixes}
        for _ in range(2)
    ]
    mixed = {x: (1 - alpha) * tables[1][x] + alpha * tables[0][x] for x in prefixes}
    log_z = {x: logits.logsumexp(0).item() for x, logits in mixed.items()}
    assert max(log_z.values()) < 0
    reference = KL(alpha=alpha).opponent(1).reference
    token_wise, sequence_wise = [], []
    for y in itertools.product(range(tokens), repeat=length):
        steps = [(y[:j], y[j]) for j in range(length)]
        logprobs = {k: sum(table[x][v].item() for x, v in steps) for k, table in enumerate(tables)}
        token_wise.append(sum(mixed[x].log_softmax(0)[v].item() for x, v in steps))
        sequence_wise.append(evaluate(reference, logprobs, 1))
        assert token_wise[-1] == pytest.approx(sequence_wise[-1] - sum(log_z[x] for x, _ in steps), abs=1e-12)
    assert math.fsum(map(math.exp, token_wise)) == pytest.approx(1.0, abs=1e-12)
    log_total = math.log(math.fsum(map(math.exp, sequence_wise)))
    assert log_total < 0
    assert max(abs(a - (b - log_total)) for a, b in zip(token_wise, sequence_wise, strict=True)) > 0.05


# ---------------------------------------------------------------------------------------------------------------------
# Many iterations
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(set(REGULARIZERS) - {"kl", "kl, history"}))
@pytest.mark.parametrize("beta", [0.3, 2.0])
def test_the_data_are_a_fixed_point_without_the_base(name: str, beta: float) -> None:
    p = random_policy(9)
    assert distance(exact_step([p] * 4, p, REGULARIZERS[name].opponent(3), beta), p) < 1e-12


@pytest.mark.parametrize("name", ["none", "mixture_of_two", "fictitious_play"])
@pytest.mark.parametrize("beta", [0.3, 2.0])
def test_training_on_the_data_itself_stays_there(name: str, beta: float) -> None:
    """The same by direct minimisation of the loss."""
    p = random_policy(9)
    expectation = population_loss("logistic", REGULARIZERS[name].opponent(3), [p] * 4, p, beta)
    assert distance(minimise(expectation, random_policy(1)), p) < 1e-7


@pytest.mark.parametrize("alpha", [0.2, 0.5])
@pytest.mark.parametrize("beta", [1.5, 3.0])
def test_kl_comes_to_rest_between_the_data_and_the_base(alpha: float, beta: float) -> None:
    """pi* prop. to (p pi_0^(alpha beta))^(1 / (1 + alpha beta)): the price of the penalty."""
    start, p = random_policy(0), random_policy(9)
    end = path(KL(alpha=alpha), start, p, beta, steps=400)[-1]
    pull = alpha * beta
    expected = (p.exp() * start.exp() ** pull) ** (1 / (1 + pull))
    torch.testing.assert_close(end.exp(), expected / expected.sum(), rtol=0, atol=1e-10)
    assert distance(end, p) > 1e-2 and distance(end, start) > 1e-2


def outcome(regularizer: Regularizer, beta: float) -> str:
    """Exact play from near the rest point, until four iterates in a row are a hundred times as near, or one as far.

    The rest point is p, or for `kl` (which is pulled to its start) the one above. One near iterate proves nothing: an
    oscillation passes close by.
    """
    p = random_policy(9)
    policies = [(p + 1e-4 * random_policy(1)).log_softmax(0)]
    pull = beta * (regularizer.alpha[0] if isinstance(regularizer, KL) else 0.0)
    rest = ((p + pull * policies[0]) / (1 + pull)).log_softmax(0)
    distances = [distance(policies[0], rest)]
    for t in range(400):
        policies.append(exact_step(policies, p, regularizer.opponent(t), beta))
        distances.append(distance(policies[-1], rest))
        if distances[-1] > 1e2 * distances[0]:
            return "diverges"
        if max(distances[-4:]) < 1e-2 * distances[0]:
            return "settles"
    return "neither"


@pytest.mark.parametrize(
    ("regularizer", "stable", "unstable"),
    [
        pytest.param(Plain(), 0.55, 0.45, id="none: 1/2"),
        pytest.param(KL(alpha=0.5), 0.70, 0.62, id="kl: 1/(2 - alpha), more than none"),
        pytest.param(KL(alpha=1.0), 1.1, 0.9, id="kl, alpha 1: 1"),
        pytest.param(MixtureOfTwo(), 0.36, 0.30, id="mixture of two: 1/3"),
        pytest.param(FictitiousPlay(history=3), 0.28, 0.22, id="history 3: 1/4"),
        pytest.param(MixtureOfTwo(reference=geometric), 0.36, 0.30, id="mixture of two, geometric: 1/3"),
        pytest.param(MixtureOfTwo(reference=last), 0.55, 0.45, id="mixture of two, reference last: 1/2, no gain"),
        pytest.param(FictitiousPlay(history=3, reference=last), 0.73, 0.60, id="history 3, reference last: 2/3, worse"),
    ],
)
def test_play_settles_only_above_a_threshold_of_beta(regularizer: Regularizer, stable: float, unstable: float) -> None:
    """The largest factor of a step, linearised at the rest point, crosses 1 there; for none it is 1 - 1/beta."""
    assert outcome(regularizer, stable) == "settles"
    assert outcome(regularizer, unstable) == "diverges"


def test_fictitious_play_overshoots_first_and_settles_in_the_end() -> None:
    """At beta = 0.2, from pi_0 = p exp(e): deviations e (1, -4, 6, -4, 1, 0, ...), where SPIN has e (-4)^t."""
    p = random_policy(9)
    start = (p + 1e-4 * random_policy(1)).log_softmax(0)
    deviations = [distance(u, p) / distance(start, p) for u in path(FictitiousPlay(), start, p, beta=0.2, steps=30)]
    assert deviations[:5] == pytest.approx([1, 4, 6, 4, 1], rel=0.02)
    assert max(deviations[5:]) < 0.02 and deviations[-1] < 1e-4
    spin = [distance(u, p) / distance(start, p) for u in path(Plain(), start, p, beta=0.2, steps=3)]
    assert spin == pytest.approx([1, 4, 16, 64], rel=0.05)
