"""Figures of an objective, such as reconstructions, in the run directory; drawn anew at each validation."""

from typing import Any

import lightning as L

from meristem.figures.canvas import save_array
from meristem.train.ranks import Ranks
from meristem.train.run_directory import RunDirectory
from meristem.train.task import Task
from meristem.types import PackedBatch


class Gallery(L.Callback):
    """Writes the figures that the objective makes of the first pack of each validation.

    Args:
        run: where they are written, as `<name>.png`.
    """

    def __init__(self, run: RunDirectory):
        self.run = run

    def on_validation_batch_end(
        self, trainer: L.Trainer, task: L.LightningModule, outputs: Any, batch: PackedBatch, batch_idx: int, *_: Any
    ) -> None:
        assert isinstance(task, Task)
        if batch_idx or trainer.state.fn != "fit":
            return
        with trainer.precision_plugin.val_step_context():
            extra = task.extra if task.average is None else task.average.extra
            figures = task.objective.figures(task.evaluated, extra, batch)
        if not Ranks.of(trainer).is_first:  # the model was run by all
            return
        for name, colours in figures.items():
            save_array(colours, self.run.figure(name))
