"""Fictitious play: an opponent averaged over the iterates so far."""

from dataclasses import dataclass

from spin_reg.opponents import (
    Opponent,
    Pairs,
    ReferenceKind,
    Regularizer,
    combine,
    uniform_sampler,
    window,
)


@dataclass
class FictitiousPlay(Regularizer):
    """Fictitious play (arXiv 2404.04291): answers from a uniform draw over iterates 0..t, or the last `history`.

    The opponent is a mixed strategy, so its log-density, the arithmetic mixture, is the default reference; which one
    the paper uses could not be read.
    """

    history: int | None = None
    reference: ReferenceKind = ReferenceKind.arithmetic
    pairs: Pairs = Pairs.fresh

    def __post_init__(self) -> None:
        if self.history is not None and self.history < 1:
            raise ValueError(f"regularizer.history={self.history}: give a number of iterates from 1, or null for all")

    def opponent(self, t: int) -> Opponent:
        members = window(t, self.history)
        reference = combine(self.reference, members)
        return Opponent(sampler=uniform_sampler(members), reference=reference, pairs=self.pairs)

    def words(self) -> str:
        return "" if self.history is None else f"history{self.history}"
