"""Losses against hand arithmetic, finite differences and what pairs of answers must cancel."""

import math
from random import Random

import pytest
import torch
from torch import Tensor

from spin_reg.losses import LOSSES, exponential, hinge, ipo, log_ratio_difference, logistic
from spin_reg.opponents import evaluate
from spin_reg.regularizers.kl import KL
from spin_reg.regularizers.none import Plain

every_loss = pytest.mark.parametrize("name", LOSSES)
BETAS = [0.1, 0.5, 1.0, 3.0]


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def loss_and_slope(name: str, delta: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """l(Delta) and dl/dDelta."""
    leaf = delta.clone().requires_grad_()
    loss = LOSSES[name](leaf, beta)
    (slope,) = torch.autograd.grad(loss.sum(), leaf)
    return loss.detach(), slope


def logprobs(seed: int, rows: int = 5) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Policy and reference log-probs of real and generated answers, in eighths: sums of a few are exact."""
    rng = Random(seed)
    values = [[-rng.randint(1, 800) / 8 for _ in range(rows)] for _ in range(4)]
    return tuple(torch.tensor(v, dtype=torch.float64) for v in values)  # type: ignore[return-value]


# ---------------------------------------------------------------------------------------------------------------------
# The losses
# ---------------------------------------------------------------------------------------------------------------------


def test_logistic_by_hand() -> None:
    """z = 0.5 * (2, -2, 0) = (1, -1, 0): log(1 + 1/e), log(1 + e), log 2."""
    expected = f64(0.3132616875182228, 1.3132616875182228, 0.6931471805599453)
    torch.testing.assert_close(logistic(f64(2, -2, 0), 0.5), expected, rtol=0, atol=1e-15)


def test_hinge_by_hand() -> None:
    """z = (1.5, 1, 0.5, -2): max(0, 1 - z)."""
    torch.testing.assert_close(hinge(f64(3, 2, 1, -4), 0.5), f64(0, 0, 0.5, 3), rtol=0, atol=0)


def test_exponential_by_hand() -> None:
    """z = (1, -2, 0): 1/e, e^2, 1."""
    expected = f64(0.36787944117144233, 7.38905609893065, 1)
    torch.testing.assert_close(exponential(f64(0.5, -1, 0), 2.0), expected, rtol=1e-15, atol=0)


def test_ipo_by_hand() -> None:
    """tau = 0.25, so the target is 2: (2 - 2)^2, (5 - 2)^2, (0 - 2)^2, (-1 - 2)^2."""
    torch.testing.assert_close(ipo(f64(2, 5, 0, -1), 0.25), f64(0, 9, 4, 9), rtol=0, atol=0)


@every_loss
@pytest.mark.parametrize("beta", BETAS)
def test_slopes_match_finite_differences(name: str, beta: float) -> None:
    """Away from the hinge's corner at Delta = 1 / beta."""
    delta, step = f64(-4.3, -1.1, 0, 0.17, 0.77, 2.9, 11.3), 1e-5
    high, low = LOSSES[name](delta + step, beta), LOSSES[name](delta - step, beta)
    torch.testing.assert_close(loss_and_slope(name, delta, beta)[1], (high - low) / (2 * step), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("beta", BETAS)
def test_logistic_slope_is_minus_beta_sigmoid_of_minus_z(beta: float) -> None:
    delta = torch.linspace(-20, 20, 41, dtype=torch.float64)
    expected = [-beta / (1 + math.exp(beta * d)) for d in delta.tolist()]
    torch.testing.assert_close(loss_and_slope("logistic", delta, beta)[1], f64(*expected), rtol=1e-8, atol=0)


@every_loss
@pytest.mark.parametrize("beta", BETAS)
def test_losses_are_convex(name: str, beta: float) -> None:
    """The middle of a chord lies on or above the curve, and somewhere clearly above: none is a straight line."""
    grid = torch.linspace(-12, 12, 97, dtype=torch.float64)
    value = LOSSES[name](grid, beta)
    excess = (value[:-2] + value[2:]) / 2 - value[1:-1]
    assert (excess >= -1e-12 * value[1:-1].abs().clamp(min=1)).all()
    assert (excess > 1e-6).any()


@pytest.mark.parametrize("name", sorted(set(LOSSES) - {"ipo"}))
@pytest.mark.parametrize("beta", BETAS)
def test_losses_fall_with_the_margin(name: str, beta: float) -> None:
    """Never rising, and strictly falling up to a margin of 1 (where the hinge is flat)."""
    grid = torch.linspace(-12, 12, 97, dtype=torch.float64)
    steps = LOSSES[name](grid, beta).diff()
    assert (steps <= 0).all()
    assert (steps[grid[1:] * beta <= 1] < 0).all()


def test_ipo_rises_past_its_target() -> None:
    """Lowest at Delta = 1 / (2 tau), where it is 0: a margin can be too large."""
    grid = torch.linspace(-12, 12, 97, dtype=torch.float64)
    value = ipo(grid, 0.125)
    assert grid[value.argmin()] == 4.0 and value.min() == 0.0
    assert (value[grid > 4].diff() > 0).all() and (value[grid < 4].diff() < 0).all()


@every_loss
def test_at_equality_the_real_answer_is_preferred_more(name: str) -> None:
    """l'(0) < 0."""
    assert loss_and_slope(name, f64(0), 0.7)[1].item() < -1e-3


@every_loss
def test_pairs_do_not_mix(name: str) -> None:
    """One loss a pair, and each depends on its own pair only."""
    delta = f64(-2, 0.5, 3)
    together = LOSSES[name](delta, 0.3)
    assert together.shape == (3,)
    for i in range(3):
        assert together[i] == LOSSES[name](delta[i : i + 1], 0.3)[0]


def test_logistic_does_not_overflow() -> None:
    """Long answers have differences of thousands of nats: l is linear there, not inf; its slope is -beta, not nan."""
    loss, slope = loss_and_slope("logistic", f64(-50000, 50000).float(), 0.5)
    assert loss.tolist() == [25000.0, 0.0]
    assert slope.tolist() == [-0.5, 0.0]


@pytest.mark.parametrize("beta", BETAS)
def test_equal_policies_have_a_logistic_loss_of_log_2(beta: float) -> None:
    """theta = r: Delta = 0 for every pair, whatever the answers."""
    real, generated, _, _ = logprobs(0)
    loss = logistic(log_ratio_difference(real, generated, real, generated), beta)
    torch.testing.assert_close(loss, torch.full_like(loss, 0.6931471805599453), rtol=0, atol=1e-15)


def test_small_beta_pulls_at_half_of_beta() -> None:
    """beta -> 0: loss -> log 2 and slope -> -beta / 2, so the gradient is -(beta/2) grad[log pi(y) - log pi(y')]."""
    loss, slope = loss_and_slope("logistic", f64(-30, 0, 40), 1e-7)
    torch.testing.assert_close(loss, torch.full_like(loss, math.log(2)), rtol=0, atol=1e-5)
    torch.testing.assert_close(slope, torch.full_like(slope, -0.5e-7), rtol=1e-5, atol=0)


# ---------------------------------------------------------------------------------------------------------------------
# What the losses are given
# ---------------------------------------------------------------------------------------------------------------------


def test_difference_by_hand() -> None:
    """(-10 + 12) - (-20 + 17) = 5; per token, with 4 and 6 tokens, 2/4 + 3/6 = 1."""
    answers = f64(-10), f64(-20), f64(-12), f64(-17)
    assert log_ratio_difference(*answers).tolist() == [5.0]
    assert log_ratio_difference(*answers, lengths=(torch.tensor([4]), torch.tensor([6]))).tolist() == [1.0]


@every_loss
@pytest.mark.parametrize("seed", range(3))
def test_a_constant_of_the_prompt_cancels(name: str, seed: int) -> None:
    """log r + c(x), as the missing log Z(x) of a geometric mixture: no loss and no gradient changes."""
    real, generated, r_real, r_generated = logprobs(seed)
    c = torch.tensor([Random(seed + i).randint(-80, 80) / 8 for i in range(len(real))], dtype=torch.float64)

    def loss_and_gradients(shift: Tensor) -> list[Tensor]:
        policy = real.clone().requires_grad_(), generated.clone().requires_grad_()
        delta = log_ratio_difference(*policy, r_real + shift, r_generated + shift)
        loss = LOSSES[name](delta, 0.05)
        return [loss.detach(), *torch.autograd.grad(loss.sum(), policy)]

    for without, with_c in zip(loss_and_gradients(torch.zeros_like(c)), loss_and_gradients(c), strict=True):
        assert torch.equal(without, with_c)


def test_a_constant_of_the_prompt_does_not_cancel_per_token() -> None:
    """c/|y| - c/|y'| remains; only answers of equal length are safe."""
    answers = logprobs(4, rows=3)
    lengths = torch.tensor([4, 8, 5]), torch.tensor([16, 2, 5])
    shifted = answers[0], answers[1], answers[2] + 8, answers[3] + 8
    change = log_ratio_difference(*shifted, lengths=lengths) - log_ratio_difference(*answers, lengths=lengths)
    torch.testing.assert_close(change, f64(8 / 16 - 8 / 4, 8 / 2 - 8 / 8, 0), rtol=0, atol=1e-12)


@every_loss
def test_training_raises_the_real_and_lowers_the_generated_answer(name: str) -> None:
    """From theta = r, the gradients of the two log-probs are opposite, and a descent step helps the real answer."""
    real, generated, _, _ = logprobs(1)
    policy = real.clone().requires_grad_(), generated.clone().requires_grad_()
    loss = LOSSES[name](log_ratio_difference(*policy, real, generated), 0.5)
    for_real, for_generated = torch.autograd.grad(loss.sum(), policy)
    assert (for_real < 0).all()
    assert torch.equal(for_real, -for_generated)


def test_the_reference_gets_no_say_in_the_sign() -> None:
    """Delta falls by one for each nat that the reference gives the real answer, and rises for the generated one."""
    real, generated, r_real, r_generated = logprobs(2)
    delta = log_ratio_difference(real, generated, r_real, r_generated)
    assert torch.equal(log_ratio_difference(real, generated, r_real + 1, r_generated), delta - 1)
    assert torch.equal(log_ratio_difference(real, generated, r_real, r_generated + 1), delta + 1)


# ---------------------------------------------------------------------------------------------------------------------
# SPIN and DPO as special cases
# ---------------------------------------------------------------------------------------------------------------------


def plain_dpo(policy_w: float, policy_l: float, ref_w: float, ref_l: float, beta: float) -> float:
    """-log sigmoid(beta [(log pi(w) - log pi(l)) - (log ref(w) - log ref(l))]), with probabilities' logs only."""
    return -math.log(1 / (1 + math.exp(-beta * ((policy_w - policy_l) - (ref_w - ref_l)))))


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize(("alpha", "reference_iterate"), [(0.0, 3), (1.0, 0)])
def test_alpha_0_is_dpo_against_the_newest_and_alpha_1_against_the_base(
    seed: int, alpha: float, reference_iterate: int
) -> None:
    rng = Random(seed)
    real, generated = ({k: rng.uniform(-40, -20) for k in range(4)} for _ in range(2))
    policy_real, policy_generated, beta = rng.uniform(-40, -20), rng.uniform(-40, -20), 0.2
    reference = KL(alpha=alpha).opponent(3).reference
    r_real, r_generated = evaluate(reference, real, 3), evaluate(reference, generated, 3)
    loss = logistic(
        log_ratio_difference(f64(policy_real), f64(policy_generated), f64(r_real), f64(r_generated)), beta
    ).item()
    k = reference_iterate
    assert loss == pytest.approx(plain_dpo(policy_real, policy_generated, real[k], generated[k], beta), rel=1e-12)
    if alpha == 0:
        spin = Plain().opponent(3).reference
        assert (r_real, r_generated) == (evaluate(spin, real, 3), evaluate(spin, generated, 3))


@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])
def test_the_first_margin_of_a_round_is_what_the_newest_gained_on_the_base(alpha: float) -> None:
    """theta = pi_t: Delta = alpha [(log pi_t - log pi_0)(y) - (log pi_t - log pi_0)(y')]."""
    real, generated = {0: -30.0, 2: -22.0}, {0: -19.0, 2: -24.0}
    reference = KL(alpha=alpha).opponent(2).reference
    delta = log_ratio_difference(
        f64(real[2]), f64(generated[2]), f64(evaluate(reference, real, 2)), f64(evaluate(reference, generated, 2))
    )
    assert delta.item() == pytest.approx(alpha * (8.0 + 5.0), abs=1e-12)
