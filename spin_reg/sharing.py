"""Several processes that train one model: each reads its share of a step's rows, and all make the same step.

Gradients are summed once a step, after all micro-batches, since ranks may have unequal numbers of them; with one model
over all ranks (FSDP2) each backward sums and scatters them, and every rank then takes as many turns as the busiest one.
"""

from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from spin_reg import errors, ranks
from spin_reg.errors import ConfigError, SpinRegError
from spin_reg.packing import cut
from spin_reg.settings import Sharding


def turns(
    rows: Sequence[int], slots: Callable[[int], int], *, tokens: int, most: int | None, world: int
) -> list[list[list[int]]]:
    """The micro-batches of each rank, the same number for all: those that a rank has less are empty.

    Rows are dealt by length, the longest first, so that ranks read about as much; with one rank they stay as they are.
    """
    dealt = sorted(rows, key=slots, reverse=True) if world > 1 else list(rows)
    found = []
    for rank in range(world):
        own = dealt[rank::world]
        found.append([[own[i] for i in picked] for picked in cut([slots(i) for i in own], tokens=tokens, most=most)])
    count = max(map(len, found))
    return [micros + [[]] * (count - len(micros)) for micros in found]


def agreed(check: Callable[[], None], poll: Callable[[], None] = lambda: None) -> None:
    """Raise on every rank what `check` raises on one, so that none waits for one that is gone."""
    if ranks.world() == 1:
        return check()
    error = None
    try:
        check()
    except SpinRegError as found:
        error = errors.told(found)
    for told in ranks.gathered(error, poll):
        if told is not None:
            raise errors.heard(told)


def totals(values: dict[str, float]) -> dict[str, float]:
    """Sums over the ranks, in their order; each rank has the same names, or none."""
    found: dict[str, float] = {}
    for part in ranks.gathered(values):
        for key, value in part.items():
            found[key] = found.get(key, 0.0) + value
    return found


def add_up(parameters: Sequence[nn.Parameter]) -> None:
    """Make each gradient the sum of all ranks'; what has none anywhere keeps none."""
    if ranks.world() == 1:
        return
    has = [i for i, p in enumerate(parameters) if p.grad is not None]
    waiting = []
    for i in sorted(set().union(*ranks.gathered(has))):
        p = parameters[i]
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        waiting.append(torch.distributed.all_reduce(p.grad, async_op=True))
    for handle in waiting:
        handle.wait()


def thin(sharding: Sharding, adapted: bool) -> bool:
    """Whether this rank may load a model's weights in whatever dtype they have: `shard` casts its share of them.

    An adapter over them is made in their dtype, so it must be the right one.
    """
    return sharding is Sharding.full and not adapted and not ranks.is_main()


