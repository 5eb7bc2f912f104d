"""Attention over slots that hold prompts with several answers: PyTorch's own, on one causal row an answer.

Queries, keys and values are made of every slot once, with the positions of `packing.Packed`; only here a prompt's are
copied to each of its answers. So no mask is needed, and the kernels that skip what a causal row does not see are used.
On a CPU they may be those of float32 where the rest is in bfloat16.

While answers are drawn, rows of a cache have one query each; columns that none of some rows sees are not read. Slots of
prompts that come in stand before them, and see their own prompt alone.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from spin_reg.columns import Coming
from spin_reg.packing import Packed
from spin_reg.products import fits, slow

NAME = "branches"


@dataclass(frozen=True)
class Newest:
    """Slots of prompts, then the newest token of every row of a cache, which has one query each.

    Attributes:
        blocks: of rows, and the first column that any row of each sees; none where no newest token is read.
        seen: (rows, 1, 1, columns) bool, what each row sees.
        prompts: the slots before the newest tokens, and where in the cache their states lie.
    """

    blocks: tuple[tuple[slice, int], ...]
    seen: Tensor
    prompts: tuple[Packed, Coming] | None = None
    _masks: dict[tuple[torch.dtype, int], list[tuple[slice, int, Tensor]]] = field(
        init=False, repr=False, compare=False, default_factory=dict
    )

    def reads(self, key: Tensor) -> list[tuple[slice, int, Tensor]]:
        """Of each block its rows, the first of the layer's columns that it reads, and what is added to scores there.
        The layer may have the newest columns alone. Made once for all layers that are alike.
        """
        dtype, columns = key.dtype, key.shape[2]
        if (dtype, columns) not in self._masks:
            unseen = self.seen.shape[-1] - columns
            added = torch.zeros(self.seen.shape, dtype=dtype, device=key.device).masked_fill_(~self.seen, -torch.inf)
            blocks = [(rows, max(first, unseen)) for rows, first in self.blocks]
            self._masks[dtype, columns] = [
                (rows, first - unseen, added[rows, ..., first:].contiguous()) for rows, first in blocks
            ]
        return self._masks[dtype, columns]


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    branches: Packed | Newest | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers' `sdpa` does, on unfolded rows or in blocks of rows where `branches` says so.

    Args:
        query: (B, heads, T, D). key, value: (B, key heads, columns, D). B is 1 of a `Packed`; of a `Newest` it is 1 in
            queries, and in keys and values, which are the cache's, the number of rows.

    Returns:
        (B, T, heads, D), and no weights.
    """
    if branches is None:
        made, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return made, None
    if isinstance(branches, Newest):
        made = list(_over_cache(module, query, key, value, branches, **kwargs))
        return torch.cat(made, dim=1) if len(made) > 1 else made[0], None
    made = []
    parts = (query, key, value)
    wide = any(slow(states) for states in parts)
    with torch.autocast("cpu", enabled=False) if wide else nullcontext():
        slots = [states.bfloat16().float() for states in parts] if wide else parts  # autocast rounds all of them
        for unfold in branches.unfold:
            unfolded = [_unfolded(states, unfold) for states in slots]
            block, _ = sdpa_attention_forward(module, *unfolded, None, **kwargs)
            made.append(block.flatten(0, 1))
    return torch.cat(made).index_select(0, branches.fold).unsqueeze(0).to(query.dtype), None


def _over_cache(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, newest: Newest, **kwargs: Any
) -> Iterator[Tensor]:
    """(1, slots, heads, D) of prompts, and of each block of rows."""
    start = 0
    if newest.prompts is not None:
        packed, coming = newest.prompts
        start, used = packed.input_ids.shape[1], newest.seen.shape[-1]
        keys, values = coming.of(key, used), coming.of(value, used)
        yield attend(module, query[:, :, :start], keys, values, None, packed, **kwargs)[0]
    queries = query[0, :, start:].transpose(0, 1).unsqueeze(2)
    simple = kwargs.get("position_bias") is None and fits(query.device, query.dtype)
    own = simple and query.dtype == key.dtype == torch.float32  # in bfloat16 its scores would be rounded
    by = _one_query if own else sdpa_attention_forward
    if simple and not own and query.shape[1] == key.shape[1]:
        queries = queries.expand(-1, -1, 2, -1)  # PyTorch's kernel in bfloat16 takes less time for two than for one
    for rows, first, mask in newest.reads(key):
        seen = (queries[rows], key[rows, :, first:], value[rows, :, first:], mask)
        yield by(module, *seen, **kwargs)[0][:, :1].transpose(0, 1)


def _one_query(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The same for one query a row, as two products that read keys and values once for all heads that share them.

    On a CPU the kernel behind `sdpa` takes twice as long: it is made for many queries.
    """
    rows, heads, columns, width = key.shape
    queries = query.reshape(rows * heads, -1, width)
    products = torch.bmm(key.flatten(0, 1), queries.mT)  # the other way round takes longer
    scores = products.mT.contiguous().view(rows, heads, -1, columns)
    weights = torch.add(mask, scores, alpha=width**-0.5 if scaling is None else scaling).softmax(dim=-1)
    made = torch.bmm(weights.flatten(0, 1), value.flatten(0, 1))
    return made.view(rows, 1, -1, value.shape[-1]), None


def _unfolded(states: Tensor, unfold: Tensor) -> Tensor:
    """(1, heads, T, D) -> (rows, heads, L, D)."""
    slots = states[0].transpose(0, 1)
    return slots.index_select(0, unfold.flatten()).view(*unfold.shape, *slots.shape[1:]).transpose(1, 2)


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
