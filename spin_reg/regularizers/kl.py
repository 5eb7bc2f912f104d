"""KL regularization toward the base (alpha-SPIN)."""

from dataclasses import dataclass
from typing import Any

from spin_reg.opponents import (
    Iterate,
    Opponent,
    Pairs,
    ReferenceKind,
    Regularizer,
    combine,
    geometric,
    uniform_sampler,
    window,
)
from spin_reg.schedules import at, per_iteration, words_of


@dataclass
class KL(Regularizer):
    """alpha-SPIN (arXiv 2404.04291): reference (1 - alpha) log pi_t + alpha log pi_0, answers from pi_t.

    A penalty beta_prev KL(p||pi_t) + beta_base KL(p||pi_0) on the opponent is this reference with beta = beta_prev +
    beta_base and alpha = beta_base / beta. alpha = 0 is SPIN, alpha = 1 keeps the base as the reference. With
    `history` > 1 (null: all iterates) pi_t becomes the window's mixture, in the sampler and in the reference.
    """

    alpha: Any = 0.5
    history: int | None = 1
    reference: ReferenceKind = ReferenceKind.arithmetic
    pairs: Pairs = Pairs.fresh

    def __post_init__(self) -> None:
        if not isinstance(self.alpha, str):  # an interpolation before Hydra resolves it
            self.alpha = per_iteration("regularizer.alpha", self.alpha, low=0.0, high=1.0)
        if self.history is not None and self.history < 1:
            raise ValueError(f"regularizer.history={self.history}: give a number of iterates from 1, or null for all")
        if self.history == 1 and (self.reference, self.pairs) != (ReferenceKind.arithmetic, Pairs.fresh):
            raise ValueError("regularizer.reference and regularizer.pairs have no effect while regularizer.history=1")

    def opponent(self, t: int) -> Opponent:
        members, alpha = window(t, self.history), at(self.alpha, t)
        parts = [(alpha, Iterate(0)), (1.0 - alpha, combine(self.reference, members))]
        return Opponent(sampler=uniform_sampler(members), reference=geometric(parts), pairs=self.pairs)

    def words(self) -> str:
        history = "" if self.history == 1 else f"-history{self.history or 'all'}"
        return f"alpha{words_of(self.alpha)}{history}"
