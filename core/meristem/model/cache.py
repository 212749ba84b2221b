"""Keys and values that a decoder keeps, so that each token is computed once."""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch.nn import functional as F

from meristem.shapes import Float, Int, Tensor
from meristem.types import Hidden, Layout


@dataclass
class LayerCache:
    """Keys and values of one layer, a slot a sequence.

    Attributes:
        keys: `[R, capacity, K, E]`; `Cache.slots` says which slot is whose, and past its length one holds anything.
        values: likewise.
    """

    keys: Float[Tensor, "R capacity K E"]
    values: Float[Tensor, "R capacity K E"]


@dataclass
class Cache:
    """What a decoder knows of the sequences so far; it grows as rows are added.

    Empty at first; the first batch says how many sequences there are. Each batch adds rows to every sequence, in
    the same order of sequences.

    Attributes:
        room_tokens: places that slots have at first beyond those of the first batch, so that they need not grow.
        lengths: tokens of each sequence that are kept, on the host.
        slots: where each sequence lies.
        source: hidden rows of an encoder's side; None for a model of one stack.
    """

    room_tokens: int = 0
    lengths: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    source: Hidden | None = None
    _layers: dict[int, LayerCache] = field(default_factory=dict)
    _cross: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    _places: tuple[Tensor, Tensor] | None = None

    @property
    def is_empty(self) -> bool:
        """No token is kept yet."""
        return not any(self.lengths)

    def begin(self, layout: Layout) -> None:
        """Make room for the rows of a batch; every layer then adds its own by `add`."""
        if not self.lengths:
            self.lengths, self.slots = [0] * layout.num_sequences, list(range(layout.num_sequences))
        assert layout.num_sequences == len(self.lengths), "a batch adds to every sequence of the cache"
        slots = np.repeat(self.slots, layout.lengths)
        places = np.concatenate([np.arange(n, n + more) for n, more in zip(self.lengths, layout.lengths)])
        self._places = (torch.from_numpy(slots).to(layout.device), torch.from_numpy(places).to(layout.device))

    def add(
        self, layer: int, k_TKE: Float[Tensor, "T K E"], v_TKE: Float[Tensor, "T K E"], layout: Layout
    ) -> LayerCache:
        """Keep the keys and values of a layer's rows behind those of each sequence, and give all of them."""
        assert self._places is not None, "begin comes first"
        needed = max(n + more for n, more in zip(self.lengths, layout.lengths))
        kept = self._layers.get(layer)
        if kept is None:
            shape = (layout.num_sequences, needed + self.room_tokens, *k_TKE.shape[1:])
            kept = self._layers[layer] = LayerCache(_slots(k_TKE, shape), _slots(v_TKE, shape))
        if kept.keys.shape[1] < needed:  # by half, so that growing is rare
            more = max(needed, kept.keys.shape[1] * 3 // 2) - kept.keys.shape[1]
            kept.keys, kept.values = (F.pad(slots, (0, 0, 0, 0, 0, more)) for slots in (kept.keys, kept.values))
        kept.keys[self._places] = k_TKE[: layout.num_tokens]
        kept.values[self._places] = v_TKE[: layout.num_tokens]
        return kept

    def end(self, layout: Layout) -> None:
        """Count the rows of a batch that every layer has added."""
        self.lengths = [n + more for n, more in zip(self.lengths, layout.lengths)]
        self._places = None

    def cross(self, layer: int) -> tuple[Tensor, Tensor] | None:
        """Keys and values `[U, K, E]` of the source side in a layer, once they are kept."""
        return self._cross.get(layer)

    def keep_cross(self, layer: int, k_UKE: Float[Tensor, "U K E"], v_UKE: Float[Tensor, "U K E"]) -> None:
        """Keep keys and values of the source side."""
        self._cross[layer] = (k_UKE, v_UKE)

    def select(self, sequences: list[int]) -> None:
        """Go on with these sequences, in this order: some may be left out, others be there more than once.

        Slots are copied only where a sequence is there twice, where half of them or more are nobody's, and on a GPU,
        whose kernels read one slot after the other.
        """
        is_same = sequences == list(range(len(self.lengths)))
        self.lengths = [self.lengths[sequence] for sequence in sequences]
        self.slots = [self.slots[sequence] for sequence in sequences]
        if is_same:
            return
        if len(set(self.slots)) < len(self.slots) or any(self._must_move(kept) for kept in self._layers.values()):
            for kept in self._layers.values():
                index = torch.tensor(self.slots, device=kept.keys.device)
                kept.keys, kept.values = kept.keys.index_select(0, index), kept.values.index_select(0, index)
            self.slots = list(range(len(sequences)))
        if self.source is not None:
            self._select_source(sequences, self.source)

    def _must_move(self, kept: LayerCache) -> bool:
        return kept.keys.is_cuda or len(kept.keys) >= 2 * len(self.slots)

    def _select_source(self, sequences: list[int], source: Hidden) -> None:
        rows = rows_of_sequences(source.layout, sequences).to(source.final.device)
        layout = Layout.of([source.layout.lengths[sequence] for sequence in sequences]).to(source.layout.device)

        def chosen(x: Tensor) -> Tensor:
            return F.pad(x.index_select(0, rows), (0, 0) * (x.ndim - 1) + (0, layout.num_spare))

        self._cross = {layer: (chosen(k), chosen(v)) for layer, (k, v) in self._cross.items()}
        self.source = Hidden(final=chosen(source.final), layout=layout)


def rows_of_sequences(layout: Layout, sequences: list[int]) -> Int[Tensor, "R"]:
    """Rows of some sequences of a pack, end to end."""
    parts = [torch.arange(layout.starts[s], layout.starts[s] + layout.lengths[s]) for s in sequences]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.long)


def _slots(rows: Float[Tensor, "T K E"], shape: tuple[int, ...]) -> Float[Tensor, "R capacity K E"]:
    """Empty slots; on a GPU zeros, since one masked call there multiplies what no query sees by nothing."""
    return rows.new_zeros(shape) if rows.is_cuda else rows.new_empty(shape)
