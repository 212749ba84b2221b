"""When a run is validated and saved, what decides that it got better, and when it stops early."""

from dataclasses import dataclass
from typing import Literal

import lightning as L

from meristem.model.config.checks import require, require_all


@dataclass(frozen=True, kw_only=True)
class Watch:
    """How a run is looked after.

    Attributes:
        validate_every_n_steps: optimiser steps between validations; the last step is validated as well.
        save_every_n_steps: optimiser steps between checkpoints to go on from.
        monitor: figure of the validation that the best model is chosen by: `loss` or a metric (`location/mcc`).
        mode: whether less or more of it is better.
        patience: validations without a better figure after which the run stops; null to run to the end.
    """

    validate_every_n_steps: int = 100
    save_every_n_steps: int = 50
    monitor: str = "loss"
    mode: Literal["min", "max"] = "min"
    patience: int | None = None

    def __post_init__(self) -> None:
        require_all(self, "watch.", "1 or more", "validate_every_n_steps", "save_every_n_steps")
        is_right = self.patience is None or self.patience >= 1
        require(is_right, "watch.patience must be 1 or more, or null", self.patience)

    def is_due(self, trainer: L.Trainer) -> bool:
        """Whether a validation follows the step that was just taken."""
        if not trainer.enable_validation:
            return False
        step = trainer.global_step
        return step % self.validate_every_n_steps == 0 or step == trainer.max_steps

    def is_better(self, value: float, best: float | None) -> bool:
        if best is None:
            return value == value
        return value < best if self.mode == "min" else value > best
