"""Held-out metrics on distributions where the value is known."""

import math

import numpy as np
import pytest

from spin_reg.stages import evaluate


def test_k3_is_unbiased_and_never_negative() -> None:
    """Averaged over draws from p it gives KL(p || q) exactly: here by enumeration, not by sampling."""
    p, q = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.2, 0.6])
    kl = float(np.sum(p * np.log(p / q)))
    values = [evaluate.k3([math.log(a)], [math.log(b)]) for a, b in zip(p, q, strict=True)]
    assert min(values) >= 0
    assert sum(a * v for a, v in zip(p, values, strict=True)) == pytest.approx(kl, abs=1e-12)


def test_k3_sums_over_tokens_and_is_zero_for_equals() -> None:
    a, b = [-1.0, -2.0], [-1.5, -0.5]
    assert evaluate.k3(a, b) == pytest.approx(evaluate.k3(a[:1], b[:1]) + evaluate.k3(a[1:], b[1:]))
    assert evaluate.k3(a, a) == 0.0


def test_kl_is_a_mean_with_its_standard_error() -> None:
    gaps = [0.5, 1.5, 1.0, 3.0]
    known = {str(i): gap - 2.0 for i, gap in enumerate(gaps)}
    found = evaluate._kl("x", known, {str(i): -2.0 for i in range(4)})
    assert found["x"] == pytest.approx(1.5)
    assert found["x_se"] == pytest.approx(np.std(gaps, ddof=1) / 2)
