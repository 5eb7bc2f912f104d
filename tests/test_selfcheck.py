"""What the self-check allows: closed forms of the allowances, and that a gap just over one stops the run."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spin_reg import selfcheck
from spin_reg.errors import SelfCheckError
from spin_reg.selfcheck import BFLOAT16, FLOAT32, Stored, Tolerance
from spin_reg.tables import Row

LENGTHS = st.integers(1, 1000)


@given(LENGTHS)
def test_float32_allows_the_same_whatever_the_length(length: int) -> None:
    assert FLOAT32.of_answer(length) == FLOAT32.of_mean(length) == 1e-5


@given(LENGTHS)
def test_bfloat16_allows_two_nats_an_answer_or_a_tenth_a_token(length: int) -> None:
    """And in the mean what falls with the root of the tokens, down to 0.02; never more for a longer answer."""
    assert BFLOAT16.of_answer(length) == pytest.approx(2 / length if length <= 20 else 0.1)
    assert BFLOAT16.of_mean(length) == pytest.approx(0.22 / math.sqrt(length) if length <= 121 else 0.02)
    assert BFLOAT16.of_answer(length + 1) <= BFLOAT16.of_answer(length)
    assert BFLOAT16.of_mean(length + 1) <= BFLOAT16.of_mean(length)


def checked(
    lengths: Sequence[tuple[int, int]], gaps: Sequence[tuple[float, float]], tolerance: Tolerance, **kwargs: Any
) -> dict[str, Any]:
    """Rows of these lengths, whose live log-probs are off by so many nats a token."""
    stored = [
        Stored(
            {"example_id": f"row {i}", "sampled_from": 0, "real_ids": [1] * n, "generated_ids": [1] * m}, -n, -m, -n, -m
        )
        for i, (n, m) in enumerate(lengths)
    ]
    norm = kwargs.get("length_norm", False)
    real, generated = (
        torch.tensor([n[side] * (gap[side] - 1) for n, gap in zip(lengths, gaps, strict=True)], dtype=torch.float64)
        for side in (0, 1)
    )
    each = [(g[0] - g[1]) if norm else (g[0] * n[0] - g[1] * n[1]) for n, g in zip(lengths, gaps, strict=True)]
    margin = 0.5 * torch.tensor(each, dtype=torch.float64)

    def terms(rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        assert len(rows) == len(stored)
        loss = -torch.nn.functional.logsigmoid(margin)
        return {"real_logprob": real, "generated_logprob": generated, "margin": margin, "loss": loss}

    return selfcheck.compare(stored, terms, t=1, beta=0.5, length_norm=norm, tolerance=tolerance)


@pytest.mark.parametrize("length_norm", [False, True])
@pytest.mark.parametrize("tolerance", [FLOAT32, BFLOAT16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("lengths", [(1, 1), (2, 7), (1, 300), (20, 21), (500, 400)])
def test_a_gap_within_the_allowance_passes_and_one_beyond_stops(
    lengths: tuple[int, int], tolerance: Tolerance, length_norm: bool
) -> None:
    """Both ways at once, where the margin is as far off as it may be; the mean of many rows hides none."""
    edge = [tolerance.of_answer(n) for n in lengths]
    rows = [lengths, lengths]

    def gaps(real: float, generated: float) -> list[tuple[float, float]]:
        """The second row is off the other way, so that the mean is 0."""
        return [(real, generated), (-real, -generated)]

    found = checked(rows, gaps(0.99 * edge[0], -0.99 * edge[1]), tolerance, length_norm=length_norm)
    assert found["largest_gap"] == pytest.approx(0.99 * max(edge)) and found["mean_gap"] == pytest.approx(0, abs=1e-12)
    for side in (0, 1):
        off = [0.0, 0.0]
        off[side] = 1.01 * edge[side]
        with pytest.raises(SelfCheckError) as raised:
            checked(rows, gaps(off[0], off[1]), tolerance, length_norm=length_norm)
        assert "2 of 2 rows" in raised.value.where


@pytest.mark.parametrize(("rows", "length"), [(16, 1), (16, 2), (3, 4), (16, 100)])
def test_a_mean_that_is_off_stops_though_every_answer_is_within(rows: int, length: int) -> None:
    edge = BFLOAT16.of_mean(2 * rows * length)
    assert edge < BFLOAT16.of_answer(length)
    lengths = [(length, length)] * rows
    assert checked(lengths, [(0.99 * edge, 0.99 * edge)] * rows, BFLOAT16)["mean_gap"] == pytest.approx(0.99 * edge)
    with pytest.raises(SelfCheckError, match="does not give the stored") as raised:
        checked(lengths, [(-1.01 * edge, -1.01 * edge)] * rows, BFLOAT16)
    assert "0 of" in raised.value.where and f"{edge:.2g} in the mean" in raised.value.why
