"""Drawing answers from a policy: a KV cache, finished rows leave, and every draw is keyed by its example.

The uniform number behind token j of an example's answer depends on (seed, round, example_id, j) alone, so batch size,
order and batch companions do not change the law of the answers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from spin_reg.errors import NonFiniteError
from spin_reg.fingerprint import seed_of
from spin_reg.logprobs import takes

LEAVE = 0.75  # rows are dropped from the batch once fewer than this share of them go on


@dataclass(frozen=True)
class Answer:
    """Token ids with the end token iff finish_reason is `stop`; `length` means cut off, with no end token."""

    ids: list[int]
    finish_reason: str


def uniforms(seed: int, round_: int, example_id: str, split: str, count: int) -> Tensor:
    """The draws behind one answer: (count,) float64 in [0, 1)."""
    rng = np.random.default_rng(seed_of(seed, round_, example_id, "generate", split))
    return torch.from_numpy(rng.random(count))


def pick(logits: Tensor, points: Tensor, *, temperature: float, top_p: float) -> Tensor:
    """One token a row by the inverse of the cumulative distribution.

    Args:
        logits: (B, V). points: (B,) uniform in [0, 1).
        temperature: divides the logits. top_p: keep the smallest set of most likely tokens with at least this mass.

    Returns:
        (B,) int64; -1 where the logits are no distribution (a NaN, or nothing finite).
    """
    p = torch.softmax(logits.float() / temperature, dim=-1)
    if top_p < 1:
        ordered, index = p.sort(dim=-1, descending=True, stable=True)
        outside = ordered.cumsum(dim=-1) - ordered >= top_p
        p = p.scatter(-1, index, ordered.masked_fill(outside, 0.0))
    cumulative = p.double().cumsum(dim=-1)
    target = points.to(cumulative.device).unsqueeze(-1) * cumulative[:, -1:]
    drawn = torch.searchsorted(cumulative, target, right=True).squeeze(-1)
    drawn = drawn.clamp(max=logits.shape[-1] - 1)
    return drawn.masked_fill(~cumulative[:, -1].isfinite(), -1)


def _nonfinite(names: Sequence[str], position: int) -> NonFiniteError:
    return NonFiniteError(
        "The logits are not finite.",
        where=f"token {position + 1} of the answers to {', '.join(names)}",
        why="the policy's weights or its arithmetic are broken; no token can be drawn",
        todo="look at the training curve of this iterate; try hardware.precision=fp32",
    )


@torch.inference_mode()
def sample(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    points: Tensor,
    *,
    ends: Sequence[int],
    temperature: float,
    top_p: float,
    names: Sequence[str] = (),
    poll: Callable[[], None] = lambda: None,
) -> list[Answer]:
    """One answer a prompt.

    Args:
        prompts: B rows of token ids. points: (B, N) uniform draws, one a token; N is the longest answer.
        ends: the token ids that end an answer.
        names: the prompts' ids, for error messages. poll: called at every token.

    Raises:
        NonFiniteError: a logit is NaN, or none is finite: there is no distribution to draw from.
    """
    device = model.device
    ids, mask = _left_padded(prompts)
    ids, mask = ids.to(device), mask.to(device)
    last = takes(model, "logits_to_keep")
    answers: list[list[int]] = [[] for _ in prompts]
    reasons = ["length"] * len(prompts)
    rows = list(range(len(prompts)))  # which prompt each row of the batch answers
    open_rows = [True] * len(prompts)
    cache = DynamicCache(config=model.config)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    for j in range(points.shape[1]):
        poll()
        out = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            **({"logits_to_keep": 1} if last else {}),
        )
        drawn = pick(out.logits[:, -1], points[rows, j], temperature=temperature, top_p=top_p)
        broken = [row for row, token in zip(rows, drawn.tolist(), strict=True) if token < 0]
        if broken:
            raise _nonfinite([names[i] if names else str(i) for i in broken], j)
        for b, token in enumerate(drawn.tolist()):
            if open_rows[b]:
                answers[rows[b]].append(token)
                if token in ends:
                    reasons[rows[b]], open_rows[b] = "stop", False
        if not any(open_rows):
            break
        mask = torch.cat([mask, mask.new_ones((len(rows), 1))], dim=1)
        positions = positions[:, -1:] + 1
        ids = drawn.unsqueeze(-1)
        if sum(open_rows) < LEAVE * len(rows):
            staying = [b for b, goes_on in enumerate(open_rows) if goes_on]
            keep = torch.tensor(staying, device=device)
            cache.batch_select_indices(keep)
            ids, mask, positions = ids[keep], mask[keep], positions[keep]
            rows, open_rows = [rows[b] for b in staying], [True] * len(staying)
    return [Answer(a, r) for a, r in zip(answers, reasons, strict=True)]


def _left_padded(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    width = max(map(len, prompts))
    ids = torch.zeros((len(prompts), width), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, prompt in enumerate(prompts):
        ids[i, width - len(prompt) :] = torch.tensor(prompt)
        mask[i, width - len(prompt) :] = 1
    return ids, mask
