"""Attention over slots that hold prompts with several answers: PyTorch's own, on one causal row an answer.

Queries, keys and values are made of every slot once, with the positions of `packing.Packed`; only here a prompt's are
copied to each of its answers. So no mask is needed, and the kernels that skip what a causal row does not see are used.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from spin_reg.packing import Packed

NAME = "branches"


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    branches: Packed | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers' `sdpa` does, on unfolded rows where `branches` says so.

    Args:
        query: (B, heads, T, D). key, value: (B, key heads, T, D); B is 1 where `branches` is given.

    Returns:
        (B, T, heads, D), and no weights.
    """
    if branches is None:
        made, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return made, None
    made = []
    for rows in branches.unfold:
        unfolded = [_unfolded(states, rows) for states in (query, key, value)]
        block, _ = sdpa_attention_forward(module, *unfolded, None, **kwargs)
        made.append(block.flatten(0, 1))
    return torch.cat(made).index_select(0, branches.fold).unsqueeze(0), None


def _unfolded(states: Tensor, unfold: Tensor) -> Tensor:
    """(1, heads, T, D) -> (rows, heads, L, D)."""
    slots = states[0].transpose(0, 1)
    return slots.index_select(0, unfold.flatten()).view(*unfold.shape, *slots.shape[1:]).transpose(1, 2)


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
