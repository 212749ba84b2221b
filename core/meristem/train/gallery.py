"""What an objective has to show: pictures in the run directory, drawn anew at each validation."""

import io
from typing import Any

import lightning as L

from meristem.files import write_file
from meristem.train.run_directory import RunDirectory
from meristem.train.task import Task
from meristem.types import PackedBatch


class Gallery(L.Callback):
    """Asks the objective for pictures of the first pack of each validation.

    Args:
        run: where they are written, as `<name>.png`.
    """

    def __init__(self, run: RunDirectory):
        self.run = run

    def on_validation_batch_end(
        self, trainer: L.Trainer, task: L.LightningModule, outputs: Any, batch: PackedBatch, batch_idx: int, *_: Any
    ) -> None:
        assert isinstance(task, Task)
        if batch_idx or trainer.state.fn != "fit" or not trainer.is_global_zero:
            return
        with trainer.precision_plugin.val_step_context():
            extra = task.extra if task.average is None else task.average.extra
            pictures = task.objective.pictures(task.evaluated, extra, batch)
        for name, pixels in pictures.items():
            from matplotlib.image import imsave  # it takes a second, and most objectives have nothing to show

            encoded = io.BytesIO()
            imsave(encoded, pixels, format="png")
            write_file(self.run.picture(name), encoded.getvalue())
