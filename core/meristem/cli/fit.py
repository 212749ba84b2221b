"""`meristem fit`, `validate`, `test`: from a config to a run directory, and figures of what it left."""

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from meristem.cli.run_config import RunConfig


def run_argv(argv: list[str], verb: str) -> int:
    """Parse the arguments of a run, and fit it or evaluate it."""
    from meristem.cli.run_config import parse

    config = parse(argv, verb)
    if config is None:
        return 0
    return _fit(config) if verb == "fit" else _evaluate(config, verb)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _fit(config: "RunConfig") -> int:
    from meristem.train.keeper import Stopped
    from meristem.train.run import fit
    from meristem.train.run_directory import RunDirectory, write_atomically

    run = RunDirectory(config.run_dir)
    if run.is_started:
        config.check_same(run.config)
        state = run.read_state()
        if state.get("finished") and state["step"] >= config.trainer["max_steps"]:
            _say(f"{run.path} is finished: {state['finished']}")
            _say(f"  model: {run.best_model}")
            _say(f"  to go on: {config.command} --trainer.max_steps {2 * state['step']}")
            return 0
    task, data = config.build()
    run.path.mkdir(parents=True, exist_ok=True)
    write_atomically(run.config, config.to_yaml().encode())
    try:
        fit(task, data, run, config.watch, config.trainer, _say)
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
    raise NotImplementedError
