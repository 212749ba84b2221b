"""Runs a task: starts it, or goes on where it stopped, and evaluates what it left."""

import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import disable_possible_user_warnings

from meristem.errors import CheckpointError, ConfigError, DataError
from meristem.train.datamodule import DataModule
from meristem.train.gallery import Gallery
from meristem.train.keeper import AtomicCheckpointIO, Keeper
from meristem.train.progress import TrainingProgress
from meristem.train.ranks import Ranks
from meristem.train.recorder import Recorder, evaluation_values
from meristem.train.run_directory import RunDirectory
from meristem.train.task import Task
from meristem.train.watch import Watch

Say = Callable[[str], None]


def fit(
    task: Task, data: DataModule, run: RunDirectory, watch: Watch, trainer_options: dict[str, Any], say: Say
) -> None:
    """Train to `max_steps`, from where the run stands.

    Args:
        run: exists, with its config.
        data: bound to the task.
        trainer_options: of Lightning's trainer.
        say: takes lines for the user.

    Raises:
        keeper.Stopped: a signal asked for it.
    """
    _check_monitor(task, data, watch)
    checkpoint = run.checkpoint_to_go_on_from()
    recorder = Recorder(run, watch, trainer_options.get("log_every_n_steps") or 1)
    keeper = Keeper(run, watch, recorder, say)
    greeter = _Greeter(say)
    callbacks = [greeter, recorder, Gallery(run)]
    if trainer_options.get("enable_progress_bar") is not False:
        callbacks.append(TrainingProgress(recorder))
    if trainer_options["max_steps"] < 1:
        raise ConfigError(f"trainer.max_steps must be 1 or more; got {trainer_options['max_steps']}")
    try:
        with _fewer_warnings():
            trainer = build_trainer(_limited(trainer_options, data), [*callbacks, keeper], run, watch)
            trainer.fit(task, datamodule=data, ckpt_path=checkpoint, weights_only=True)
            keeper.finish(trainer, task)
    finally:
        keeper.restore_handlers()


def _check_monitor(task: Task, data: DataModule, watch: Watch) -> None:
    """Refuse to watch what no validation will measure."""
    measured = ["loss", *task.objective.metrics()]
    is_term = watch.monitor.startswith("loss/")  # terms are known when the first pack is there
    if "validation" in data.parts and watch.monitor not in measured and not is_term:
        raise ConfigError(f"watch.monitor must be one of {', '.join(measured)}; got {watch.monitor!r}")
    if "validation" not in data.parts and watch.patience:
        raise ConfigError("watch.patience needs a validation part; see data.split")


def is_evaluated_by_checkpoint(task: Task) -> bool:
    """Whether the objective has parameters beside the model (a decoder, a teacher), which no model directory holds.

    Args:
        task: bound to its data.
    """
    with torch.device("meta"):
        beside = task.objective.build(task.architecture)
    return any(True for _ in beside.parameters())


def evaluate(
    task: Task, data: DataModule, part: str, trainer_options: dict[str, Any], checkpoint: Path | None = None
) -> dict[str, float]:
    """Figures of a model on a part of its data.

    Args:
        part: `validation` or `test`.
        checkpoint: of the run, to be evaluated in the place of the task's model.

    Raises:
        CheckpointError: the model lacks what the objective needs, or there is no such checkpoint.
        DataError: there is no such part.
    """
    if checkpoint is not None and not checkpoint.exists():
        raise CheckpointError(
            f"objective {type(task.objective).__name__} is evaluated with what it has beside the model, which "
            f"{checkpoint} would hold; it is not there"
        )
    caught = _Caught()
    with _fewer_warnings():
        options = {**_limited(trainer_options, data), "logger": False, "max_steps": 1}
        trainer = build_trainer(options, [caught], None, Watch())
        run = trainer.test if part == "test" else trainer.validate
        run(task, datamodule=data, verbose=False, ckpt_path=checkpoint, weights_only=True)
    if task.fresh_heads:
        raise CheckpointError(f"the model must have the heads of the objective; it lacks {', '.join(task.fresh_heads)}")
    if not caught.values:
        raise DataError(f"there is no {part} part; see data.split")
    return caught.values


