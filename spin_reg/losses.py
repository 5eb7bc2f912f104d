"""Preference losses: margins in, one loss a pair out. All depend on a difference of log-ratios only.

Delta = (log pi_theta - log r)(real) - (log pi_theta - log r)(generated), in nats; z = beta * Delta is the margin. The
catalogue is that of SPIN's Assumption 5.1 (arXiv 2401.01335: monotonically decreasing, convex, l'(0) < 0), and IPO.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import softplus


def logistic(delta: Tensor, beta: float) -> Tensor:
    """log(1 + exp(-z)): SPIN's and DPO's; dl/dDelta = -beta sigmoid(-z)."""
    return softplus(-beta * delta)


def hinge(delta: Tensor, beta: float) -> Tensor:
    """max(0, 1 - z)."""
    return torch.relu(1 - beta * delta)


def exponential(delta: Tensor, beta: float) -> Tensor:
    """exp(-z)."""
    return torch.exp(-beta * delta)


def ipo(delta: Tensor, beta: float) -> Tensor:
    """(Delta - 1 / (2 tau))^2 with tau = beta (arXiv 2310.12036): convex, not monotone."""
    return (delta - 1 / (2 * beta)) ** 2


LOSSES: dict[str, Callable[[Tensor, float], Tensor]] = {f.__name__: f for f in (logistic, hinge, exponential, ipo)}


def log_ratio_difference(
    policy_real: Tensor,
    policy_generated: Tensor,
    reference_real: Tensor,
    reference_generated: Tensor,
    lengths: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Delta of each pair.

    Args:
        policy_*, reference_*: (B,) sequence log-probs in nats.
        lengths: (B,) token counts of (real, generated) answers; given, each log-ratio is divided by its own.

    Returns:
        (B,) Delta, in nats (nats a token where lengths are given).
    """
    real, generated = policy_real - reference_real, policy_generated - reference_generated
    if lengths is not None:
        real, generated = real / lengths[0], generated / lengths[1]
    return real - generated
