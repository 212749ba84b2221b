"""How a run is going: a bar on a terminal, a plain line now and then elsewhere."""

import sys
import time
from typing import Any, TextIO

import lightning as L

from meristem.train.recorder import Recorder

SECONDS_BETWEEN_LINES = 5.0


class TrainingProgress(L.Callback):
    """Shows step, loss, learning rate, tokens/s and time left, on stderr.

    Args:
        recorder: has the figures.
    """

    def __init__(self, recorder: Recorder, stream: TextIO | None = None):
        self.recorder = recorder
        self._stream = stream or sys.stderr
        self._bar: Any = None
        self._task: Any = None
        self._shown_step = 0
        self._first_step = 0
        self._began = self._last_line = 0.0

    def on_train_start(self, trainer: L.Trainer, task: L.LightningModule) -> None:
        self._first_step = self._shown_step = trainer.global_step
        self._began = self._last_line = time.monotonic()
        if not trainer.is_global_zero or not self._stream.isatty():
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._bar = Progress(
            TextColumn("fit"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=Console(file=self._stream),
        )
        self._task = self._bar.add_task("fit", total=trainer.max_steps, completed=trainer.global_step, figures="")
        self._bar.start()

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        step = self.recorder.last.get("step", 0)
        if step == self._shown_step or not trainer.is_global_zero:
            return
        self._shown_step = step
        if self._bar is not None:
            self._bar.update(self._task, completed=step, figures=self._figures())
        elif time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES or step in (1, trainer.max_steps):
            self._last_line = time.monotonic()
            speed = (step - self._first_step) / max(self._last_line - self._began, 1e-6)
            left = _duration((trainer.max_steps - step) / max(speed, 1e-9))
            self._print(f"step {step:,} of {trainer.max_steps:,}: {self._figures()}, {left} left")

    def on_validation_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.state.fn != "fit" or not trainer.is_global_zero:
            return
        figures = ", ".join(f"{name} {value:.4g}" for name, value in self.recorder.last_validation.items())
        self._print(f"step {trainer.global_step:,}: validation: {figures}")

    def stop(self) -> None:
        """Take the bar off the screen; lines stay."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def on_exception(self, trainer: L.Trainer, task: L.LightningModule, exception: BaseException) -> None:
        self.stop()

    def on_train_end(self, trainer: L.Trainer, task: L.LightningModule) -> None:
        self.stop()

    def _print(self, line: str) -> None:
        if self._bar is not None:
            self._bar.console.print(line, highlight=False)
        else:
            print(line, file=self._stream, flush=True)

    def _figures(self) -> str:
        last = self.recorder.last
        return f"loss {last['loss']:.4f}, lr {last['lr']:.2e}, {last['tokens_per_second']:,.0f} tokens/s"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
