"""Train the model of a `RunSpec`, or continue a stopped run; evaluate the model of a run directory."""

import copy
import importlib
import logging
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import disable_possible_user_warnings

from meristem.errors import CheckpointError, ConfigError, DataError, UserError
from meristem.figures.predictions import draw_confusion
from meristem.files import write_file
from meristem.model.heads import readouts_of
from meristem.train.datamodule import DataModule
from meristem.train.evals import Evals
from meristem.train.keeper import AtomicCheckpointIO, Keeper, Stopped
from meristem.train.progress import TrainingProgress, shown_reading
from meristem.train.ranks import Ranks
from meristem.train.recorder import Recorder, evaluation_values
from meristem.train.run_directory import RunDirectory, csv_text
from meristem.train.spec import RunSpec, TrainerSpec, Watch, values_of
from meristem.train.task import Task

Say = Callable[[str], None]


def say(line: str) -> None:
    """Print a line on stderr."""
    print(line, file=sys.stderr, flush=True)


def fit(spec: RunSpec, say: Say = say) -> RunDirectory:
    """Train to `trainer.max_steps`, from where the run in `run_dir` stands; `say` takes lines for the user.

    Returns:
        Where the run keeps its things, such as `best_model`.

    Raises:
        ConfigError: what is said cannot be, or the run was started otherwise.
        DataError: a record that cannot be used, by file and line.
        KeyboardInterrupt, SystemExit: the run was asked to stop, by SIGINT or SIGTERM; what it could is saved.

    Example:
        >>> run = meristem.fit(spec)
        >>> meristem.load(run.path).embed(["MKTAYIAKQR"]).shape
    """
    run, values = RunDirectory(Path(spec.folder)), values_of(spec)
    if run.is_started:
        run.require_same(values, type(spec.model.objective))
        if more := _finished(spec, run):
            say(f"{run.path} is finished: {run.read_state()['finished']}")
            say(f"  model: {run.best_model}")
            say(f"  to go on: meristem fit --config {run.config} {more}")
            return run
    task, data = build(spec)
    with shown_reading(data):
        data.bind(task)
    evals = Evals(spec.evals or (), spec.data)
    _check_monitor(task, data, spec.watch, evals)
    is_new = not run.path.exists()
    try:
        run.path.mkdir(parents=True, exist_ok=True)
        run.write_config(values)
        if data.refused:
            refused = [["where", "id", "reason"], *([one.where, one.id, one.reason] for one in data.refused)]
            write_file(run.refused, csv_text(refused).encode())
        _train(task, data, evals, run, spec, say)
    except UserError:
        if is_new and not run.last_checkpoint.exists():
            shutil.rmtree(run.path, ignore_errors=True)
        raise
    except (FileExistsError, NotADirectoryError) as error:
        raise ConfigError(f"run_dir must be a folder or new; {error.filename} is a file") from error
    except Stopped as stop:
        say(f"stopped; the same command goes on from step {stop.step:,}")
        if stop.number == 2:
            raise KeyboardInterrupt from None
        raise SystemExit(128 + stop.number) from None
    say(f"done: {run.read_state()['finished']}")
    for name, path in {"model": run.best_model, "last": run.last_model, "curves": run.curves}.items():
        say(f"  {name:<8}{path}")
    return run


def _finished(spec: RunSpec, run: RunDirectory) -> str:
    """Arguments with which a finished run would go on; empty for a run that is not finished."""
    state, max_steps, patience = run.read_state(), spec.trainer.max_steps, spec.watch.patience
    if not state.get("finished"):
        return ""
    if state["step"] >= max_steps:
        return f"--trainer.max_steps {2 * state['step']}"
    is_same = (state["max_steps"], state["patience"]) == (max_steps, patience)
    return f"--watch.patience {2 * (patience or 1)}" if is_same else ""


def build(spec: RunSpec) -> tuple[Task, DataModule]:
    """The task and the data of a run; nothing is read yet. The objective is copied, so that a spec can be run again."""
    architecture = values_of(spec)["model"]["architecture"]
    model = replace(spec.model, architecture=architecture, objective=copy.deepcopy(spec.model.objective))
    return Task(model, spec.seed), DataModule(spec.data, spec.seed)