def shard(scorer: nn.Module, model: PreTrainedModel, device: torch.device) -> None:
    """Lay every weight across the ranks (FSDP2): a layer is put together while it is at work, the rest for a pass.

    Layer by layer they are brought to the device, in the main rank's dtypes, and a rank's own part of them stays.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (ranks.world(),))
    wanted = _of_main(scorer)

    def cast(module: nn.Module) -> None:
        for p in module.parameters():
            if not sharded(p):
                p.data = p.data.to(wanted[id(p)])

    layers = set(getattr(model, "_no_split_modules", None) or ())
    for module in list(model.modules()):
        if type(module).__name__ in layers:
            cast(module)
            fully_shard(module, mesh=mesh)
    cast(scorer)
    fully_shard(scorer, mesh=mesh, reshard_after_forward=False)  # the head is read outside its own forward
    _allow_unequal(scorer)


def _of_main(scorer: nn.Module) -> dict[int, torch.dtype]:
    """The main rank's dtype of each weight, by its id; where one has read them in another, all take its buffers too,
    since some are made with a dtype in mind.
    """
    own = [str(p.dtype).removeprefix("torch.") for p in scorer.parameters()]
    told = ranks.from_main(own)
    if any(ranks.gathered(own != told)):
        buffers = list(scorer.buffers())
        for buffer, dtype in zip(buffers, ranks.from_main([str(b.dtype)[6:] for b in buffers]), strict=True):
            value = buffer.detach().to("cpu", getattr(torch, dtype)).contiguous()
            torch.distributed.broadcast(value.view(-1).view(torch.uint8), src=0)
            buffer.data = value.to(buffer.device)
    return {id(p): getattr(torch, dtype) for p, dtype in zip(scorer.parameters(), told, strict=True)}


def _allow_unequal(scorer: Any) -> None:
    """Ranks need not reach the same weights.

    Raises:
        ConfigError: torch cannot have that, and the model has experts that are modules of their own. Other weights that
            hang on what is read are not looked for: there FSDP2 of such a torch hangs.
    """
    if hasattr(scorer, "set_reduce_scatter_unused_params"):
        scorer.set_reduce_scatter_unused_params(True)
        return _watch(scorer)
    for name, module in scorer.named_modules():
        if name.endswith("experts") and isinstance(module, nn.ModuleList):
            raise ConfigError(
                "The model cannot be laid across processes.",
                where=f"hardware.sharding=full, {name}",
                why=f"where an expert has rows on one rank alone, FSDP2 of torch {torch.__version__} hangs or errs",
                todo="use torch 2.13 or later, or hardware.sharding=none",
            )


_reached: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()  # weights that a gradient came to, by scorer


def _watch(scorer: nn.Module) -> None:
    """Note each weight that a gradient comes to on this rank: FSDP sums zeros for the others.

    It comes to the whole weights, which a module has while it is at work, and not to the shares of them.
    """
    found, seen = _reached.setdefault(scorer, set()), set[int]()

    def hooked(module: nn.Module, prefix: str) -> None:
        for name, p in module.named_parameters(prefix):
            if p.requires_grad and not sharded(p) and id(p) not in seen:
                seen.add(id(p))
                register: Callable[..., object] = p.register_post_accumulate_grad_hook
                register(lambda _, name=name: found.add(name))

    for prefix, module in scorer.named_modules():
        if hasattr(module, "unshard"):
            module.register_forward_pre_hook(lambda module, _, prefix=prefix: hooked(module, prefix))


def drop_unreached(scorer: nn.Module) -> None:
    """Of weights that are laid across the ranks: what no rank has a gradient for keeps none, as in one process."""
    if scorer not in _reached:
        return
    named = [(name, p) for name, p in scorer.named_parameters() if p.requires_grad]
    idle = [i for i, (name, _) in enumerate(named) if name not in _reached[scorer]]
    for i in set.intersection(*map(set, ranks.gathered(idle))):
        named[i][1].grad = None
    _reached[scorer].clear()


def sharded(tensor: Tensor) -> bool:
    """Whether this rank has but a part of it."""
    return hasattr(tensor, "full_tensor")


def own(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor."""
    part: Tensor = getattr(tensor, "to_local", lambda: tensor)()
    return part


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor; of one that is laid across the ranks, all must ask for it at once."""
    found: Tensor = getattr(tensor, "full_tensor", lambda: tensor)()
    return found


def on_main(tensor: Tensor) -> Tensor:
    """All of a tensor on the main rank, beside a GPU where it would fill that; nothing of it on the others. Of one that
    is laid across the ranks, all must ask for it at once.
    """
    if not sharded(tensor):
        return tensor.contiguous()
    found = whole(tensor)
    return found.cpu().contiguous() if ranks.is_main() else found.new_empty(0)


def like(tensor: Tensor, value: Tensor) -> Tensor:
    """A whole value laid across the ranks as a tensor is."""
    if not sharded(tensor) or value.shape != tensor.shape:
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(tensor, DTensor)
    return distribute_tensor(value.to(tensor.device), tensor.device_mesh, tensor.placements)


def gather(model: nn.Module) -> None:
    """Put whole weights back into the main rank's model, which is then an ordinary one; tied weights stay tied."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, p in list(module._parameters.items()):
            if p is None or not sharded(p):
                continue
            if id(p) not in made:
                full = whole(p.detach())
                made[id(p)] = nn.Parameter(full.cpu(), requires_grad=p.requires_grad) if ranks.is_main() else p
            module._parameters[name] = made[id(p)]
