"""A cache of keys and values that is written in place: rows side by side, their newest token in one column."""

from torch import Tensor
from transformers.cache_utils import DynamicLayer

ROOM = 128  # columns by which the cache grows


class Columns(DynamicLayer):
    """One layer's keys and values in a buffer with room to the right; what is read is a view of it."""

    keys: Tensor
    values: Tensor
    used = 0

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write the newest column; keys and values are (rows, heads, 1, width)."""
        if self.used == self.keys.shape[2]:
            self.keys, self.values = (_wider(states, ROOM) for states in (self.keys, self.values))
        self.keys[:, :, self.used] = key_states[:, :, 0]
        self.values[:, :, self.used] = value_states[:, :, 0]
        self.used += 1
        return self.keys[:, :, : self.used], self.values[:, :, : self.used]

    def get_seq_length(self) -> int:
        """Columns in use."""
        return self.used

    def put(self, rows: Tensor, columns: Tensor, keys: Tensor, values: Tensor) -> None:
        """Write n states, (n, heads, width), each at its row and column."""
        for there, states in ((self.keys, keys), (self.values, values)):
            there.transpose(1, 2).index_put_((rows, columns), states)

    def trim(self, rows: Tensor, first: int) -> None:
        """Keep these rows, and the columns from `first` on."""
        self.keys, self.values = (
            _wider(states[rows, :, first : self.used], ROOM) for states in (self.keys, self.values)
        )
        self.used -= first


def _wider(states: Tensor, room: int) -> Tensor:
    rows, heads, columns, width = states.shape
    wide = states.new_empty((rows, heads, columns + room, width))
    wide[:, :, :columns] = states
    return wide


def empty(layer: DynamicLayer, rows: int, columns: int) -> Columns:
    """So many free rows of columns, like those of a layer that was filled."""
    made = Columns()
    made.keys, made.values = (
        _wider(states.new_zeros((rows, states.shape[1], columns, states.shape[3])), ROOM)
        for states in (layer.keys, layer.values)
    )
    made.used, made.is_initialized = columns, True
    made.dtype, made.device = layer.keys.dtype, layer.keys.device
    return made
