"""Log-probs of answers under a causal language model: the one place where they are computed.

A batch has two blocks of columns: prompts, padded on the left, then responses, padded on the right. So responses
begin in the same column in every row, and the model need only make logits for the last columns. Positions are explicit
and count real tokens, so padding, batch order and batch companions change nothing (up to rounding).
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

POSITIONS = 64  # at which whole distributions are compared at a time


@dataclass(frozen=True)
class Batch:
    """B rows of prompt and response.

    Attributes:
        input_ids, attention_mask, position_ids: (B, P + R) int64; P and R are the longest prompt and response.
        response_ids: (B, R) int64, padded on the right with 0.
        response_mask: (B, R) bool, True on response tokens.
    """

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    response_ids: Tensor
    response_mask: Tensor

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))


def collate(prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> Batch:
    """Lay out rows of token ids; every prompt and every response has at least one token."""
    assert len(prompts) == len(responses) > 0
    assert all(map(len, prompts)) and all(map(len, responses)), "an empty prompt or response has no log-prob"
    rows, width_p, width_r = len(prompts), max(map(len, prompts)), max(map(len, responses))
    ids = torch.zeros((rows, width_p + width_r), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        row = slice(width_p - len(prompt), width_p + len(response))
        ids[i, row] = torch.tensor([*prompt, *response])
        mask[i, row] = 1
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    return Batch(ids, mask, positions, ids[:, width_p:], mask[:, width_p:].bool())


def takes(model: nn.Module, argument: str) -> bool:
    """Whether the forward of a model's class has this named argument (seen through wrappers and adapters)."""
    inner: Any = getattr(model, "module", model)
    if hasattr(inner, "get_base_model"):
        inner = inner.get_base_model()
    return argument in inspect.signature(type(inner).forward).parameters


def cache_name(model: nn.Module) -> str:
    """What a model's forward calls its cache of keys and values: newer releases of transformers have another name."""
    return "cache" if takes(model, "cache") else "past_key_values"


def token_logprobs(model: nn.Module, batch: Batch) -> Tensor:
    """log pi(y_j | x, y_<j) of every response token.

    Returns:
        (B, R) float32, nats; 0 on padding. Differentiable where grad is on.
    """
    logits = _predicting(model, batch).float()
    token_logits: Tensor = logits.gather(-1, batch.response_ids.unsqueeze(-1)).squeeze(-1)
    logprobs: Tensor = token_logits - logits.logsumexp(dim=-1)
    return logprobs.masked_fill(~batch.response_mask, 0.0)


def _predicting(model: nn.Module, batch: Batch) -> Tensor:
    """(B, R, V): the logits *before* each response token, which predict it."""
    width = batch.response_ids.shape[1]
    kept = {"logits_to_keep": width + 1} if takes(model, "logits_to_keep") else {}
    logits: Tensor = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        use_cache=False,
        **kept,
    ).logits
    return logits[:, -(width + 1) : -1]


def token_divergences(policy: nn.Module, other: nn.Module, batch: Batch) -> Tensor:
    """KL(policy || other) of the next token's distribution before every response token, over the whole vocabulary:
    sum_v p(v) (log p(v) - log q(v)).

    Returns:
        (B, R) float64, nats; 0 on padding.
    """
    made = [_predicting(model, batch) for model in (policy, other)]
    some = [slice(start, start + POSITIONS) for start in range(0, batch.response_ids.shape[1], POSITIONS)]
    kl = torch.cat([_divergence(*(logits[:, places] for logits in made)) for places in some], dim=1)
    return kl.masked_fill(~batch.response_mask, 0.0)


def _divergence(policy: Tensor, other: Tensor) -> Tensor:
    p, q = (logits.float().log_softmax(dim=-1) for logits in (policy, other))
    return (p.exp() * (p - q)).sum(dim=-1, dtype=torch.float64)


def sequence_logprobs(model: nn.Module, batch: Batch) -> Tensor:
    """log pi(y|x), the sum over response tokens (EOS included where the response has it).

    Returns:
        (B,) float64, nats.
    """
    return token_logprobs(model, batch).double().sum(dim=-1)
