"""The remedy known before: an opponent mixed from the two newest iterates."""

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
class MixtureOfTwo(Regularizer):
    """Half the answers from pi_t, half from pi_{t-1}; reference their arithmetic mixture.

    `reference=last pairs=union` is what SPIN's authors released: both iterates answer every prompt, and pi_t is the
    reference for all pairs.
    """

    reference: ReferenceKind = ReferenceKind.arithmetic
    pairs: Pairs = Pairs.fresh

    def opponent(self, t: int) -> Opponent:
        members = window(t, 2)
        reference = combine(self.reference, members)
        return Opponent(sampler=uniform_sampler(members), reference=reference, pairs=self.pairs)
