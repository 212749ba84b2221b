"""What the kernels of packed attention are given."""

from dataclasses import dataclass

from meristem.model.config import Pattern
from meristem.model.position import ScoreBias
from meristem.shapes import Float, Tensor
from meristem.types import Layout


@dataclass(frozen=True)
class Packed:
    """Queries, keys and values of packed sequences, for self- and cross-attention alike.

    Attributes:
        k_UKE: keys; with fewer heads than queries, each serves H / K of their heads.
        kv_layout: where the sequences of the keys lie. Sequence i of the queries sees sequence i of the keys, and spare
            rows see spare rows. The prefix that a pattern may name is that of the keys.
    """

    q_THE: Float[Tensor, "T H E"]
    k_UKE: Float[Tensor, "U K E"]
    v_UKE: Float[Tensor, "U K E"]
    q_layout: Layout
    kv_layout: Layout


@dataclass(frozen=True)
class Slotted:
    """Queries of new tokens, and the keys and values of all tokens in the slots of a cache.

    Attributes:
        q_THE: one or more new tokens of each sequence. They are its last places, and their keys are in its slot.
        k_RUKE, v_RUKE: keys and values, with a slot for each sequence.
        q_layout: where the sequences of the queries lie; the prefix that a pattern may name is theirs.
        kv_lengths: number of filled places in the slot of each sequence.
        slots: index of the slot of each sequence; on a GPU slots lie in the order of the sequences.
    """

    q_THE: Float[Tensor, "T H E"]
    k_RUKE: Float[Tensor, "R U K E"]
    v_RUKE: Float[Tensor, "R U K E"]
    q_layout: Layout
    kv_lengths: tuple[int, ...]
    slots: list[int]

    def __post_init__(self) -> None:
        assert len(self.kv_lengths) == self.q_layout.num_sequences, "each sequence of queries has a slot"
        is_in_order = self.slots == list(range(len(self.slots)))
        assert is_in_order or not self.q_THE.is_cuda, "on a GPU slots lie in the order of the sequences"


@dataclass(frozen=True)
class Scoring:
    """How the scores of queries and keys are made and become weights.

    Attributes:
        pattern: which keys a query may see within its sequence; a query that sees none gets zeros.
        bias: what is added to the scores.
        scale: factor of the scores; 1 / sqrt(E) when None.
        dropout: share of the weights that are dropped.
    """

    pattern: Pattern
    bias: ScoreBias | None = None
    scale: float | None = None
    dropout: float = 0.0
