"""The rows that are being answered: their cache, and passes that bring every row's next logits.

All rows of a batch stand with their newest token in one column, so a prompt that comes in later is laid to the left of
that column, over what the row before it left behind. A prompt goes through the model once; its states stay in a cache
that is written in place.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from spin_reg import scorer
from spin_reg.branches import Newest
from spin_reg.columns import ROOM, Columns, Coming, Slots, empty
from spin_reg.errors import ConfigError
from spin_reg.logprobs import cache_name, takes
from spin_reg.packing import Group, cut, pack

PREFILL = 4096  # prompt tokens that go through the model at once
TOGETHER = 16  # rows of which attention on a CPU reads the columns from the first that one of them sees
NEARBY = 8  # such rows may be read together with others that see so many columns more


class Decoder:
    """The rows that are being answered: which prompt each answers, its cache, and the logits of its next token.

    A pass reads the newest token of every row together with the prompts that come in, as one row of slots: the last
    token of a prompt is its row's newest one, those before it are packed. Models that read no packed rows, or none as
    long as a prompt, read the newest tokens and then the prompts, padded.

    Args:
        longest: tokens that a row may come to have.

    Raises:
        ConfigError: the model takes no cache, or reads no padded rows (`scorer.reads_packed`).

    Attributes:
        beside: whether the states of rows can be laid side by side: those of attention can, recurrent ones not.
    """

    def __init__(self, model: PreTrainedModel, prompts: Sequence[Sequence[int]], longest: int) -> None:
        self.model, self.prompts = model, prompts
        self.layers = DynamicCache(config=model.config).layers  # as transformers would keep them
        packs = scorer.reads_packed(model)
        chunks = getattr(scorer.text_config(model), "attention_chunk_size", None)
        short = max(map(len, prompts), default=0) < scorer.window(model) and longest < (chunks or math.inf)
        self.beside = all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in self.layers)
        self.packs = packs and short and self.beside
        self.named = cache_name(model)
        if not takes(model, self.named):
            raise ConfigError(
                "Answers of this model cannot be drawn.",
                where=type(model).__name__,
                why="it takes no cache from outside: it keeps what it has read in one of its own, or does not keep it",
                todo="use another model, or another release of transformers, where it may take one",
            )
        self.last = {"logits_to_keep": 1} if takes(model, "logits_to_keep") else {}
        self.rows: list[int | None] = []  # the prompt that each row answers; None: the row is free
        self.first: list[int] = []  # the column where each row's prompt begins
        self.mask = self.positions = self.logits = torch.empty(0)
        self.cache = Cache(layers=[])

    def start(self, rows: int) -> None:
        """Begin anew, with so many free rows."""
        self.rows, self.first, self.cache = [None] * rows, [0] * rows, Cache(layers=[])

    def read(self, tokens: Sequence[int], picked: Sequence[int]) -> None:
        """Read the newest token of every row, and put prompts into free ones; none is longer than the first ones were.

        tokens: one a row, of a free one any.
        """
        free = [row for row, of in enumerate(self.rows) if of is None]
        coming = list(zip(free, picked, strict=False))
        if self.packs:
            self._slots(tokens, coming)
            return
        if len(free) < len(self.rows):
            self._step(tokens)
        if coming:
            self._room(max(len(self.prompts[i]) for i in picked))
            for some in cut([len(self.prompts[i]) for i in picked], tokens=PREFILL):
                self._fill([coming[place] for place in some])

    def _room(self, columns: int) -> None:
        """Have at least so many columns, the newest to the right; at the beginning they are free."""
        if self.cache.layers:
            self.trim(leave=False, room=columns)
        else:
            self.mask = torch.zeros((len(self.rows), columns), dtype=torch.long, device=self.model.device)
            self.positions = torch.zeros((len(self.rows), 1), dtype=torch.long, device=self.model.device)

    def _take(self, coming: Sequence[tuple[int, int]]) -> None:
        """Have prompts end in the newest column, each in its row."""
        columns = self.mask.shape[1]
        for row, i in coming:
            self.rows[row], self.first[row] = i, columns - len(self.prompts[i])
        rows = torch.tensor([row for row, _ in coming], dtype=torch.long, device=self.mask.device)
        first = torch.tensor([[self.first[row]] for row, _ in coming], device=rows.device)
        self.mask[rows] = (torch.arange(columns, device=rows.device) >= first).long()
        self.positions[rows] = columns - 1 - first

    def _grow(self) -> None:
        """Have one more column, the newest; the positions of free rows stay where they are allowed."""
        self.mask = torch.cat([self.mask, self.mask.new_ones((len(self.rows), 1))], dim=1)
        going = [[of is not None] for of in self.rows]
        self.positions = (self.positions + 1) * torch.tensor(going, device=self.positions.device)

    def _slots(self, tokens: Sequence[int], coming: Sequence[tuple[int, int]]) -> None:
        before = max((len(self.prompts[i]) for _, i in coming), default=1) - 1
        self._room(before)
        if not self.cache.layers:
            windows = [getattr(layer, "sliding_window", None) for layer in self.layers]
            self.cache = Cache(layers=[empty(len(self.rows), before, window) for window in windows])
        self._grow()
        newest = list(tokens)
        for row, i in coming:
            newest[row] = self.prompts[i][-1]
        if coming:
            self._take(coming)
        begun = [(row, self.prompts[i][:-1]) for row, i in coming if len(self.prompts[i]) > 1]
        parts = [[begun[place] for place in some] for some in cut([len(ids) for _, ids in begun], tokens=PREFILL)]
        for part in parts[:-1]:
            self._pass([], part)
        self.logits = self._pass(newest, parts[-1] if parts else [])

    def _pass(self, newest: Sequence[int], begun: Sequence[tuple[int, Sequence[int]]]) -> Tensor:
        """Read slots: of the beginnings of prompts, each with its row, then the newest tokens, after which come the
        logits, (rows, V).
        """
        device, prompts = self.model.device, None
        ids = torch.tensor([newest], dtype=torch.long, device=device)
        positions = self.positions.T[:, : len(newest)]
        if begun:
            packed = pack([Group(tokens, ([0],)) for _, tokens in begun], device)
            ids, positions = torch.cat([packed.input_ids, ids], 1), torch.cat([packed.position_ids, positions], 1)
            prompts = (packed, self._coming([row for row, _ in begun], packed.rows))
        for layer in self.cache.layers:
            assert isinstance(layer, Columns)
            layer.slots = Slots(prompts and prompts[1], newest=bool(newest))
            layer.widen(self.mask.shape[1])
        seen = Newest(self._blocks() if newest else (), self.mask.bool()[:, None, None], prompts)
        states, head = scorer.slot_states(self.model, ids, positions, seen, self.cache)
        logits: Tensor = head(states[len(states) - len(newest) :])
        return logits

    def _coming(self, rows: Sequence[int], slots: Sequence[Sequence[int]]) -> Coming:
        """Where the slots of the beginnings of prompts go, which stand left of the newest column."""
        of = [
            (slot, row, column)
            for row, way in zip(rows, slots, strict=True)
            for column, slot in enumerate(way, self.first[row])
        ]
        one = {slot: (row, column) for slot, row, column in of}
        device, places = self.model.device, [one[slot] for slot in range(len(one))]
        of_slots, of_rows, columns = torch.tensor(of, device=device).unbind(1)
        row, column = torch.tensor(places, device=device).unbind(1)
        return Coming(slots=of_slots, rows=of_rows, columns=columns, row=row, column=column)

    def _blocks(self) -> tuple[tuple[slice, int], ...]:
        """Rows in blocks, on a GPU in one: those that came in together are of like length, the longest first. Blocks
        that see almost the same columns are one.
        """
        columns = self.mask.shape[1]
        found: list[tuple[slice, int]] = []
        latest = 0
        together = TOGETHER if self.mask.device.type == "cpu" else len(self.rows)
        for start in range(0, len(self.rows), together):
            rows = slice(start, start + together)
            going = (first for first, of in zip(self.first[rows], self.rows[rows], strict=True) if of is not None)
            first = min(going, default=columns - 1)
            if found and max(first, latest) - min(first, found[-1][1]) <= NEARBY:
                before, other = found.pop()
                rows, first, latest = slice(before.start, rows.stop), min(first, other), max(first, latest)
            else:
                latest = first
            found.append((rows, first))
        return tuple(found)

    def _step(self, tokens: Sequence[int]) -> None:
        self._grow()
        ids = torch.tensor(tokens, device=self.model.device).unsqueeze(-1)
        self.logits = self._forward(ids, self.mask, self.positions, self.cache)

    def _fill(self, coming: Sequence[tuple[int, int]]) -> None:
        taken, prompts = [row for row, _ in coming], [self.prompts[i] for _, i in coming]
        ids, mask = (made.to(self.model.device) for made in _left_padded(prompts))
        alone = len(self.rows) == 1  # nothing to lay beside others: any kind of cache will do
        cache = DynamicCache(config=self.model.config) if alone else DynamicCache()
        logits = self._forward(ids, mask, (mask.cumsum(dim=1) - 1).clamp(min=0), cache)
        if not self.cache.layers:
            self.logits = logits.new_zeros((len(self.rows), logits.shape[1]))
            columns = self.mask.shape[1]
            self.cache = cache if alone else Cache(layers=[empty(len(self.rows), columns) for _ in cache.layers])
        if not alone:
            of, states = mask.nonzero(as_tuple=True)
            rows, shift = torch.tensor(taken, device=of.device)[of], self.mask.shape[1] - mask.shape[1]
            for layer, made in zip(self.cache.layers, cache.layers, strict=True):
                assert isinstance(layer, Columns)
                layer.put(
                    rows, states + shift, *(part.transpose(1, 2)[of, states] for part in (made.keys, made.values))
                )
        self.logits[taken] = logits
        self._take(coming)

    def _forward(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: Cache) -> Tensor:
        """(rows, V): the logits of the last column."""
        out = self.model(
            input_ids=ids,
            attention_mask=mask if self.beside else None,  # a row alone hides nothing; Mamba takes none after a prompt
            position_ids=positions,
            use_cache=True,
            **{self.named: cache},
            **self.last,
        )
        logits: Tensor = out.logits[:, -1]
        return logits

    def trim(self, *, leave: bool, room: int = 0) -> None:
        """Give up the columns that no answer at hand looks at, but for `room`, and with `leave` the free rows."""
        going = [row for row, of in enumerate(self.rows) if of is not None]
        first = max(0, min(min(self.first[row] for row in going), self.mask.shape[1] - room))
        if not leave and first < ROOM:
            return  # not worth the copies
        kept = going if leave else list(range(len(self.rows)))
        rows = torch.tensor(kept, device=self.mask.device)
        for layer in self.cache.layers:
            if isinstance(layer, Columns):
                layer.trim(rows, first)
        self.mask, self.positions = self.mask[rows, first:], self.positions[rows]
        self.first = [self.first[row] - first for row in kept]
        self.rows = [self.rows[row] for row in kept]


def _left_padded(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    width = max(map(len, prompts))
    ids = torch.zeros((len(prompts), width), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, prompt in enumerate(prompts):
        ids[i, width - len(prompt) :] = torch.tensor(prompt)
        mask[i, width - len(prompt) :] = 1
    return ids, mask
