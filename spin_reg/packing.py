"""The layout in which scoring and training read answers: a prompt once, its answers as branches behind it.

A row of the batch is one prompt with all its answers, [x | y_1 | y_2 ...]. Every branch sees the prompt and itself, not
the other branches, and counts its positions from the prompt's end, so each answer is read as if it stood alone. An
answer's last token predicts nothing and is left out. Rows of like length go together, as many as a budget of tokens
holds. Log-probs are those of `logprobs.token_logprobs`, the plain path, up to rounding.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Group:
    """A prompt and the answers to it that are read together, as token ids; none of them is empty."""

    prompt: Sequence[int]
    answers: tuple[Sequence[int], ...]

    @property
    def slots(self) -> int:
        """Tokens that the model reads: the prompt, and of every answer all but the last."""
        return len(self.prompt) + sum(len(answer) - 1 for answer in self.answers)


@dataclass(frozen=True)
class Packed:
    """B groups as rows of W slots; the n tokens of their answers in the order of groups and answers.

    Attributes:
        input_ids, position_ids: (B, W) int64, padded on the right; no padding is seen by a token.
        branch: (B, W) int64: 0 in the prompt, 1, 2 ... in the answers, -1 in the padding.
        before: (n,) int64, the flat slot (row * W + column) whose logits predict a token. targets: (n,) that token.
        causal: no row has a second branch, so that looking back is all a mask needs to say.
    """

    input_ids: Tensor
    position_ids: Tensor
    branch: Tensor
    before: Tensor
    targets: Tensor
    causal: bool


def pack(groups: Sequence[Group], device: torch.device | None = None) -> Packed:
    """Lay out groups of token ids, one a row."""
    assert groups and all(g.answers and len(g.prompt) and all(map(len, g.answers)) for g in groups), "nothing to score"
    width = max(group.slots for group in groups)
    ids, positions, branches = [], [], []
    before: list[int] = []
    targets: list[int] = []
    for row, group in enumerate(groups):
        tokens, places, of = list(group.prompt), list(range(len(group.prompt))), [0] * len(group.prompt)
        end = row * width + len(group.prompt) - 1  # the prompt's last token predicts the first of every answer
        for b, ids_of_answer in enumerate(group.answers, start=1):
            start = row * width + len(tokens)
            before += [end, *range(start, start + len(ids_of_answer) - 1)]
            targets += ids_of_answer
            tokens += ids_of_answer[:-1]
            places += range(len(group.prompt), len(group.prompt) + len(ids_of_answer) - 1)
            of += [b] * (len(ids_of_answer) - 1)
        padding = width - len(tokens)
        ids.append(tokens + [0] * padding)
        positions.append(places + [0] * padding)
        branches.append(of + [-1] * padding)
    made = [torch.tensor(values, device=device) for values in (ids, positions, branches, before, targets)]
    return Packed(made[0], made[1], made[2], made[3], made[4], causal=all(len(group.answers) == 1 for group in groups))


def visible(branch: Tensor) -> Tensor:
    """Which slots a slot sees: (B, W) branches -> (B, 1, W, W) bool, [.., i, j]: i sees j.

    What stands at or before it, in the prompt or in its own branch.
    """
    width = branch.shape[1]
    back = torch.ones((width, width), dtype=torch.bool, device=branch.device).tril()
    seer, seen = branch.unsqueeze(2), branch.unsqueeze(1)
    return (back & ((seen == 0) | (seen == seer))).unsqueeze(1)


def lengths(groups: Sequence[Group]) -> list[int]:
    """How many tokens each answer has, in the order of groups and answers."""
    return [len(answer) for group in groups for answer in group.answers]


def sums(logprobs: Tensor, groups: Sequence[Group]) -> Tensor:
    """log pi(y|x) of each of the A answers: (n,) token log-probs -> (A,) float64 sums, nats."""
    counts = torch.tensor(lengths(groups), device=logprobs.device)
    answer = torch.arange(len(counts), device=logprobs.device).repeat_interleave(counts)
    return torch.zeros(len(counts), dtype=torch.float64, device=logprobs.device).index_add(0, answer, logprobs.double())


def cut(lengths: Sequence[int], *, tokens: int, most: int | None = None) -> list[list[int]]:
    """Rows in batches of like length: positions, the shortest first.

    Args:
        lengths: slots of each row. tokens: a batch has at most so many slots, padding included (one row always fits).
        most: and at most so many rows.
    """
    batches: list[list[int]] = []
    room = math.inf if most is None else most
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if batches and len(batches[-1]) < room and (len(batches[-1]) + 1) * lengths[i] <= tokens:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches
