"""Short ways to run a model in tests."""

from meristem.model.model import SYMBOLS, Model
from meristem.model.outputs import Wanted
from meristem.shapes import Tensor
from meristem.types import PackedBatch


def outputs_of(model: Model, batch: PackedBatch, head: str = SYMBOLS, num_special: tuple[int, int] = (0, 0)) -> Tensor:
    """What one head says of all rows of a pack."""
    outputs: Tensor = model(batch, Wanted((head,), num_special=num_special)).heads[head]
    return outputs
