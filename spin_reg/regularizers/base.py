"""The control arm: static DPO against the base."""

from dataclasses import dataclass

from spin_reg.opponents import Iterate, Opponent, Regularizer


@dataclass
class Base(Regularizer):
    """Static DPO: answers from pi_0, given once, and reference log pi_0, whatever t. Shows what iterating is worth."""

    def opponent(self, t: int) -> Opponent:
        return Opponent(sampler=((0, 1.0),), reference=Iterate(0))
