"""Keys and values that a decoder keeps, so that each token is computed once."""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch.nn import functional as F

from meristem.shapes import Float, Tensor
from meristem.types import Hidden, Layout


@dataclass
class Cache:
    """Keys and values of the tokens that a decoder has read; it grows as tokens are added.

    Empty at first; the first batch says how many sequences there are. Each batch adds tokens to every sequence, with
    the sequences in the same order. Both are `[R, capacity, K, E]` in each layer, a slot for each sequence, and places
    beyond the length of a sequence hold arbitrary numbers.

    Attributes:
        room_tokens: places that slots have beyond the tokens of the first batch, so that they seldom need to grow.
        lengths: tokens of each sequence so far, on the host.
        slots: index of the slot of each sequence.
        source: hidden rows of the encoder; None for a model of one stack.
        cross: keys and values `[U, K, E]` of the source, by layer.
    """

    room_tokens: int = 0
    lengths: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    source: Hidden | None = None
    cross: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    _layers: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    _places: tuple[Tensor, Tensor] | None = None

    @property
    def is_empty(self) -> bool:
        """Whether no token has been added yet."""
        return not any(self.lengths)

    def begin(self, layout: Layout) -> None:
        """Work out where the tokens of a batch go; every layer then adds its keys and values by `add`."""
        if not self.lengths:
            self.lengths, self.slots = [0] * layout.num_sequences, list(range(layout.num_sequences))
        assert layout.num_sequences == len(self.lengths), "a batch adds to every sequence of the cache"
        slots = np.repeat(self.slots, layout.lengths)
        places = np.concatenate([np.arange(n, n + more) for n, more in zip(self.lengths, layout.lengths)])
        self._places = (torch.from_numpy(slots).to(layout.device), torch.from_numpy(places).to(layout.device))

    def add(
        self, layer: int, k_TKE: Float[Tensor, "T K E"], v_TKE: Float[Tensor, "T K E"], layout: Layout
    ) -> tuple[Float[Tensor, "R capacity K E"], Float[Tensor, "R capacity K E"]]:
        """Append the keys and values of a layer to those of each sequence, and return all of them."""
        assert self._places is not None, "begin comes first"
        needed = max(n + more for n, more in zip(self.lengths, layout.lengths))
        shape = (layout.num_sequences, needed + self.room_tokens, *k_TKE.shape[1:])
        keys, values = self._layers.get(layer) or (_slots(k_TKE, shape), _slots(v_TKE, shape))
        if keys.shape[1] < needed:  # by half, so that growing is rare
            more = max(needed, keys.shape[1] * 3 // 2) - keys.shape[1]
            keys, values = (F.pad(slots, (0, 0, 0, 0, 0, more)) for slots in (keys, values))
        keys[self._places] = k_TKE[: layout.num_tokens]
        values[self._places] = v_TKE[: layout.num_tokens]
        self._layers[layer] = keys, values
        return keys, values

    def end(self, layout: Layout) -> None:
        """Count the tokens of a batch, once every layer has added them."""
        self.lengths = [n + more for n, more in zip(self.lengths, layout.lengths)]
        self._places = None

    def select(self, sequences: list[int]) -> None:
        """Continue with these sequences, in this order; a sequence may be left out or repeated.

        Slots are copied only where a sequence is repeated, where half of them or more are unused, and on a GPU, whose
        kernels read the slots in their order.
        """
        is_same = sequences == list(range(len(self.lengths)))
        self.lengths = [self.lengths[sequence] for sequence in sequences]
        self.slots = [self.slots[sequence] for sequence in sequences]
        if is_same:
            return
        num_slots = len(self.slots)
        is_idle = any(keys.is_cuda or len(keys) >= 2 * num_slots for keys, _ in self._layers.values())
        if is_idle or len(set(self.slots)) < num_slots:
            for layer, (keys, values) in self._layers.items():
                index = torch.tensor(self.slots, device=keys.device)
                self._layers[layer] = keys.index_select(0, index), values.index_select(0, index)
            self.slots = list(range(len(sequences)))
        if self.source is not None:
            self._select_source(sequences, self.source)

    def _select_source(self, sequences: list[int], source: Hidden) -> None:
        starts, lengths = source.layout.starts, source.layout.lengths
        places = [np.arange(starts[sequence], starts[sequence] + lengths[sequence]) for sequence in sequences]
        rows = torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *places])).to(source.final.device)
        layout = Layout.of([lengths[sequence] for sequence in sequences]).to(source.layout.device)

        def chosen(x: Tensor) -> Tensor:
            return F.pad(x.index_select(0, rows), (0, 0) * (x.ndim - 1) + (0, layout.num_spare))

        self.cross = {layer: (chosen(k), chosen(v)) for layer, (k, v) in self.cross.items()}
        self.source = Hidden(final=chosen(source.final), layout=layout)


def _slots(rows: Float[Tensor, "T K E"], shape: tuple[int, ...]) -> Float[Tensor, "R capacity K E"]:
    """Empty slots; on a GPU zeros, since one masked call there multiplies what no query sees by nothing."""
    return rows.new_zeros(shape) if rows.is_cuda else rows.new_empty(shape)
