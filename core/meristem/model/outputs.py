"""What a caller asks a model for, and what comes back."""

from collections.abc import Collection, Mapping
from copy import copy
from dataclasses import dataclass
from typing import Any

from meristem.model.cache import Cache
from meristem.shapes import Float, Int, Tensor
from meristem.types import Hidden


class HeadRequest:
    """What is asked of one head.

    Args:
        rows: `[M]` rows of the pack to give outputs for; None for all that the head has outputs of.
        targets: `[M]` classes of these rows. A head that can, such as that of symbols, then gives its loss and never
            holds all logits at once.
        label_smoothing: share of each target's probability that is spread evenly over all classes; with `targets`.
        rounds_alike: no bit of an output may depend on how many others are computed with it, on a CPU.
    """

    def __init__(
        self,
        rows: Int[Tensor, "M"] | None = None,
        targets: Int[Tensor, "M"] | None = None,
        label_smoothing: float = 0.0,
        rounds_alike: bool = False,
    ):
        self.rows, self.targets, self.label_smoothing = rows, targets, label_smoothing
        self.rounds_alike = rounds_alike


class Wanted:
    """What is asked of one run of a model. The final hidden rows always come back.

    A plain class: FSDP2 copies dataclass arguments, and would lose what a cache is given.

    Args:
        heads: heads to run: their names, for outputs of all rows, or what is asked of each, by name.
        layers: hidden states to keep: 0 is the input of the first block, k the output of the k-th, -1 the last one,
            after the final norm. Each is kept under the number that it was asked for by.
        source_layers: the same of an encoder-decoder's source side; None for those of `layers`.
        attentions: blocks (from 0) whose attention maps to keep; these run on the slow reference kernel.
        is_pooled: the model's own pool gives one vector a sequence.
        num_first: first rows of each sequence of `Outputs.hidden.final` that the caller will use: 0 for none, None for
            all. The last block leaves out rows that neither the caller nor a head uses, where it can.
        is_source_only: only the first stack is run: on the source side of the pack, or on the pack itself where it has
            no other side. Embeddings of an encoder-decoder are made so.
        cache: what a decoder knows of the tokens before these, and of its source; these tokens are added to it.
        hidden: final rows that were computed before, such as means over windows; only pools and heads are run.
    """

    def __init__(
        self,
        heads: Collection[str] | Mapping[str, HeadRequest] = (),
        *,
        layers: Collection[int] = (),
        source_layers: Collection[int] | None = None,
        attentions: Collection[int] = (),
        is_pooled: bool = False,
        num_first: int | None = None,
        is_source_only: bool = False,
        cache: Cache | None = None,
        hidden: Hidden | None = None,
    ):
        self.heads = dict(heads) if isinstance(heads, Mapping) else dict.fromkeys(heads, HeadRequest())
        self.layers, self.source_layers, self.attentions = layers, source_layers, attentions
        self.is_pooled, self.num_first, self.is_source_only = is_pooled, num_first, is_source_only
        self.cache, self.hidden = cache, hidden

    def but(self, **changes: Any) -> "Wanted":
        """The same with other values of some attributes."""
        other = copy(self)
        vars(other).update(changes)
        return other


@dataclass(frozen=True)
class Outputs:
    """What one run of a model gave.

    Attributes:
        hidden: rows of the stack: the final ones, and layers, attention maps and routing where they were asked for.
        heads: what each head gave, by its name: outputs, or its loss where it was asked for that. The class of a head
            says what they are.
        pooled: `[S, W]` vectors of the model's own pool; None where they were not asked for.
        is_training: the model was in training mode.
    """

    hidden: Hidden
    heads: Mapping[str, Any]
    pooled: Float[Tensor, "S W"] | None
    is_training: bool
