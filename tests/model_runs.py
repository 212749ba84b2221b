"""Short ways to run a model in tests."""

from collections.abc import Collection, Iterable

from meristem.model.heads import HeadSpec, Readout, Symbols
from meristem.model.model import SYMBOLS, Model
from meristem.model.outputs import Wanted
from meristem.registry import find
from meristem.shapes import Tensor
from meristem.types import PackedBatch


def outputs_of(model: Model, batch: PackedBatch, head: str = SYMBOLS) -> Tensor:
    """What one head says of all rows of a pack."""
    outputs: Tensor = model(batch, Wanted((head,))).heads[head]
    return outputs


def specs(names: Collection[str] = (), readouts: Iterable[Readout] = ()) -> dict[str, HeadSpec]:
    """Heads of these names (`tokens`, or registered kinds without settings), and those of labels."""
    found = {name: Symbols() if name == SYMBOLS else find("meristem.heads", name)() for name in names}
    return found | {readout.name: readout for readout in readouts}
