"""The config of a run: files and overrides, through LightningCLI, to typed and resolved values."""

import argparse
import inspect
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import yaml
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from meristem.cli.config_errors import explain, placed
from meristem.cli.config_reader import NumberLoader, ReadConfig, read_configs
from meristem.cli.configs import find_config
from meristem.cli.objective_names import GROUP, name_in_arguments, name_in_config, objective_class
from meristem.cli.run_keys import ARCHITECTURE, FREE_KEYS, OBJECTIVE, TRAINER_DEFAULTS, TRAINER_KEYS, build_task
from meristem.domain import load_domain
from meristem.errors import ConfigError
from meristem.model.plain import merge, to_json
from meristem.registry import find_all
from meristem.train.architecture import resolve_architecture
from meristem.train.datamodule import DataModule
from meristem.train.task import Task
from meristem.train.watch import Watch


class RunParser(LightningArgumentParser):
    """Says what is wrong by an exception."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **{**kwargs, "exit_on_error": False})


class RunCLI(LightningCLI):
    """LightningCLI with the three parts of a config, `watch`, `run_dir` and one seed for all."""

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--run_dir", type=str | None, default=None, help="where the run is kept")
        parser.add_argument("--seed", type=int, default=0, help="of weights, order, corruption and dropout")
        parser.add_argument("--watch", type=Watch, default=Watch(), help="when to validate, save and stop")

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        known = set(inspect.signature(L.Trainer.__init__).parameters) - {"self"}
        parser.add_class_arguments(
            L.Trainer, "trainer", instantiate=False, fail_untyped=False, skip=known - set(TRAINER_KEYS)
        )
        parser.set_defaults({f"trainer.{key}": value for key, value in TRAINER_DEFAULTS.items()})
        parser.add_function_arguments(build_task, "model", fail_untyped=False, sub_configs=True, skip={"seed"})
        parser.add_class_arguments(DataModule, "data", fail_untyped=False, sub_configs=True, skip={"seed"})

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self.config = parser.parse_args(args)

    def _set_seed(self) -> None:
        """Each random thing takes its own seed from `seed`."""

    def instantiate_classes(self) -> None:
        """Nothing is made before the whole config is known to be right."""


@dataclass
class RunConfig:
    """A run's config, whole.

    Attributes:
        values: resolved, as `config.yaml` keeps them.
        trainer: arguments of Lightning's trainer.
        watch: when to validate, save and stop.
        run_dir: where the run is kept.
        seed: of everything random.
        command: arguments that a user would type to run this again.
    """

    values: dict[str, Any]
    trainer: dict[str, Any]
    watch: Watch
    run_dir: Path
    seed: int
    command: str
    _cli: RunCLI
    _read: ReadConfig

    def to_yaml(self) -> str:
        """As `config.yaml` keeps it."""
        return yaml.safe_dump(self.values, sort_keys=False)

    def check_same(self, path: Path) -> None:
        """Refuse to go on with a run that was started with another config.

        Raises:
            ConfigError: names what differs, and the command that goes on.
        """
        if not path.exists():
            return
        old = _flat(yaml.load(path.read_text(encoding="utf-8"), Loader=NumberLoader))
        new = _flat(self.values)
        free = tuple(f"{key}." for key in FREE_KEYS)
        differing = [
            key
            for key in sorted(old.keys() | new.keys())
            if old.get(key) != new.get(key) and not f"{key}.".startswith(free)
        ]
        if differing:
            key = differing[0]
            more = f" and {len(differing) - 1} more" if len(differing) > 1 else ""
            raise ConfigError(
                f"{path.parent} was started otherwise: {key} was {old.get(key)!r}, is {new.get(key)!r}{more}; "
                f"to go on with it: meristem fit --config {path}; to start anew: --run_dir ANOTHER"
            )

    def build(self, init_from: Path | None = None) -> tuple[Task, DataModule]:
        """The task and the data module.

        Args:
            init_from: a model directory to take instead of what the config starts from.

        Raises:
            ConfigError: with file and line of the key, where a file has it.
        """
        architecture = self.values["model"]["architecture"]
        try:
            made = _quietly(self._cli.parser.instantiate, self._cli.config)
            model = _without(made.model, "architecture")
            if init_from is not None:
                architecture = None
                model |= {"init_from": str(init_from), "dropout": None, "drop_path": None}
            task = build_task(architecture, **model, seed=self.seed)
            made.data.seed = self.seed
            return task, made.data
        except ConfigError as error:
            raise placed(error, self._read) from error


def parse(argv: list[str], verb: str) -> RunConfig | None:
    """The config that `argv` says; None where only help or the config was asked for.

    Raises:
        ConfigError: with file and line of the key, where a file has it.
    """
    names, architecture, rest, is_print = _sort_arguments(argv)
    rest = name_in_arguments(rest)
    if any(word in ("-h", "--help") or word.startswith(f"--{OBJECTIVE}.help") for word in rest):
        find_all(GROUP)  # help lists the classes that are imported
    paths = [find_config(name) for name in names]
    read = read_configs(paths, name_in_config)
    values = read.values
    if not isinstance(values.get("model", {}), dict):
        raise ConfigError(f"{read.place('model')}model must be a mapping; got {values['model']!r}")
    model = dict(values.get("model", {}))
    wanted = merge({}, model.pop("architecture", None) or {})
    merge(wanted, architecture)
    values = {**values, "model": model} if model else {k: v for k, v in values.items() if k != "model"}
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", encoding="utf-8") as file:
        yaml.safe_dump(values, file, sort_keys=False)
        file.flush()
        try:
            base = ["--config", file.name] if values else []
            cli = _quietly(
                RunCLI,
                parser_class=RunParser,
                parser_kwargs={"prog": f"meristem {verb}", "description": (__doc__ or "").splitlines()[0]},
                save_config_callback=None,
                args=[*base, "--model.architecture", "{}", *rest],
                run=False,
                auto_configure_optimizers=False,
                load_from_checkpoint_support=False,
            )
        except argparse.ArgumentError as error:
            raise ConfigError(explain(str(error), read)) from error
        except ConfigError as error:
            raise placed(error, read) from error
    resolved = yaml.load(_quietly(cli.parser.dump, cli.config, skip_none=False), Loader=NumberLoader)
    resolved.pop("config", None)
    if resolved["model"]["init_from"]:
        resolved["model"]["architecture"] = None
    else:
        try:
            data = resolved["data"]
            domain = load_domain(data["domain"])
            tokenizer = domain.build_tokenizer(**(data["tokenizer"] or {}))
            objective = objective_class(resolved["model"]["objective"])
            resolved["model"]["architecture"] = to_json(resolve_architecture(wanted, domain, tokenizer, objective))
        except ConfigError as error:
            raise placed(error, read) from error
    if resolved["run_dir"] is None:
        resolved["run_dir"] = f"runs/{paths[-1].stem if paths else 'unnamed'}"
    if is_print:
        print(yaml.safe_dump(resolved, sort_keys=False), end="")
        return None
    return RunConfig(
        values=resolved,
        trainer=dict(cli.config.trainer),
        watch=cli.config.watch if isinstance(cli.config.watch, Watch) else Watch(**dict(cli.config.watch)),
        run_dir=Path(resolved["run_dir"]),
        seed=resolved["seed"],
        command=" ".join([f"meristem {verb}", *argv]),
        _cli=cli,
        _read=read,
    )


def _quietly(call: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Call what uses jsonargparse as Lightning does: it warns of what its next version takes away."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return call(*args, **options)


def _sort_arguments(argv: list[str]) -> tuple[list[str], dict[str, Any], list[str], bool]:
    """Config names, what is said of the architecture, all else, and whether the config is to be printed."""
    names: list[str] = []
    architecture: dict[str, Any] = {}
    rest: list[str] = []
    is_print = False
    left = list(argv)
    while left:
        word = left.pop(0)
        key, has_value, value = word.partition("=")
        if word == "--print_config":
            is_print = True
            continue
        is_architecture = key == f"--{ARCHITECTURE}" or key.startswith(f"--{ARCHITECTURE}.")
        if key not in ("--config", "-c") and not is_architecture:
            rest.append(word)
            continue
        if not has_value:
            if not left or left[0].startswith("--"):
                raise ConfigError(f"{key} needs a value")
            value = left.pop(0)
        if not is_architecture:
            names.append(value)
            continue
        said: Any = yaml.load(value, Loader=NumberLoader)
        path = [part for part in key.removeprefix(f"--{ARCHITECTURE}").split(".") if part]
        if not path and isinstance(said, str):
            said = {"preset": said}
        for part in reversed(path):
            said = {part: said}
        if not isinstance(said, dict):
            raise ConfigError(f"{key} must be a preset or a mapping; got {value!r}")
        merge(architecture, said)
    return names, architecture, rest, is_print


def _without(namespace: Any, *names: str) -> dict[str, Any]:
    return {key: value for key, value in vars(namespace).items() if key not in names}


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested values by dotted key."""
    if not isinstance(values, dict) or not values:
        return {prefix: values}
    return {
        key: value
        for name, inner in values.items()
        for key, value in _flat(inner, f"{prefix}.{name}".lstrip(".")).items()
    }
