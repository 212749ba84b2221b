"""What a run leaves behind: a checkpoint to go on from, the best and the last model, its curves and figures."""

import signal
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from meristem.errors import CheckpointError
from meristem.figures.canvas import save_array
from meristem.files import replacing
from meristem.model_directory import save_model
from meristem.train.curves import draw_curves
from meristem.train.ranks import Ranks, full_state
from meristem.train.recorder import Recorder
from meristem.train.run_directory import RunDirectory
from meristem.train.spec import Watch
from meristem.train.task import STOP_SIGNALS, Task
from meristem.types import PackedBatch

MAX_DRAWING_FRAC = 0.05
"""Share of a run's time that curves may take; they are drawn anew at fewer validations where drawing takes more."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoints are whole or not there, and hold weights and plain values alone."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with replacing(path) as temporary:
                torch.save(checkpoint, temporary)
        except (OSError, RuntimeError) as error:  # torch's writer says RuntimeError where a disk is full
            raise CheckpointError(f"{path} cannot be written: {error}; the last good one is kept") from error

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        try:
            return torch.load(path, map_location=map_location or "cpu", weights_only=True)
        except Exception as error:
            raise CheckpointError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error


class Stopped(BaseException):
    """The run was asked to stop by the signal `number` and has saved what it could; it goes on from `step`."""

    def __init__(self, number: int, step: int):
        super().__init__(number, step)
        self.number, self.step = number, step


class Keeper(L.Callback):
    """Saves at whole steps, after the validation that belongs to them."""

    def __init__(self, run: RunDirectory, watch: Watch, recorder: Recorder, say: Callable[[str], None]):
        self.run, self.watch, self.recorder, self.say = run, watch, recorder, say
        self.best: float | None = None
        self.best_step = 0
        self.num_worse = 0
        self.is_stopped_early = False
        self._saved_step = -1
        self._drawn_at, self._drawing_seconds = time.monotonic(), 1.0
        self._old_handlers: dict[int, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "best_step": self.best_step, "num_worse": self.num_worse}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best, self.best_step, self.num_worse = state["best"], state["best_step"], state["num_worse"]

    def on_train_start(self, trainer: L.Trainer, task: L.LightningModule) -> None:
        assert isinstance(task, Task)
        self._saved_step = trainer.global_step if trainer.ckpt_path else -1
        self._old_handlers = {number: signal.signal(number, partial(self._ask, task)) for number in STOP_SIGNALS}
        if not trainer.ckpt_path:
            self.save(trainer)  # from here on the same command always finds something to go on from

    def _ask(self, task: Task, number: int, frame: FrameType | None) -> None:
        """Stop all processes at a whole step, this one or the next; a second signal does not wait."""
        task.wish = number
        self.restore_handlers()
        self.say("stopping after this step")

    def restore_handlers(self) -> None:
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)
        self._old_handlers = {}

    def on_train_batch_end(
        self, trainer: L.Trainer, task: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(task, Task)
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        if self.watch.is_due(trainer):
            if trainer.global_step == trainer.max_steps:
                trainer.should_stop = True  # or Lightning leaves without a validation
            return
        self._save_if_due(trainer, task, task.stop_signal)

    def on_validation_batch_end(
        self, trainer: L.Trainer, task: L.LightningModule, outputs: Any, batch: PackedBatch, batch_idx: int, *_: Any
    ) -> None:
        assert isinstance(task, Task)
        if batch_idx == 0:
            with trainer.precision_plugin.val_step_context():
                figures = task.objective.figures(task.evaluated, task.evaluated_extra, batch)
            for name, colours in figures.items():
                if task.ranks.is_first:  # the model was run by all
                    save_array(colours, self.run.path / f"{name}.png")
        if number := task.agree_to_stop():
            raise Stopped(number, self._saved_step)

    def on_validation_end(self, trainer: L.Trainer, task: L.LightningModule) -> None:
        assert isinstance(task, Task)
        value = self.recorder.last_validation.get(self.watch.monitor, float("nan"))
        if task.ranks.first_says(self.watch.is_better(value, self.best)):
            self.best, self.best_step, self.num_worse = value, trainer.global_step, 0
            self._save_model(trainer, task, self.run.best_model)
        else:
            self.num_worse += 1
        if self.watch.patience and self.num_worse >= self.watch.patience:
            self.is_stopped_early = trainer.should_stop = True
        is_time = MAX_DRAWING_FRAC * (time.monotonic() - self._drawn_at) > self._drawing_seconds
        if task.ranks.is_first and is_time:
            self._draw()
        self._save_if_due(trainer, task, task.agree_to_stop())

    def _save_if_due(self, trainer: L.Trainer, task: Task, stop_signal: int) -> None:
        if stop_signal or trainer.global_step % self.watch.save_every_n_steps == 0:
            self.recorder.flush(trainer, task)
            self.save(trainer)
        if stop_signal:
            raise Stopped(stop_signal, self._saved_step)

    def save(self, trainer: L.Trainer) -> None:
        """Write the checkpoint to go on from, after what is written of its steps; collective."""
        if self._saved_step == trainer.global_step:
            return
        trainer.save_checkpoint(self.run.last_checkpoint)
        self._saved_step = trainer.global_step
        if Ranks.of(trainer).is_first:
            self.run.write_state(step=trainer.global_step, finished=None)

    def finish(self, trainer: L.Trainer, task: Task) -> None:
        """Write the last model, the best one too if nothing was validated, and why the run ended. Collective."""
        self.recorder.flush(trainer, task)
        self.save(trainer)
        self._save_model(trainer, task, self.run.last_model)
        if self.best is None:
            self._save_model(trainer, task, self.run.best_model)
        if task.ranks.is_first:
            self._draw()
            reason = f"no better {self.watch.monitor} for {self.num_worse} validations" if self.is_stopped_early else ""
            self.run.write_state(
                step=trainer.global_step,
                finished=reason or f"all {trainer.global_step} steps taken",
                best_step=self.best_step,
                max_steps=trainer.max_steps,
                patience=self.watch.patience,
            )

    def _draw(self) -> None:
        began = time.monotonic()
        draw_curves(self.run.metrics, self.run.curves)
        self._drawn_at = time.monotonic()
        self._drawing_seconds = self._drawn_at - began

    def _save_model(self, trainer: L.Trainer, task: Task, path: Path) -> None:
        tensors = full_state(task.evaluated)
        if not task.ranks.is_first:
            return
        facts: dict[str, float] = {"steps": trainer.global_step}
        facts |= {name: round(value, 5) for name, value in self.recorder.last_validation.items()}
        save_model(path, replace(task.card, facts=facts), task.evaluated, tensors)
