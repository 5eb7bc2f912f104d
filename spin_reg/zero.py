"""ZeRO by DeepSpeed (arXiv 1910.02054): each rank has the whole model, and a share of the optimizer, torch's own.

Stage 1 shares the optimizer's state, stage 2 the summed gradients too; stage 3 would share the weights, which is what
FSDP2 does in `sharing`. What is kept of it, in checkpoints and iterates, is whole: as one process would have it.
"""

import logging
import sys
from contextlib import redirect_stdout
from typing import Any

import torch
from torch import Tensor, nn

from spin_reg import ranks
from spin_reg.errors import ConfigError
from spin_reg.settings import Sharding

STAGES = {Sharding.zero1: 1, Sharding.zero2: 2}
BUCKET = 2**25  # gradients that are summed at a time: 128 MB


class Zero:
    """DeepSpeed's engine around a scorer and its optimizer; `fit` and `checkpoint` treat it as an optimizer.

    Attributes:
        scorer: what to call in place of the scorer.
        param_groups: as the optimizer had them: the one group of whole weights, and its learning rate.
    """

    def __init__(self, scorer: nn.Module, optimizer: torch.optim.Optimizer, sharding: Sharding, clip: float) -> None:
        self.param_groups = [dict(group) for group in optimizer.param_groups]
        self._sharding, self._optimizer = sharding, optimizer
        self._weights: list[nn.Parameter] = self.param_groups[0]["params"]
        self._reached: set[int] = set()  # weights that a gradient came to, in the step at hand
        self._idle: set[int] | None = None  # those that none ever came to
        for i, weight in enumerate(self._weights):
            weight.register_post_accumulate_grad_hook(lambda _, i=i: self._reached.add(i))
        settings = {
            "train_micro_batch_size_per_gpu": 1,  # of no effect: we say which backward is a step's last
            "gradient_clipping": clip,
            "zero_allow_untested_optimizer": True,  # RMSprop is one; all work by elements, so a flat share is as good
            "zero_optimization": {
                "stage": STAGES[sharding],
                "reduce_bucket_size": min(BUCKET, sum(p.numel() for p in self._weights)),
            },
        }
        with redirect_stdout(sys.stderr):  # the standard output is the command's
            start = _deepspeed().initialize
            self.scorer, *_ = start(model=scorer, optimizer=optimizer, config=settings, dist_init_required=False)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add a micro-batch's gradients, of which the mean over ranks is taken; all must have equally many.

        Args:
            last: it is the step's last one.
        """
        self.scorer.set_gradient_accumulation_boundary(last)
        self.scorer.backward(loss)

    def norm(self) -> float:
        """The norm of all gradients, infinite where one of them is no number; they are clipped in `step`."""
        return float(self.scorer.optimizer.scaled_global_norm())

    def step(self) -> None:
        """Make the step of torch's optimizer, which leaves alone a weight that no gradient has come to.

        In a flat share such a weight has gradient 0, and weight decay would move it; so it is put back.

        Raises:
            ConfigError: a weight has a gradient in some steps only.
        """
        from deepspeed.utils import safe_set_full_fp32_param

        self._idle = self._without_gradient()
        kept = [(self._weights[i], self._weights[i].detach().clone()) for i in self._idle]
        self._optimizer.param_groups[0]["lr"] = self.param_groups[0]["lr"]
        self.scorer.step()
        with torch.no_grad():
            for weight, value in kept:
                weight.copy_(value)
                safe_set_full_fp32_param(weight, value)

    def zero_grad(self) -> None:
        """Begin another step; the gradients themselves went in `step`."""
        self._reached.clear()

    def _without_gradient(self) -> set[int]:
        reached = set().union(*ranks.gathered(sorted(self._reached)))
        idle = set(range(len(self._weights))) - reached
        if self._idle is not None and idle != self._idle:
            named = {id(p): name for name, p in self.scorer.module.named_parameters()}
            names = [named[id(self._weights[i])] for i in sorted(idle ^ self._idle)]
            raise ConfigError(
                "A weight has a gradient in some steps only.",
                where=f"hardware.sharding={self._sharding}, {', '.join(names[:3])}",
                why="DeepSpeed counts steps for all weights together, and AdamW in one process for each",
                todo="use hardware.sharding=none or full",
            )
        return idle

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state as torch's has it in one process, on the main rank; the others help to gather it."""
        from deepspeed.utils import safe_get_full_optimizer_state

        entries: dict[int, dict[str, Any]] = {}
        for i, weight in enumerate(self._weights):
            if self._idle is not None and i in self._idle:
                continue
            for name, value in self._share().items():
                shared = not self._by_weight(value)
                found = value.clone() if shared else safe_get_full_optimizer_state(weight, name)
                if ranks.is_main():
                    entries.setdefault(i, {})[name] = found.cpu()
        return {"state": entries, "param_groups": self.param_groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from such a state, and from the weights that the model has by now."""
        from deepspeed.utils import safe_set_full_optimizer_state

        self.scorer.optimizer.refresh_fp32_params()
        self._make_state()
        for i, entries in state_dict["state"].items():
            for name, value in entries.items():
                there = self._share()[name]
                if self._by_weight(there):
                    safe_set_full_optimizer_state(self._weights[i], value.to(there.device), name)
                else:
                    there.copy_(value)
        self._idle = set(range(len(self._weights))) - set(state_dict["state"])

    def _make_state(self) -> None:
        """There is a state to write into once there was a step: one with gradients and a rate of 0 changes nothing."""
        rate, self._optimizer.param_groups[0]["lr"] = self._optimizer.param_groups[0]["lr"], 0.0
        self.backward(torch.stack([0.0 * p.sum() for p in self._weights]).sum(), last=True)
        self.scorer.step()
        self._optimizer.param_groups[0]["lr"] = rate
        self.zero_grad()

    def _share(self) -> dict[str, Tensor]:
        """This rank's share of the optimizer's state."""
        (flat,) = self._optimizer.param_groups[0]["params"]
        found: dict[str, Tensor] = self._optimizer.state[flat]
        return found

    def _by_weight(self, value: Tensor) -> bool:
        """Whether it has a number for each weight; else it is one for all."""
        (flat,) = self._optimizer.param_groups[0]["params"]
        return bool(value.shape == flat.shape)

    def release(self) -> None:
        """Give the main rank's model, which is saved, its weights back in memory of their own."""
        self.scorer.destroy()
        for weight in self._weights if ranks.is_main() else ():
            weight.data = weight.detach().clone()


def _deepspeed() -> Any:
    """The package, speaking on the standard error, also where it was imported before, and compiling nothing."""
    import deepspeed

    for handler in logging.getLogger("DeepSpeed").handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setStream(sys.stderr)
    deepspeed.ops.__compatible_ops__ = {}  # what it could compile, and on a CPU would as it starts, for its inference
    return deepspeed