def build_trainer(
    options: dict[str, Any], callbacks: list[L.Callback], run: RunDirectory | None, watch: Watch
) -> L.Trainer:
    """Lightning's trainer as a run needs it: endless epochs, validation by steps, nothing saved by itself."""
    options = dict(options)
    loggers = options.pop("logger", None)
    given = [] if loggers in (None, True, False) else loggers if isinstance(loggers, list) else [loggers]
    if run is not None and loggers is not False:
        given = [TensorBoardLogger(run.path, name="tensorboard", version=""), *given]
    options.pop("enable_progress_bar", None)
    more = options.pop("callbacks", None) or []
    more = more if isinstance(more, list) else [more]
    plugins = options.pop("plugins", None) or []
    plugins = plugins if isinstance(plugins, list) else [plugins]
    if options.get("precision") is None:
        is_bf16 = options.get("accelerator") != "cpu" and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        options["precision"] = "bf16-mixed" if is_bf16 else "32-true"
    if options.get("devices") in (None, "auto") and not torch.cuda.is_available():
        options["devices"] = 1
    accumulate = options.get("accumulate_grad_batches") or 1
    return L.Trainer(
        **{**options, "accumulate_grad_batches": accumulate},
        logger=given or False,
        callbacks=[*more, *callbacks],
        plugins=[*plugins, AtomicCheckpointIO()],
        max_epochs=-1,
        val_check_interval=watch.validate_every_n_steps * accumulate,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def _limited(options: dict[str, Any], data: DataModule) -> dict[str, Any]:
    """Options whose limit of validation packs is for all processes together; Lightning's is for each of them."""
    limit = options.get("limit_val_batches")
    if limit is None:
        return options
    data.limits = {"validation": limit}
    return {**options, "limit_val_batches": 1.0} if isinstance(limit, float) and limit else options


class _Greeter(L.Callback):
    """Says once what is trained on what, before the first step."""

    def __init__(self, say: Say):
        self.say = say

    def on_train_start(self, trainer: L.Trainer, task: L.LightningModule) -> None:
        assert isinstance(task, Task)
        ranks = Ranks.of(trainer)
        if not ranks.is_first:
            return
        num_parameters = sum(p.numel() for p in task.model.parameters())
        num_trained = sum(p.numel() for p in task.model.parameters() if p.requires_grad)
        trained = f" ({num_trained:,} trained)" if num_trained < num_parameters else ""
        config = task.architecture
        for line in [*trainer.datamodule.remarks, *task.remarks]:  # type: ignore[attr-defined]
            self.say(line)
        self.say(
            f"model: {num_parameters:,} parameters{trained}, {config.num_layers} layers of width {config.width}; "
            f"{task.device.type} x {ranks.count}, {trainer.precision}"
        )
        if trainer.ckpt_path:
            self.say(f"goes on from step {trainer.global_step:,}")


class _Caught(L.Callback):
    def __init__(self) -> None:
        self.values: dict[str, float] = {}

    def on_validation_end(self, trainer: L.Trainer, task: L.LightningModule) -> None:
        assert isinstance(task, Task)
        self.values = evaluation_values(task)

    def on_test_end(self, trainer: L.Trainer, task: L.LightningModule) -> None:
        self.on_validation_end(trainer, task)


class _fewer_warnings:
    """Lightning's advice on data loaders is about loaders that are not ours."""

    def __enter__(self) -> None:
        self._catch = warnings.catch_warnings()
        self._catch.__enter__()
        disable_possible_user_warnings()
        warnings.filterwarnings("ignore", module="lightning")
        logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)

    def __exit__(self, *raised: object) -> None:
        self._catch.__exit__(*raised)  # type: ignore[arg-type]
