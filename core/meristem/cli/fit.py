"""`meristem fit`, `validate`, `test`: from a config to a run directory, and figures of what it left."""

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from meristem.errors import CheckpointError, ConfigError, UserError

if TYPE_CHECKING:
    from meristem.cli.run_config import RunConfig
    from meristem.train.datamodule import DataModule


def run_argv(argv: list[str], verb: str) -> int:
    """Parse the arguments of a run, and fit it or evaluate it."""
    from meristem.cli.run_config import parse

    config = parse(argv, verb)
    if config is None:
        return 0
    return _fit(config) if verb == "fit" else _evaluate(config, verb)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@contextmanager
def _progress_of(data: "DataModule") -> Iterator[None]:
    """Show how far a record store is, where one is built."""
    from meristem.progress import Progress

    shown: list[Progress] = []
    done = 0

    def show(now: int, total: int) -> None:
        nonlocal done
        if not shown:
            shown.append(Progress(total, "bytes", title="reading").__enter__())
        shown[0].advance(now - done)
        done = now

    data.build_progress = show
    try:
        yield
    finally:
        data.build_progress = None
        if shown:
            shown[0].__exit__(None, None, None)


def _fit(config: "RunConfig") -> int:
    from meristem.files import write_file
    from meristem.train.keeper import Stopped
    from meristem.train.run import fit
    from meristem.train.run_directory import RunDirectory, refusals_as_csv

    run = RunDirectory(config.run_dir)
    if run.is_started:
        config.check_same(run.config)
        state = run.read_state()
        max_steps, patience = config.trainer["max_steps"], config.watch.patience
        is_all = state.get("step", 0) >= max_steps
        if state.get("finished") and (is_all or (state["max_steps"], state["patience"]) == (max_steps, patience)):
            _say(f"{run.path} is finished: {state['finished']}")
            _say(f"  model: {run.best_model}")
            more = f"--trainer.max_steps {2 * state['step']}" if is_all else f"--watch.patience {2 * (patience or 1)}"
            _say(f"  to go on: {config.command} {more}")
            return 0
    task, data = config.build()
    with _progress_of(data):
        data.bind(task)
    is_new = not run.path.exists()
    try:
        run.path.mkdir(parents=True, exist_ok=True)
        write_file(run.config, config.to_yaml().encode())
        if data.refused:
            write_file(run.refused, refusals_as_csv(data.refused))
        fit(task, data, run, config.watch, config.trainer, _say)
    except UserError:
        if is_new and not run.last_checkpoint.exists():
            shutil.rmtree(run.path, ignore_errors=True)
        raise
    except (FileExistsError, NotADirectoryError) as error:
        raise ConfigError(f"run_dir must be a folder or new; {error.filename} is a file") from error
    except Stopped as stop:
        _say(f"stopped; the same command goes on from step {stop.step:,}")
        if stop.number == 2:
            raise KeyboardInterrupt from None
        raise SystemExit(128 + stop.number) from None
    _say(f"done: {run.read_state()['finished']}")
    for name, path in {"model": run.best_model, "last": run.last_model, "curves": run.curves}.items():
        _say(f"  {name:<8}{path}")
    return 0


def _evaluate(config: "RunConfig", verb: str) -> int:
    from meristem.figures.predictions import draw_confusion
    from meristem.model.heads import readouts_of
    from meristem.train.run import evaluate, is_evaluated_by_checkpoint
    from meristem.train.run_directory import RunDirectory

    run = RunDirectory(config.run_dir)
    if not run.best_model.exists():
        raise CheckpointError(f"{run.path} must be a run that has left a model; {run.best_model} is not there")
    config.check_same(run.config)
    task, data = config.build(init_from=run.best_model)
    with _progress_of(data):
        data.bind(task)
    for line in data.remarks:
        _say(line)
    part = "validation" if verb == "validate" else "test"
    checkpoint = run.last_checkpoint if is_evaluated_by_checkpoint(task) else None
    values = evaluate(task, data, part, config.trainer, checkpoint)
    width = max(len(name) for name in values)
    print(f"{part} part, {checkpoint or run.best_model}")
    for name, value in values.items():
        print(f"  {name:<{width}}  {value:.5g}")
    classes = {readout.name: readout.classes for readout in readouts_of(task.objective.heads)}
    for name, counts in task.confusion_values().items():
        drawn = run.figure(f"confusion_{name}_{part}")
        draw_confusion(drawn, {f"{name}, {part}": counts.numpy()}, classes[name])
        _say(f"confusion matrix: {drawn}")
    return 0
