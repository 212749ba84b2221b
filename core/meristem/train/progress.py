"""How a run is going, on stderr."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import lightning as L

from meristem.progress import Progress
from meristem.train.datamodule import DataModule
from meristem.train.ranks import Ranks
from meristem.train.recorder import Recorder


class TrainingProgress(L.Callback):
    """Shows steps, loss, learning rate, tokens per second and the time left, and the figures of each validation."""

    def __init__(self, recorder: Recorder):
        self.recorder = recorder
        self._shown: Progress | None = None
        self._step = 0

    def on_train_start(self, trainer: L.Trainer, task: L.LightningModule) -> None:
        self._step = trainer.global_step
        if Ranks.of(trainer).is_first:
            self._shown = Progress(trainer.max_steps, "steps", title="fit").__enter__()
            self._shown.skip(self._step)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        last = self.recorder.last
        step = last.get("step", self._step)
        if self._shown is not None and step > self._step:
            rate = f"{last['tokens_per_second']:,.0f} tokens/s"
            self._shown.advance(step - self._step, f"loss {last['loss']:.4f}, lr {last['lr']:.2e}, {rate}")
            self._step = step

    def on_validation_end(self, trainer: L.Trainer, *_: Any) -> None:
        if self._shown is not None:
            figures = ", ".join(f"{name} {value:.4g}" for name, value in self.recorder.last_validation.items())
            self._shown.say(f"step {trainer.global_step:,}: validation: {figures}")

    def on_train_end(self, *_: Any, **named: Any) -> None:
        """Take the bar off the screen; lines stay."""
        if self._shown is not None:
            self._shown.__exit__(None, None, None)
            self._shown = None

    on_exception = on_train_end


@contextmanager
def shown_reading(data: DataModule) -> Iterator[None]:
    """Show how far a record store is, where one is built."""
    bars: list[Progress] = []

    def show(now: int, total: int) -> None:
        if not bars:
            bars.append(stack.enter_context(Progress(total, "bytes", title="reading")))
        bars[0].advance(now - bars[0].done)

    with ExitStack() as stack:
        data.build_progress = show
        stack.callback(setattr, data, "build_progress", None)
        yield
