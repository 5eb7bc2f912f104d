"""The tables of docs/scaling.md are those that scripts/scaling.py makes; its counts against other roads."""

import runpy

import pytest
from conftest import ROOT

made = runpy.run_path(str(ROOT / "scripts" / "scaling.py"))
TEXT = (ROOT / "docs" / "scaling.md").read_text()


def test_the_tables_are_the_scripts() -> None:
    tables = [*(made["stages"](scale) for scale in made["SCALES"]), made["sizes"](), made["steps"]()]
    assert all(f"\n\n{table}\n\n" in TEXT for table in tables)


def test_training_by_hand() -> None:
    """8 P FLOP a token, two epochs of three iterations of pairs of 256 + 2 * 512 tokens, at half the rate."""
    name, flops, best, worst = made["rows"](made["SCALES"][0], "none")[2]
    assert name == "train" and flops == pytest.approx(8 * 7.24e9 * 6 * 50_000 * 1280)
    assert best == pytest.approx(flops / (8 * 989e12 * 0.5) / 3600) and worst == pytest.approx(best * 5 / 3)


def test_fictitious_play_is_dearer_with_every_iteration_where_answers_are_fresh() -> None:
    fresh, reuse = "fictitious play, fresh", "fictitious play, reuse"
    assert [made["logprobs"](fresh, t) for t in range(4)] == [2, 3, 4, 5]
    assert all(made["logprobs"](reuse, t) < 3 for t in range(99)) and made["answers"](reuse, 3) == 1 / 4