def _train(task: Task, data: DataModule, evals: Evals, run: RunDirectory, spec: RunSpec, say: Say) -> None:
    """Run the training loop from the last checkpoint, or from the start; `Stopped` where a signal asked for it."""
    checkpoint = run.checkpoint_to_go_on_from()
    recorder = Recorder(run, spec.watch, spec.trainer.log_every_n_steps or 1, evals)
    keeper = Keeper(run, spec.watch, recorder, say)
    greeter = LambdaCallback(on_train_start=lambda trainer, _: _greet(trainer, task, say))
    bars = [] if spec.trainer.enable_progress_bar is False else [TrainingProgress(recorder)]
    try:
        with _fewer_warnings():
            trainer = build_trainer(_limited(spec.trainer, data), [greeter, recorder, *bars, keeper], run, spec.watch)
            trainer.fit(task, datamodule=data, ckpt_path=checkpoint, weights_only=True)
            keeper.finish(trainer, task)
    finally:
        keeper.restore_handlers()


def validate(spec: RunSpec, say: Say = say) -> dict[str, float]:
    """Evaluate the model of a run directory on the validation part of its data.

    Returns:
        Figures by name: `loss`, the metrics of the objective, and what `evals` measure.

    Raises:
        CheckpointError: the run has left no model, or one that lacks what the objective needs.
        DataError: there is no such part.

    Example:
        >>> meristem.validate(spec)["loss"]
    """
    return _measure(spec, "validation", say)


def test(spec: RunSpec, say: Say = say) -> dict[str, float]:  # noqa: PT028 (no test of pytest)
    """Evaluate the model of a run directory on the test part of its data; otherwise as `validate`.

    Example:
        >>> meristem.test(spec)["loss"]
    """
    return _measure(spec, "test", say)


def _measure(spec: RunSpec, part: Literal["validation", "test"], say: Say) -> dict[str, float]:
    run = RunDirectory(Path(spec.folder))
    if not run.best_model.exists():
        raise CheckpointError(f"{run.path} must be a run that has left a model; {run.best_model} is not there")
    run.require_same(values_of(spec), type(spec.model.objective))
    model = replace(spec.model, init_from=str(run.best_model), dropout=None, drop_path=None)
    task, data = build(replace(spec, model=model))
    with shown_reading(data):
        data.bind(task)
    for line in data.remarks:
        say(line)
    evals = Evals(spec.evals or () if part == "validation" else (), spec.data)
    checkpoint = run.last_checkpoint if _is_measured_by_checkpoint(task) else None
    say(f"{part} part, {checkpoint or run.best_model}")
    if checkpoint is not None and not checkpoint.exists():
        raise CheckpointError(
            f"objective {type(task.objective).__name__} is evaluated with what it has beside the model, which "
            f"{checkpoint} would hold; it is not there"
        )
    values: dict[str, float] = {}

    def catch(*_: Any) -> None:
        values.update(evaluation_values(task))

    catcher = LambdaCallback(on_validation_end=catch, on_test_end=catch)
    with _fewer_warnings():
        chosen = replace(_limited(spec.trainer, data), logger=False, max_steps=1)
        trainer = build_trainer(chosen, [catcher], None, Watch())
        evaluate = trainer.test if part == "test" else trainer.validate
        evaluate(task, datamodule=data, verbose=False, ckpt_path=checkpoint, weights_only=True)
    if task.fresh_heads:
        raise CheckpointError(f"the model must have the heads of the objective; it lacks {', '.join(task.fresh_heads)}")
    if not values:
        raise DataError(f"there is no {part} part; see data.split")
    classes = {readout.name: readout.classes for readout in readouts_of(task.objective.heads)}
    for name, counts in task.confusion_values().items():
        drawn = run.path / f"confusion_{name}_{part}.png"
        draw_confusion(drawn, {f"{name}, {part}": counts.numpy()}, classes[name])
        say(f"confusion matrix: {drawn}")
    return values | evals.measure(run.best_model)


