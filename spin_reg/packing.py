"""The layout in which scoring and training read answers: what rows begin with in common once, and no padding.

A batch is one row of T slots. A prompt with one of its answers is a branch [x | y], and a token has one slot for all
branches that are the same up to it: a prompt for its answers, a system prompt for all that begin with it. A slot sees
what stands before it on its branch, and its position counts from there, so each answer is read as if it stood alone:
attention unfolds the slots into one causal row an answer, all else reads a slot once. An answer's last token predicts
nothing and is left out. Log-probs are those of the plain path, `logprobs.token_logprobs`, up to rounding.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LIKE, FEW = 1.2, 16  # a row is like another that is this many times and tokens shorter
TILE = 16  # a row's length is a multiple of it: PyTorch sums a row's remainder by itself, so padding would change bits


@dataclass(frozen=True)
class Group:
    """A prompt and the answers to it that are read together, as token ids; none of them is empty."""

    prompt: Sequence[int]
    answers: tuple[Sequence[int], ...]

    @property
    def slots(self) -> int:
        """Tokens that the model reads at most: the prompt, and of every answer all but the last."""
        return len(self.prompt) + sum(len(answer) - 1 for answer in self.answers)

    @property
    def longest(self) -> int:
        """Tokens of the longest row that attention unfolds it into."""
        return len(self.prompt) + max(len(answer) for answer in self.answers) - 1


@dataclass(frozen=True)
class Packed:
    """Groups as one row of T slots; the n tokens of their A answers in the order of groups and answers.

    Attributes:
        input_ids, position_ids: (1, T) int64.
        before: (n,) int64, the slot whose logits predict a token. targets: (n,) that token.
        unfold: blocks of (rows, L) int64, rows of like length: the slots of every answer's own row, its prompt and
            itself, padded on the right. fold: (T,) int64, where in the flat blocks, one after the other, a slot stands
            (one that several rows share: in one of them).
        rows: the same A rows without padding, in the order of groups and answers.
    """

    input_ids: Tensor
    position_ids: Tensor
    before: Tensor
    targets: Tensor
    unfold: tuple[Tensor, ...]
    fold: Tensor
    rows: Sequence[Sequence[int]]


def pack(groups: Sequence[Group], device: torch.device | None = None) -> Packed:
    """Lay out groups of token ids, one after the other."""
    assert groups and all(g.answers and len(g.prompt) and all(map(len, g.answers)) for g in groups), "nothing to score"
    ids: list[int] = []
    positions: list[int] = []
    before: list[int] = []
    targets: list[int] = []
    rows: list[list[int]] = []
    slots: dict[tuple[int, int], int] = {}  # of a token, by the slot before it (at the beginning -1)

    def walk(tokens: Sequence[int], slot: int, position: int) -> list[int]:
        """The slots of tokens behind a slot, new ones where nothing came this way before."""
        way = []
        for place, token in enumerate(tokens, position):
            behind = slots.setdefault((slot, token), len(ids))
            if behind == len(ids):
                ids.append(token)
                positions.append(place)
            way.append(slot := behind)
        return way

    for group in groups:
        prompt = walk(group.prompt, -1, 0)
        for answer in group.answers:
            branch = walk(answer[:-1], prompt[-1], len(prompt))
            before += [prompt[-1], *branch]  # the prompt's last token predicts the first of every answer
            targets += answer
            rows.append(prompt + branch)
    blocks = _blocks(rows)
    fold = [0] * len(ids)
    for place, slot in enumerate(slot for block in blocks for row in block for slot in row):
        if slot >= 0:
            fold[slot] = place
    made = [torch.tensor(values, device=device) for values in ([ids], [positions], before, targets, fold)]
    unfold = tuple(torch.tensor(block, device=device).clamp(min=0) for block in blocks)
    return Packed(made[0], made[1], made[2], made[3], unfold, made[4], rows)


def _blocks(rows: Sequence[list[int]]) -> list[list[list[int]]]:
    """Rows of like length together, padded with -1: attention takes the square of what is longest.

    They are padded to whole tiles, so that an answer's log-probs are the same bits beside other answers, too.
    """
    blocks: list[list[list[int]]] = []
    for row in sorted(rows, key=len):
        if blocks and len(row) <= LIKE * len(blocks[-1][0]) + FEW:
            blocks[-1].append(row)
        else:
            blocks.append([row])
    widths = [math.ceil(len(block[-1]) / TILE) * TILE for block in blocks]
    return [[row + [-1] * (width - len(row)) for row in block] for block, width in zip(blocks, widths, strict=True)]


def lengths(groups: Sequence[Group]) -> list[int]:
    """How many tokens each answer has, in the order of groups and answers."""
    return [len(answer) for group in groups for answer in group.answers]


def sums(logprobs: Tensor, groups: Sequence[Group]) -> Tensor:
    """log pi(y|x) of each of the A answers: (n,) token log-probs -> (A,) float64 sums, nats."""
    counts = torch.tensor(lengths(groups), device=logprobs.device)
    answer = torch.arange(len(counts), device=logprobs.device).repeat_interleave(counts)
    return torch.zeros(len(counts), dtype=torch.float64, device=logprobs.device).index_add(0, answer, logprobs.double())


def cut(slots: Sequence[int], *, tokens: int, most: int | None = None) -> list[list[int]]:
    """Rows in batches of like length: positions, the shortest first.

    Args:
        slots: of each row. tokens: a batch has at most so many slots (one row always fits).
        most: and at most so many rows.
    """
    batches: list[list[int]] = []
    full, room = math.inf, math.inf if most is None else most
    for i in sorted(range(len(slots)), key=lambda i: slots[i]):
        if full + slots[i] <= tokens and len(batches[-1]) < room:
            batches[-1].append(i)
            full += slots[i]
        else:
            batches.append([i])
            full = slots[i]
    return batches
