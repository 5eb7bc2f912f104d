"""Drawing answers from a policy: what ended makes room for the next prompt, and every draw is keyed by its example.

The uniform number behind token j of an example's answer depends on (seed, round, example_id, j) alone, so batch size,
order and batch companions do not change the law of the answers.

The rows at hand are read by `decoder.Decoder`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from spin_reg import scorer
from spin_reg.decoder import Decoder
from spin_reg.errors import NonFiniteError
from spin_reg.fingerprint import seed_of
from spin_reg.products import laid_out

LEAVE = 0.75  # with no prompt waiting, rows are dropped once fewer than this share of them go on
REFILL = 8  # prompts come in once one row in so many is free
BLOCK = 256  # probabilities that are summed before any is looked at


@dataclass(frozen=True)
class Answer:
    """Token ids with the end token iff finish_reason is `stop`; `length` means cut off, with no end token.

    `logprobs`: nats, of each token in the distribution that it was drawn from.
    """

    ids: list[int]
    finish_reason: str
    logprobs: list[float] = field(compare=False)


def uniforms(seed: int, round_: int, example_id: str, split: str, count: int) -> Tensor:
    """The draws behind one answer: (count,) float64 in [0, 1)."""
    rng = np.random.default_rng(seed_of(seed, round_, example_id, "generate", split))
    return torch.from_numpy(rng.random(count))


def pick(logits: Tensor, points: Tensor, *, temperature: float, top_p: float) -> tuple[Tensor, Tensor]:
    """One token a row by the inverse of the cumulative distribution.

    Args:
        logits: (B, V). points: (B,) uniform in [0, 1).
        temperature: divides the logits; 0 takes the likeliest token, the first of equals, and uses no point.
        top_p: keep the smallest set of most likely tokens with at least this mass.

    Returns:
        (B,) int64 tokens, -1 where the logits are no distribution (a NaN, or nothing finite); and (B,) float64, the
        log-prob of each in the distribution that it was drawn from.
    """
    if temperature == 0:
        most, likeliest = logits.float().max(dim=-1)
        return likeliest.masked_fill(~most.isfinite(), -1), torch.zeros_like(most, dtype=torch.float64)
    made = [_drawn(logits[rows], points[rows], temperature, top_p) for rows in scorer.few_at_once(logits)]
    drawn, logprobs = (torch.cat(parts) for parts in zip(*made, strict=True))
    return drawn, logprobs


def _drawn(logits: Tensor, points: Tensor, temperature: float, top_p: float) -> tuple[Tensor, Tensor]:
    scaled = logits.float() if temperature == 1 else logits.float() / temperature
    mass = (scaled - scaled.amax(dim=-1, keepdim=True)).exp_()  # not normalised
    if top_p < 1:
        ordered, index = (mass / mass.sum(dim=-1, keepdim=True)).sort(dim=-1, descending=True, stable=True)
        outside = ordered.cumsum(dim=-1) - ordered >= top_p
        mass = torch.zeros_like(mass).scatter(-1, index, ordered.masked_fill(outside, 0.0))
    vocabulary, points = mass.shape[-1], points.to(mass.device).unsqueeze(-1)
    blocks = mass[:, : vocabulary // BLOCK * BLOCK].view(len(mass), -1, BLOCK).sum(dim=-1)
    blocks = torch.cat([blocks, mass[:, blocks.shape[1] * BLOCK :].sum(dim=-1, keepdim=True)], 1).double()
    upto = blocks.cumsum(dim=-1)
    total = upto[:, -1:]
    block = _first_above(upto, points * total)
    before = upto.gather(1, block) - blocks.gather(1, block)
    places = block * BLOCK + torch.arange(BLOCK, device=mass.device)
    inside = mass.gather(1, places.clamp(max=vocabulary - 1)).double().masked_fill(places >= vocabulary, 0.0)
    place = _first_above(inside.cumsum(dim=-1), points * total - before)
    drawn = places.gather(1, place).clamp(max=vocabulary - 1)  # where nothing is finite, places mean nothing
    logprob = mass.gather(1, drawn).double().log() - total.log()
    return drawn.squeeze(-1).masked_fill(~(total.squeeze(-1).isfinite()), -1), logprob.squeeze(-1)


def _first_above(cumulative: Tensor, target: Tensor) -> Tensor:
    """(B, 1): the first place whose cumulative mass is above the target, which rounding never puts past all mass."""
    below = torch.nextafter(cumulative[:, -1:], torch.zeros_like(target))
    place = torch.searchsorted(cumulative, torch.minimum(target, below), right=True)
    return place.clamp(max=cumulative.shape[-1] - 1)


def _nonfinite(names: Sequence[str], position: int) -> NonFiniteError:
    return NonFiniteError(
        "The logits are not finite.",
        where=f"token {position + 1} of the answers to {', '.join(names)}",
        why="the policy's weights or its arithmetic are broken; no token can be drawn",
        todo="look at the training curve of this iterate; try hardware.precision=fp32",
    )


@torch.no_grad()  # not inference mode, in which autocast keeps no cast weight
def sample(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    points: Tensor,
    *,
    ends: Sequence[int],
    temperature: float,
    top_p: float,
    batch_size: int | None = None,
    names: Sequence[str] = (),
    poll: Callable[[], None] = lambda: None,
    ended: Callable[[int], None] = lambda count: None,
) -> list[Answer]:
    """One answer a prompt.

    Args:
        prompts: B rows of token ids. points: (B, N) uniform draws, one a token; N is the longest answer.
        ends: the token ids that end an answer. batch_size: how many are answered at a time; None: all.
        names: the prompts' ids, for error messages. poll: called at every token.
        ended: told how many answers are whole.

    Raises:
        NonFiniteError: a logit is NaN, or none is finite: there is no distribution to draw from.
    """
    waiting = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)  # a later one always fits
    tokens: list[list[int]] = [[] for _ in prompts]
    logprobs: list[list[float]] = [[] for _ in prompts]
    reasons = ["length"] * len(prompts)
    longest, whole = points.shape[1], 0
    decoder = Decoder(model, prompts, max(map(len, prompts), default=0) + longest)
    size = min(batch_size or len(prompts), len(prompts)) if decoder.beside else 1
    with laid_out(model):
        while waiting or any(of is not None for of in decoder.rows):
            free, come = sum(of is None for of in decoder.rows), 0
            if free == len(decoder.rows):
                come = min(size, len(waiting))
                decoder.start(come)
            elif waiting and free * REFILL >= len(decoder.rows):
                come = free
            elif not waiting and len(decoder.rows) - free < LEAVE * len(decoder.rows):
                decoder.trim(leave=True)
            poll()
            picked, waiting = waiting[:come], waiting[come:]
            decoder.read([0 if of is None else tokens[of][-1] for of in decoder.rows], picked)
            of_rows = [0 if of is None else of for of in decoder.rows]  # a free row draws too; nobody looks
            places = [min(len(tokens[i]), longest - 1) for i in of_rows]
            drawn, logprob = pick(decoder.logits, points[of_rows, places], temperature=temperature, top_p=top_p)
            for row, (token, value) in enumerate(zip(drawn.tolist(), logprob.tolist(), strict=True)):
                i = decoder.rows[row]
                if i is None:
                    continue
                if token < 0:
                    raise _nonfinite([names[i] if names else str(i)], len(tokens[i]))
                tokens[i].append(token)
                logprobs[i].append(value)
                if token in ends or len(tokens[i]) == longest:
                    reasons[i] = "stop" if token in ends else "length"
                    decoder.rows[row] = None
                    whole += 1
                    ended(whole)
    return [Answer(*answer) for answer in zip(tokens, reasons, logprobs, strict=True)]
