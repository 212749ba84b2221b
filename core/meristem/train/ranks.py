"""The processes that train together: which of them this one is, what they sum, gather and decide.

The only module that asks for a rank or communicates. Ranks are data-parallel ones: each takes packs of its own. What
communicates is collective: every process must call it, in the same order, or they wait for each other for ever. So
nothing that may communicate (a forward pass, a metric, saving) is done by the first process alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import lightning as L
import torch
from torch import distributed, nn
from torch.distributed.tensor import DTensor
from torchmetrics.utilities.distributed import gather_all_tensors

from meristem.shapes import Tensor


@dataclass(frozen=True)
class Ranks:
    """The processes that train together, as one of them sees them; alone by default.

    Attributes:
        number: of this process, from 0.
        count: how many there are.
        device: whose tensors are communicated.
    """

    number: int = 0
    count: int = 1
    device: torch.device = torch.device("cpu")

    @classmethod
    def of(cls, trainer: L.Trainer) -> "Ranks":
        """The processes of a Lightning trainer, each of which holds a whole model."""
        if trainer.world_size == 1:
            return cls()
        return cls(trainer.global_rank, trainer.world_size, trainer.strategy.root_device)

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes files and speaks to the user."""
        return self.number == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum of a tensor over all processes; its shape must be the same in each."""
        if self.count == 1:
            return values
        total = values.detach().to(self.device, copy=True)
        distributed.all_reduce(total)
        return total.to(values.device)

    def gather(self, rows: Tensor) -> list[Tensor]:
        """The tensor of every process, by rank: scalars, or `[n, ...]` where n may differ between processes."""
        if self.count == 1:
            return [rows]
        return [one.to(rows.device) for one in gather_all_tensors(rows.detach().to(self.device))]

    def any(self, facts: Sequence[bool]) -> list[bool]:
        """Whether each fact holds in any process."""
        return [count > 0 for count in self.sum(torch.tensor(facts, dtype=torch.float32)).tolist()]

    def first_says(self, decision: bool) -> bool:
        """What the first process decides; for what rests on figures that could differ in a last bit."""
        return self.any([decision and self.is_first])[0]


def full_state(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, each a whole tensor.

    Collective under FSDP2 (`fully_shard`): processes hold shards, which are gathered one tensor at a time and kept in
    the memory of the host, since a device need not have room for all of them.
    """
    state = module.state_dict()
    return {name: one.full_tensor().cpu() if isinstance(one, DTensor) else one for name, one in state.items()}
