"""A cache of keys and values that is written in place: rows side by side, their newest token in one column."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

ROOM = 128  # columns by which the cache grows


@dataclass(frozen=True)
class Coming:
    """Where the states of slots of prompts go; a slot that several prompts share goes to all their rows.

    Attributes:
        slots, rows, columns: (n,) int64, the state of slot `slots[i]` goes to row `rows[i]` and column `columns[i]`.
        row, column: (slots,) int64, one place of each slot.
    """

    slots: Tensor
    rows: Tensor
    columns: Tensor
    row: Tensor
    column: Tensor

    def of(self, states: Tensor, used: int) -> Tensor:
        """The slots' states out of a cache's newest columns of `used`, (rows, heads, columns, width) ->
        (1, heads, slots, width).
        """
        return states[self.row, :, self.column - (used - states.shape[2])].transpose(0, 1).unsqueeze(0)


@dataclass(frozen=True)
class Slots:
    """What is read as one row: slots of prompts that come in, then the newest token of every row, or of none."""

    coming: Coming | None
    newest: bool


class Columns(DynamicLayer):
    """One layer's keys and values in a buffer with room to the right; what is read is a view of it, of slots no longer
    than the layer looks back.
    """

    keys: Tensor
    values: Tensor
    is_initialized: bool
    used = 0
    rows = 0
    window: int | None = None
    slots: Slots | None = None  # of the pass at hand

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write the newest column; keys and values are (rows, heads, 1, width), or of `Slots` (1, heads, T, width)."""
        if self.slots is not None:
            return self._read(self.slots, key_states, value_states)
        self.widen(self.used + 1)
        self.keys[:, :, self.used - 1] = key_states[:, :, 0]
        self.values[:, :, self.used - 1] = value_states[:, :, 0]
        return self.keys[:, :, : self.used], self.values[:, :, : self.used]

    def _read(self, slots: Slots, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = keys[0].transpose(0, 1), values[0].transpose(0, 1)
        self._allot(keys, values)
        if slots.coming is not None:
            rows, columns, of = slots.coming.rows, slots.coming.columns, slots.coming.slots
            self.put(rows, columns, keys[of], values[of])
        if slots.newest:
            self.keys[:, :, self.used - 1] = keys[-self.rows :]
            self.values[:, :, self.used - 1] = values[-self.rows :]
        first = max(0, self.used - (self.window or self.used))
        return self.keys[:, :, first : self.used], self.values[:, :, first : self.used]

    def widen(self, used: int) -> None:
        """Have so many columns in use."""
        self.used = used
        if self.is_initialized and used > self.keys.shape[2]:
            self.keys, self.values = (_wider(states, ROOM) for states in (self.keys, self.values))

    def get_seq_length(self) -> int:
        """Columns in use; 0 where `Slots` are read, so that transformers makes no mask."""
        return self.used if self.slots is None else 0

    def put(self, rows: Tensor, columns: Tensor, keys: Tensor, values: Tensor) -> None:
        """Write n states, (n, heads, width), each at its row and column."""
        self._allot(keys, values)
        for there, states in ((self.keys, keys), (self.values, values)):
            there.transpose(1, 2).index_put_((rows, columns), states.to(there.dtype))

    def _allot(self, *kinds: Tensor) -> None:
        """Take memory for states like these, once. What no row sees is read, too, and so must be a number.

        Under autocast they lie there as attention would cast them at every token.
        """
        if self.is_initialized:
            return
        kind, room = kinds[0].device.type, self.used + ROOM
        cast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        self.keys, self.values = (
            states.new_zeros((self.rows, states.shape[1], room, states.shape[2]), dtype=cast) for states in kinds
        )
        self.dtype, self.device, self.is_initialized = self.keys.dtype, self.keys.device, True

    def trim(self, rows: Tensor, first: int) -> None:
        """Keep these rows, and the columns from `first` on."""
        self.keys, self.values = (
            _wider(states[rows, :, first : self.used], ROOM) for states in (self.keys, self.values)
        )
        self.rows, self.used = len(rows), self.used - first


def _wider(states: Tensor, room: int) -> Tensor:
    rows, heads, columns, width = states.shape
    wide = states.new_empty((rows, heads, columns + room, width))
    wide[:, :, :columns] = states
    return wide


def empty(rows: int, columns: int, window: int | None = None) -> Columns:
    """So many free rows of columns; what lies in them is known once states are put there."""
    made = Columns()
    made.rows, made.used, made.window = rows, columns, window
    return made
