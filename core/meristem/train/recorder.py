"""What is written down of a run: a row a step in `metrics.csv`, loggers, and a stop where the loss is no number."""

import csv
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L

from meristem.errors import CheckpointError
from meristem.files import write_file
from meristem.shapes import Tensor
from meristem.train.evals import Evals
from meristem.train.ranks import Ranks
from meristem.train.run_directory import RunDirectory, csv_text
from meristem.train.spec import Watch
from meristem.train.task import NotFinite, StepResult, Task

VALIDATION = "val/"


class MetricsFile:
    """A CSV file that rows are added to. Going on cuts off what will be computed again, and nothing else."""

    def __init__(self, path: Path):
        self.path = path
        self._columns: list[str] = []

    def keep_up_to(self, step: int) -> None:
        """Drop rows behind `step`, and one that was half written; the steps are computed again, bit for bit."""
        if not self.path.exists():
            return
        with self.path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.reader(file))
        if not rows:
            self.path.unlink()
            return
        self._columns, body = rows[0], rows[1:]
        kept = [row for row in body if len(row) == len(self._columns) and row[0].isdigit() and int(row[0]) <= step]
        write_file(self.path, csv_text([self._columns, *kept]).encode())

    def add(self, values: Mapping[str, Any], columns: list[str]) -> None:
        """Add a row; the columns must be those of the first row ever written."""
        head = [] if self._columns else [columns]
        self._columns = self._columns or columns
        if self._columns != columns:
            raise CheckpointError(f"{self.path} has other columns than this run: {', '.join(self._columns)}")
        with self.path.open("a", newline="", encoding="utf-8") as file:
            file.write(csv_text([*head, [values.get(name) for name in columns]]))


class Recorder(L.Callback):
    """Writes the exact figures of every step, and of every validation beside those of its step.

    Figures stay on the device until `every_n_steps` of them are there, so that a GPU does not wait each step.
    Loggers get the figures of every n-th step.
    """

    def __init__(self, run: RunDirectory, watch: Watch, every_n_steps: int, evals: Evals):
        self.file = MetricsFile(run.metrics)
        self.watch, self.every_n_steps, self.evals = watch, every_n_steps, evals
        self.last: dict[str, Any] = {}
        self.last_validation: dict[str, float] = {}
        self._waiting: list[tuple[int, Tensor, Tensor, float, float]] = []
        self._columns: list[str] = []
        self._began = time.monotonic()

    def on_train_start(self, trainer: L.Trainer, task: L.LightningModule) -> None:
        if Ranks.of(trainer).is_first:
            self.file.keep_up_to(trainer.global_step)
        self._began = time.monotonic()

    def on_train_batch_end(
        self, trainer: L.Trainer, task: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(task, Task)
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        now = time.monotonic()
        seconds, self._began = now - self._began, now
        self._waiting.append((trainer.global_step, task.summed(), task.grad_norm, task.step_lr, seconds))
        is_due = self.watch.is_due(trainer)
        if is_due or len(self._waiting) >= self.every_n_steps or task.device.type == "cpu":
            self.flush(trainer, task, hold_last=is_due)

    def flush(self, trainer: L.Trainer, task: Task, hold_last: bool = False) -> None:
        """Fetch the figures that wait, check them, and write them down.

        Args:
            hold_last: the row of the last step waits for its validation.

        Raises:
            NotFinite: a loss or a gradient is no number.
        """
        waiting, self._waiting = self._waiting, []
        for at, (step, flat, norm, lr, seconds) in enumerate(waiting):
            result = task.result_of(flat)
            grad_norm = float(norm)
            _check_finite(step, result, grad_norm)
            row: dict[str, Any] = {"step": step, **result.losses, "lr": lr, "grad_norm": grad_norm}
            row["tokens_per_second"] = round(result.num_tokens / max(seconds, 1e-9), 1)
            self.last = row
            if not self._columns:
                evaluated = [*result.losses, *task.metrics, *self.evals.names]
                self._columns = [*row, *(VALIDATION + name for name in evaluated)]
            if step % self.every_n_steps == 0 or step == 1:
                _log(trainer, {key: value for key, value in row.items() if key != "step"}, step)
            if not (hold_last and at == len(waiting) - 1):
                self._write(trainer, row)

    def on_validation_end(self, trainer: L.Trainer, task: L.LightningModule) -> None:
        assert isinstance(task, Task)
        values = evaluation_values(task) | self.evals.values(task)
        self.last_validation = values
        named = {VALIDATION + key: value for key, value in values.items()}
        _log(trainer, named, trainer.global_step)
        self._write(trainer, self.last | named)
        self._began = time.monotonic()

    def _write(self, trainer: L.Trainer, row: Mapping[str, Any]) -> None:
        if Ranks.of(trainer).is_first:
            self.file.add(row, self._columns)


def evaluation_values(task: Task) -> dict[str, float]:
    """Exact means and metrics of the part just evaluated."""
    return {**task.result_of(task.summed()).losses, **task.metric_values()}


def _check_finite(step: int, result: StepResult, grad_norm: float) -> None:
    wrong = [f"term {name!r} is {value}" for name, value in result.terms.items() if math.isinf(value)]
    if result.is_scored and not math.isfinite(result.loss):
        what = f"the loss is {result.loss}" + (f" ({', '.join(wrong)})" if wrong else "")
    elif not math.isfinite(grad_norm):
        what = f"the norm of the gradient is {grad_norm}"
    else:
        return
    raise NotFinite(
        f"step {step}: {what}; the last good checkpoint is kept; try a lower model.optimizer.lr, more "
        "model.optimizer.warmup_steps, a lower trainer.gradient_clip_val or trainer.precision 32-true, and another "
        "--run_dir"
    )


def _log(trainer: L.Trainer, values: Mapping[str, float], step: int) -> None:
    for logger in trainer.loggers:
        logger.log_metrics(dict(values), step=step)
