"""Changes of a built model, such as an adapter or weights in eight bits."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from meristem.model.model import Model


@dataclass(frozen=True, kw_only=True)
class ChangeSpec(ABC):
    """A change of a built model, as plain values that travel in a model directory.

    A package registers a subclass, itself a frozen dataclass, in the group `meristem.changes` under its `kind`. A model
    directory is opened by building the model, applying its changes in order, and loading the weights strictly.
    """

    group: ClassVar[str] = "meristem.changes"
    kind: ClassVar[str]

    @abstractmethod
    def apply(self, model: Model) -> None:
        """Change the modules of a model, in place, before weights are loaded; they may be on the meta device."""
