"""How a model reads rows, found out on a few short ones: beside others as by itself, and packed as plain.

An architecture that reads them otherwise gives wrong log-probs, and no error.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from spin_reg.errors import ConfigError
from spin_reg.logprobs import Batch, collate, token_logprobs
from spin_reg.packing import TILE, Group

LENGTH = TILE + 1  # of a row: as many tokens as packing pads to, and one that predicts nothing
NOISE = 4  # packed rows may differ from plain ones by so many times what these differ from themselves
# Padded rows may in the mean differ by such a share of the log-probs' spread; the latter in 16 or fewer bits, where
# rounding alone moves those of SmolLM2 on such odd tokens by 0.07 of it. A state that reads padding may move them by
# less: that is seen in float32 alone.
FAR = 0.01, 0.25
EXACT = 1e-5  # nats a token that rounding may move a log-prob in any case, however alike all of them are
Answered = tuple[Sequence[int], Sequence[float]]  # tokens and their log-probs


@dataclass(frozen=True)
class Rows:
    """What is read: groups, and others of which all but the first answer are the same."""

    groups: list[Group]
    others: list[Group]

    @property
    def prompts(self) -> list[Sequence[int]]:
        return [group.prompt for group in self.groups for _ in group.answers]

    @property
    def answers(self) -> list[Sequence[int]]:
        return [answer for group in self.groups for answer in group.answers]


def _rows(tokens: int) -> Rows:
    """Of the first tokens of a vocabulary of so many.

    Prompts whose lengths differ by six begin alike, so that their slots are shared; others do not.
    """
    kinds = min(6, tokens - 1)

    def group(prompt: int, *seeds: int) -> Group:
        row = [1 + (prompt + place * place) % kinds for place in range(prompt)]
        return Group(row, tuple([1 + (seed + i * i) % kinds for i in range(LENGTH - prompt)] for seed in seeds))

    groups = [group(n, 6 * n, 6 * n + 1) for n in (4, 3, 9)]
    return Rows(groups, [group(4, 2, 25), *groups[1:]])


@dataclass(frozen=True)
class Alone:
    """Log-probs of the tokens of every answer, each read by itself; and how far apart they are."""

    rows: Rows
    answers: list[Tensor]
    spread: float
    coarse: bool


@torch.no_grad()
def alone(model: PreTrainedModel, name: str) -> Alone:
    """Read every row by itself, and see that padding, and to be told positions, change nothing.

    Raises:
        ConfigError: they do.
    """
    rows = _rows(len(model.get_input_embeddings().weight))
    read = [by_itself(model, prompt, answer) for prompt, answer in zip(rows.prompts, rows.answers, strict=True)]
    every = torch.cat(read)
    found = Alone(rows, read, float(every.std()), next(model.parameters()).dtype != torch.float32)
    padded = token_logprobs(model, collate(rows.prompts, rows.answers).to(model.device))
    gap = float((torch.cat([row[: len(own)] for row, own in zip(padded, read, strict=True)]) - every).abs().mean())
    if gap > max(EXACT, _far(model) * found.spread):  # of weights that are no numbers others tell
        raise ConfigError(
            "This model does not read a row beside others as it reads it by itself.",
            where=name,
            why=f"padding moves a token's log-prob by {gap:.3g} nats in the mean; their spread is {found.spread:.3g}",
            todo="use another model: its answers would be drawn and scored otherwise than by itself",
        )
    return found


def by_itself(model: PreTrainedModel, prompt: Sequence[int], answer: Sequence[int]) -> Tensor:
    """(tokens,) float32: no padding, no mask, no positions, as the model's authors would read it."""
    ids = torch.tensor([[*prompt, *answer]], device=model.device)
    logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
    logprobs: Tensor = logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None]).squeeze(1)
    return logprobs