def _check_monitor(task: Task, data: DataModule, watch: Watch, evals: Evals) -> None:
    """Check that validation measures `watch.monitor`, and that there is a validation part for `evals`."""
    own = ["loss", *task.objective.metrics()]
    measured = [*own, *evals.names]
    names = [*{name.partition("/")[0] for name in own}, *(suite.name for suite in evals.suites)]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ConfigError(f"evals must have names of their own (init_args.name); got twice: {', '.join(sorted(twice))}")
    if "validation" not in data.parts and evals.names:
        raise ConfigError("evals need a validation part; see data.split")
    is_term = watch.monitor.startswith("loss/")  # terms are known when the first pack is there
    if "validation" in data.parts and watch.monitor not in measured and not is_term:
        raise ConfigError(f"watch.monitor must be one of {', '.join(measured)}; got {watch.monitor!r}")
    if "validation" not in data.parts and watch.patience:
        raise ConfigError("watch.patience needs a validation part; see data.split")


def _is_measured_by_checkpoint(task: Task) -> bool:
    """Whether the objective has parameters beside the model (a decoder, a teacher), which no model directory holds."""
    with torch.device("meta"):
        beside = task.objective.build(task.architecture)
    return any(True for _ in beside.parameters())


def build_trainer(spec: TrainerSpec, callbacks: list[L.Callback], run: RunDirectory | None, watch: Watch) -> L.Trainer:
    """Lightning's trainer as a run needs it: endless epochs, validation by steps, nothing saved by itself."""
    options = {one.name: _made(getattr(spec, one.name)) for one in fields(spec)}
    loggers = [] if options["logger"] is True else _as_list(options["logger"])
    if run is not None and spec.logger is not False:
        loggers = [TensorBoardLogger(run.path, name="tensorboard", version=""), *loggers]
    if spec.precision is None:
        is_bf16 = spec.accelerator != "cpu" and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        options["precision"] = "bf16-mixed" if is_bf16 else "32-true"
    if spec.devices == "auto" and not torch.cuda.is_available():
        options["devices"] = 1
    return L.Trainer(
        **options
        | {
            "logger": loggers or False,
            "callbacks": [*_as_list(options["callbacks"]), *callbacks],
            "plugins": [*_as_list(options["plugins"]), AtomicCheckpointIO()],
            "enable_progress_bar": False,
        },
        max_epochs=-1,
        val_check_interval=watch.validate_every_n_steps * spec.accumulate_grad_batches,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )


def _made(value: Any) -> Any:
    """An object that a config names by `class_path` and `init_args`; other values as they are."""
    if isinstance(value, list):
        return [_made(one) for one in value]
    if not isinstance(value, Mapping) or "class_path" not in value:
        return value
    module, _, name = str(value["class_path"]).rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)(**(value.get("init_args") or {}))
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ConfigError(f"trainer: {value['class_path']} cannot be made: {error}") from error


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value] if value else []


def _limited(spec: TrainerSpec, data: DataModule) -> TrainerSpec:
    """A spec whose limit of validation packs is for all processes together; Lightning's is for each of them."""
    limit = spec.limit_val_batches
    if limit is None:
        return spec
    data.limits = {"validation": limit}
    return replace(spec, limit_val_batches=1.0) if isinstance(limit, float) and limit else spec


def _greet(trainer: L.Trainer, task: Task, say: Say) -> None:
    """Print the data, the model's size and the devices before the first step."""
    ranks = Ranks.of(trainer)
    if not ranks.is_first:
        return
    num_parameters = sum(p.numel() for p in task.model.parameters())
    num_trained = sum(p.numel() for p in task.model.parameters() if p.requires_grad)
    trained = f" ({num_trained:,} trained)" if num_trained < num_parameters else ""
    config = task.architecture
    for line in [*trainer.datamodule.remarks, *task.remarks]:  # type: ignore[attr-defined]
        say(line)
    say(
        f"model: {num_parameters:,} parameters{trained}, {config.num_layers} layers of width {config.width}; "
        f"{task.device.type} x {ranks.count}, {trainer.precision}"
    )
    if trainer.ckpt_path:
        say(f"goes on from step {trainer.global_step:,}")


@contextmanager
def _fewer_warnings() -> Iterator[None]:
    """Hide Lightning's advice on data loaders, which does not apply to the loaders used here."""
    with warnings.catch_warnings():
        disable_possible_user_warnings()
        warnings.filterwarnings("ignore", module="lightning")
        logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
        yield
