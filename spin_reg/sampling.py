"""Drawing answers from a policy: what ended makes room for the next prompt, and every draw is keyed by its example.

The uniform number behind token j of an example's answer depends on (seed, round, example_id, j) alone, so batch size,
order and batch companions do not change the law of the answers.

All rows of a batch stand with their newest token in one column, so a prompt that comes in later is laid to the left of
that column, over what the row before it left behind. A prompt goes through the model once; its states stay in a cache
that is written in place.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from spin_reg import scorer
from spin_reg.branches import Newest
from spin_reg.columns import ROOM, Columns, empty
from spin_reg.errors import NonFiniteError
from spin_reg.fingerprint import seed_of
from spin_reg.logprobs import cache_name, takes
from spin_reg.packing import Group, cut, pack
from spin_reg.products import laid_out

LEAVE = 0.75  # with no prompt waiting, rows are dropped once fewer than this share of them go on
REFILL = 8  # prompts come in once one row in so many is free
PREFILL = 4096  # prompt tokens that go through the model at once
TOGETHER = 16  # rows of which attention on a CPU reads the columns from the first that one of them sees
NEARBY = 8  # such rows may be read together with others that see so many columns more
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


class _Decoder:
    """The rows that are being answered: which prompt each answers, its cache, and the logits of its next token."""

    def __init__(self, model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> None:
        self.model, self.prompts = model, prompts
        self.packs = scorer.reads_packed(model)
        self.cache_name = cache_name(model)
        self.last = {"logits_to_keep": 1} if takes(model, "logits_to_keep") else {}
        self.rows: list[int | None] = []  # the prompt that each row answers; None: the row is free
        self.first: list[int] = []  # the column where each row's prompt begins
        self.mask = self.positions = self.logits = torch.empty(0)
        self.cache = Cache(layers=[])

    def start(self, picked: Sequence[int]) -> None:
        """Begin with these prompts, a row each."""
        self.rows, self.first = [None] * len(picked), [0] * len(picked)
        self.mask = self.positions = torch.empty(0)
        self.fill(picked)

    def fill(self, picked: Sequence[int]) -> None:
        """Put prompts into free rows; none is longer than the first ones were."""
        free = [row for row, of in enumerate(self.rows) if of is None]
        widest = max(len(self.prompts[i]) for i in picked)
        if len(self.mask):
            self.trim(leave=False, room=widest)
        if not len(self.mask):
            device = self.model.device
            self.mask = torch.zeros((len(self.rows), widest), dtype=torch.long, device=device)
            self.positions = torch.zeros((len(self.rows), 1), dtype=torch.long, device=device)
            self.cache = Cache(layers=[])
        for some in cut([len(self.prompts[i]) for i in picked], tokens=PREFILL):
            taken = [free.pop(0) for _ in some]
            self._prefill(taken, [picked[i] for i in some])

    def _prefill(self, taken: list[int], picked: list[int]) -> None:
        prompts, columns = [self.prompts[i] for i in picked], self.mask.shape[1]
        if len(self.rows) == 1:  # nothing to lay beside others: any kind of cache will do
            self.cache = DynamicCache(config=self.model.config)
            self.logits, self.mask = self._padded(prompts, self.cache)
        else:
            cache = DynamicCache()
            logits, of, states = self._read(prompts, cache)
            if not self.cache.layers:
                self.cache = Cache(layers=[empty(layer, len(self.rows), columns) for layer in cache.layers])
                self.logits = logits.new_zeros((len(self.rows), logits.shape[1]))
            lengths = torch.tensor([len(prompt) for prompt in prompts])
            rows = torch.tensor(taken).repeat_interleave(lengths).to(states.device)
            there = torch.cat([torch.arange(columns - n, columns) for n in lengths.tolist()]).to(states.device)
            for layer, made in zip(self.cache.layers, cache.layers, strict=True):
                assert isinstance(layer, Columns)
                layer.put(rows, there, *(part.transpose(1, 2)[of, states] for part in (made.keys, made.values)))
            self.logits[taken] = logits
        for row, i, prompt in zip(taken, picked, prompts, strict=True):
            self.rows[row], self.first[row] = i, columns - len(prompt)
            self.mask[row, : self.first[row]], self.mask[row, self.first[row] :] = 0, 1
            self.positions[row] = len(prompt)

    def _read(self, prompts: Sequence[Sequence[int]], cache: Cache) -> tuple[Tensor, Tensor, Tensor]:
        """The logits after each prompt; and where in the cache the states of all their tokens lie: rows and columns."""
        if self.packs and max(map(len, prompts)) < scorer.window(self.model):
            packed = pack([Group(prompt, ([0],)) for prompt in prompts], self.model.device)
            states = torch.tensor(list(chain(*packed.rows)), device=self.model.device)
            return scorer.packed_logits(self.model, packed, cache), torch.zeros_like(states), states
        logits, mask = self._padded(prompts, cache)
        of, states = mask.nonzero(as_tuple=True)
        return logits, of, states

    def _padded(self, prompts: Sequence[Sequence[int]], cache: Cache) -> tuple[Tensor, Tensor]:
        ids, mask = (made.to(self.model.device) for made in _left_padded(prompts))
        return self._forward(ids, mask, (mask.cumsum(dim=1) - 1).clamp(min=0), cache), mask

    def step(self, tokens: Tensor) -> None:
        """Read the (B,) tokens that were drawn."""
        self.mask = torch.cat([self.mask, self.mask.new_ones((len(self.rows), 1))], dim=1)
        seen = {"branches": self._newest()} if self.packs else {}
        self.logits = self._forward(tokens.unsqueeze(-1), self.mask, self.positions, self.cache, **seen)
        going = [[of is not None] for of in self.rows]  # the positions of free rows stay where they are allowed
        self.positions = (self.positions + 1) * torch.tensor(going, device=self.positions.device)

    def _newest(self) -> Newest:
        """Rows in blocks, on a GPU in one: those that came in together are of like length, the longest first. Blocks
        that see almost the same columns are one.
        """
        columns = self.mask.shape[1]
        found: list[tuple[slice, int]] = []
        together = TOGETHER if self.mask.device.type == "cpu" else len(self.rows)
        for start in range(0, len(self.rows), together):
            rows = slice(start, start + together)
            going = (first for first, of in zip(self.first[rows], self.rows[rows], strict=True) if of is not None)
            first = min(going, default=columns - 1)
            if found and abs(first - found[-1][1]) <= NEARBY:
                before, other = found.pop()
                rows, first = slice(before.start, rows.stop), min(first, other)
            found.append((rows, first))
        return Newest(tuple(found))

    def _forward(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: Cache, **seen: Newest) -> Tensor:
        out = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            use_cache=True,
            **{self.cache_name: cache},
            **self.last,
            **seen,
        )
        logits: Tensor = out.logits[:, -1]
        return logits

    def trim(self, *, leave: bool, room: int = 0) -> None:
        """Give up the columns that no answer at hand looks at, but for `room`, and with `leave` the free rows."""
        going = torch.tensor([of is not None for of in self.rows], device=self.mask.device)
        first = int(self.mask[going].any(dim=0).int().argmax())
        first = max(0, min(first, self.mask.shape[1] - room))
        if not leave and first < ROOM:
            return  # not worth the copies
        rows = going.nonzero().squeeze(1) if leave else torch.arange(len(going), device=going.device)
        for layer in self.cache.layers:
            if isinstance(layer, Columns):
                layer.trim(rows, first)
        self.mask, self.positions, self.logits = self.mask[rows, first:], self.positions[rows], self.logits[rows]
        self.first = [self.first[row] - first for row in rows.tolist()]
        self.rows = [self.rows[row] for row in rows.tolist()]


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
    size = min(batch_size or len(prompts), len(prompts)) if _lays_beside(model) else 1
    tokens: list[list[int]] = [[] for _ in prompts]
    logprobs: list[list[float]] = [[] for _ in prompts]
    reasons = ["length"] * len(prompts)
    longest, whole, decoder = points.shape[1], 0, _Decoder(model, prompts)
    with laid_out(model):
        while waiting or any(of is not None for of in decoder.rows):
            free = sum(of is None for of in decoder.rows)
            if free == len(decoder.rows):
                picked, waiting = waiting[:size], waiting[size:]
                decoder.start(picked)
            elif waiting and free * REFILL >= len(decoder.rows):
                picked, waiting = waiting[:free], waiting[free:]
                decoder.fill(picked)
            elif not waiting and len(decoder.rows) - free < LEAVE * len(decoder.rows):
                decoder.trim(leave=True)
            poll()
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
            if any(of is not None for of in decoder.rows):
                decoder.step(drawn.clamp(min=0))
    return [Answer(*answer) for answer in zip(tokens, reasons, logprobs, strict=True)]


def _lays_beside(model: PreTrainedModel) -> bool:
    """Whether the states of rows can be laid side by side, with padding: those of attention can, recurrent ones not."""
    layers = DynamicCache(config=model.config).layers
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)


def _left_padded(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    width = max(map(len, prompts))
    ids = torch.zeros((len(prompts), width), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, prompt in enumerate(prompts):
        ids[i, width - len(prompt) :] = torch.tensor(prompt)
        mask[i, width - len(prompt) :] = 1
    return ids, mask
