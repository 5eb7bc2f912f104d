"""Plain SPIN."""

from dataclasses import dataclass

from spin_reg.opponents import Iterate, Opponent, Regularizer


@dataclass
class Plain(Regularizer):
    """SPIN (arXiv 2401.01335, eq. 4.7): answers from pi_t, reference log pi_t."""

    def opponent(self, t: int) -> Opponent:
        return Opponent(sampler=((t, 1.0),), reference=Iterate(t))