@torch.no_grad()
def draws(model: PreTrainedModel, name: str, draw: Callable[[Sequence[Sequence[int]]], Sequence[Answered]]) -> None:
    """See that answers are drawn from what the model says of them when it reads them by itself.

    Args:
        draw: some tokens after each of these prompts, drawn together, and their log-probs.

    Raises:
        ConfigError: they are not.
    """
    prompts = [group.prompt for group in _rows(len(model.get_input_embeddings().weight)).groups]
    found = list(zip(prompts, draw(prompts), strict=True))
    read = torch.cat([by_itself(model, prompt, tokens) for prompt, (tokens, _) in found]).cpu()
    gap = float((torch.tensor([value for _, (_, values) in found for value in values]) - read).abs().mean())
    if gap > max(EXACT, _far(model) * float(read.std())):
        raise ConfigError(
            "This model does not write as it reads.",
            where=name,
            why=f"token by token the log-probs of an answer are {gap:.3g} nats off in the mean; they spread by "
            f"{float(read.std()):.3g}",
            todo="use another model: its answers would not be drawn from what is scored and trained",
        )


def _far(model: PreTrainedModel) -> float:
    quantized = getattr(model.config, "quantization_config", None) is not None
    return FAR[next(model.parameters()).dtype != torch.float32 or quantized]


@torch.no_grad()
def packs(model: PreTrainedModel, alone: Alone, read: Callable[[Sequence[Group]], Tensor]) -> bool:
    """Packed rows give what plain ones give, and another branch's tokens change nothing at all.

    All rows are of one length, so that on most CPUs both sides round alike: what differs is how the model reads.

    Args:
        read: the tokens' log-probs of packed groups.
    """
    prompts, answers = alone.rows.prompts, alone.rows.answers
    packed, moved = read(alone.rows.groups), read(alone.rows.others)
    rows, longest = [[*p, *a] for p, a in zip(prompts, answers, strict=True)], max(map(len, prompts))
    batch: Batch = collate([row[:longest] for row in rows], [row[longest:] for row in rows])
    beside = token_logprobs(model, batch.to(model.device))
    noise = beside - torch.stack([own[longest - len(p) :] for own, p in zip(alone.answers, prompts, strict=True)])
    bound = 0.5 * min(1.0, alone.spread) if alone.coarse else 1e-4
    first = len(answers[0])
    near = _near(packed - torch.cat(alone.answers), noise, bound)
    return near and torch.equal(packed[first:], moved[first:])


def _near(gap: Tensor, noise: Tensor, bound: float) -> bool:
    """Whether a gap is within the bound, or no more than a few times that between the plain path and itself.

    GPUs, and some CPUs, round a row otherwise beside others: SmolLM2's log-probs in float32 by up to 1.3e-4 nats a
    token on an H200. A row that is read otherwise differs by far more than it does.
    """
    gap, noise = gap.abs(), noise.abs()
    return bool(gap.max() <= bound or gap.mean() <= NOISE * noise.mean().clamp(max=bound))


@torch.no_grad()
def plain_head(model: Any) -> bool:
    """Whether the head is given the last states, and the logits are what it makes of them, to the bit.

    Log-probs tell less: small logits are hardly changed by a cap, and small log-probs little by a scale.
    """
    seen: dict[str, Tensor] = {}

    def listen(module: nn.Module, given: tuple[Tensor, ...], made: Tensor) -> None:
        seen["given"], seen["made"] = given[0], made

    row: dict[str, Any] = {
        "input_ids": torch.ones((1, LENGTH), dtype=torch.long, device=model.device),
        "use_cache": False,
    }
    hook = model.get_output_embeddings().register_forward_hook(listen)
    try:
        logits = model(**row).logits
    finally:
        hook.remove()
    states = model.base_model(**row).last_hidden_state  # on a GPU not to the bit the same, read twice
    same = (seen["given"] - states).abs().max() <= 0.01 * states.abs().max()
    return bool(same) and torch.equal(logits.float(), seen["made"].float())
