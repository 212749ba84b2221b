"""The config of a run: files and overrides, through LightningCLI, to typed and resolved values."""

import argparse
import inspect
import re
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import lightning as L
import yaml
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from meristem.cli.config_reader import NumberLoader, ReadConfig, merge, read_configs
from meristem.cli.configs import find_config
from meristem.domain import load_domain
from meristem.errors import ConfigError
from meristem.model.config import TransformerConfig
from meristem.model.plain import from_json, to_json
from meristem.objectives.masked import Masked
from meristem.objectives.objective import Objective
from meristem.objectives.supervised import Supervised
from meristem.train.datamodule import DataModule, Split, build_tokenizer
from meristem.train.optim import OptimizerConfig
from meristem.train.task import Task
from meristem.train.watch import Watch

ARCHITECTURE = "model.architecture"

TOP_KEYS = "model, data, trainer, watch, run_dir, seed"

OBJECTIVES = (Masked, Supervised)
"""The core's own; jsonargparse knows a class by its short name once it is imported."""

TRAINER_KEYS = (
    "accelerator",
    "accumulate_grad_batches",
    "benchmark",
    "callbacks",
    "detect_anomaly",
    "deterministic",
    "devices",
    "enable_progress_bar",
    "gradient_clip_val",
    "limit_val_batches",
    "log_every_n_steps",
    "logger",
    "max_steps",
    "max_time",
    "num_nodes",
    "plugins",
    "precision",
    "profiler",
    "strategy",
)
"""Of Lightning's trainer, what has a meaning here: a run is counted in steps, not epochs, and saved by `watch`."""

TRAINER_DEFAULTS = {"max_steps": 1000, "gradient_clip_val": 1.0, "log_every_n_steps": 10}

FREE_KEYS = (
    "trainer.max_steps",
    "trainer.max_time",
    "trainer.log_every_n_steps",
    "trainer.enable_progress_bar",
    "trainer.logger",
    "trainer.profiler",
    "trainer.callbacks",
    "trainer.devices",
    "trainer.accelerator",
    "trainer.num_nodes",
    "trainer.strategy",
    "trainer.accumulate_grad_batches",
    "data.num_workers",
    "data.cache_dir",
    "watch",
    "run_dir",
)
"""What may change when a run goes on: nothing that its past would contradict."""


def build_task(
    architecture: dict[str, Any] | None,
    objective: Objective,
    optimizer: OptimizerConfig = OptimizerConfig(),  # noqa: B008 (frozen)
    init_from: str | None = None,
    freeze_trunk: bool = False,
    dropout: float | None = None,
    seed: int = 0,
) -> Task:
    """A model, an objective and an optimiser.

    Args:
        architecture: a preset of the domain (`preset: esm2_8m`), or the fields of a transformer (`width`,
            `num_layers`, `attention.num_heads`, `feedforward.width` ...), or both: fields go over the preset's.
        objective: what the model is trained for: `Masked`, `Supervised`, or one of the domain's.
        optimizer: AdamW and its schedule.
        init_from: a model directory to start from; its architecture is then used.
        freeze_trunk: only heads are trained.
        dropout: of every residual branch; null leaves what the architecture says.
        seed: of initial weights and dropout.
    """
    config = None if architecture is None else from_json(TransformerConfig, architecture)
    return Task(config, objective, optimizer, init_from, freeze_trunk, dropout, seed)


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
                architecture, model["init_from"], model["dropout"] = None, str(init_from), None
            task = build_task(architecture, **model, seed=self.seed)
            made.data.seed = self.seed
            return task, made.data
        except ConfigError as error:
            raise _placed(error, self._read) from error


def parse(argv: list[str], verb: str) -> RunConfig | None:
    """The config that `argv` says; None where only help or the config was asked for.

    Raises:
        ConfigError: with file and line of the key, where a file has it.
    """
    names, architecture, rest, is_print = _sort_arguments(argv)
    paths = [find_config(name) for name in names]
    read = read_configs(paths)
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
            raise ConfigError(_explain(str(error), read)) from error
        except ConfigError as error:
            raise _placed(error, read) from error
    resolved = yaml.load(_quietly(cli.parser.dump, cli.config, skip_none=False), Loader=NumberLoader)
    resolved.pop("config", None)
    if resolved["model"]["init_from"]:
        resolved["model"]["architecture"] = None
    else:
        try:
            resolved["model"]["architecture"] = resolve_architecture(wanted, resolved["data"])
        except ConfigError as error:
            raise _placed(error, read) from error
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


def resolve_architecture(wanted: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
    """The whole architecture as plain values: a preset, what goes over it, and the tokenizer's vocabulary.

    Raises:
        ConfigError: a preset that the domain does not have, or fields that do not fit.
    """
    domain = load_domain(data["domain"])
    tokenizer = build_tokenizer(domain, data["tokenizer"] or {})
    wanted = merge({}, wanted)
    preset = wanted.pop("preset", None)
    values: dict[str, Any] = {}
    if preset is not None:
        if preset not in domain.presets:
            raise ConfigError(
                f"architecture.preset must be one of {', '.join(domain.presets) or 'none'}; got {preset!r}"
            )
        values = merge({}, to_json(domain.presets[preset]))
    elif not wanted:
        raise ConfigError(
            f"model.architecture must be set (a preset: {', '.join(domain.presets)}; or width, num_layers ...), "
            "or model.init_from a model directory"
        )
    merge(values, wanted)
    embedding = values.setdefault("embedding", {})
    if isinstance(embedding, dict):
        embedding.setdefault("vocab_size", len(tokenizer.vocab))
        if embedding.get("mask_dropout_frac") and embedding.get("mask_id") is None:
            embedding["mask_id"] = tokenizer.mask_id
    config = from_json(TransformerConfig, values)
    if config.embedding.vocab_size < len(tokenizer.vocab):
        raise ConfigError(
            f"architecture.embedding.vocab_size must be {len(tokenizer.vocab)} or more, as {domain.name} has so many "
            f"symbols; got {config.embedding.vocab_size}"
        )
    return to_json(config)


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


def _placed(error: ConfigError, read: ReadConfig) -> ConfigError:
    """The error with file and line of the key it speaks of."""
    text = str(error)
    for word in re.findall(r"[a-z_]\w*(?:\.\w+)*", text.replace("architecture takes", "architecture")):
        for prefix in ("", "model.", "data.", f"{ARCHITECTURE}.", "model.optimizer."):
            place = _nested(f"{prefix}{word}", "", read)
            if place in read.places and "." in place:
                return ConfigError(f"{read.places[place]}: {text}")
    return error


def _explain(text: str, read: ReadConfig) -> str:
    """One line out of what jsonargparse says, with file and line where a file has the key."""
    key = ""
    for inner in re.findall(r'Parser key "([^"]+)"', text):
        key = inner if not key or inner.startswith(f"{key}.") else f"{key}.{inner}"
    class_path = (re.findall(r"Problem with given class_path '([^']+)'", text) or [""])[-1]
    if unknown := re.search(r"Group '([^']+)' does not accept option '([^']+)'", text):
        group, option = unknown.groups()
        parent = f"{group}.{option}".rpartition(".")[0]
        return f"{read.place(f'{group}.{option}')}{group}.{option} is no key; {parent} takes {_keys_of(parent)}"
    if unknown := re.search(r"Option '([^']+)' is not accepted", text):
        option = unknown.group(1)
        place = read.place(_nested(key, option, read))
        takes = _parameters_of(class_path) if class_path else TOP_KEYS
        option = option if class_path or key else option.partition(".")[0]
        return f"{place}{option} is no key{f' of {key}' if key else ''}; it takes {takes}"
    if missing := re.search(r"required: (.+)", text):
        return f"{missing.group(1)} must be set (--{missing.group(1).split(',')[0]} VALUE, or in the config)"
    if unknown := re.search(r"unrecognized arguments: (.+)", text):
        option = unknown.group(1).split()[0].removeprefix("--").partition("=")[0]
        parent = option.rpartition(".")[0]
        takes = f"{parent} takes {_keys_of(parent)}" if "." in option else f"keys are {TOP_KEYS}"
        return f"--{option} is no key; {takes}"
    place = read.place(_nested(key, "", read))
    if "Expected a dot import path string" in text:
        named = ", ".join(sorted(_subclasses(Objective)))
        return f"{place}{key} must be one of {named}, or a dotted path to a class; got {text.rpartition(': ')[2]!r}"
    expected = list(dict.fromkeys(re.findall(r"Expected an? (.+?)(?:\. Got value|$)", text, flags=re.MULTILINE)))
    got = re.search(r"Got value: (.+)", text) or re.search(r"Given value: (.+)", text)
    if expected:
        allowed = " or ".join(_plain(kind) for kind in expected)
        return f"{place}{key} must be {allowed}; got {got.group(1) if got else 'something else'}"
    return f"{place}{' '.join(text.split())}"


def _nested(key: str, option: str, read: ReadConfig) -> str:
    """A key as the file has it: classes stand with `init_args`, lists with numbers."""
    wanted = [part for part in f"{key}.{option}".split(".") if part]
    for place in read.places:
        parts = [part for part in place.split(".") if part != "init_args" and not part.isdigit()]
        if parts == wanted:
            return place
    return ".".join(wanted)


def _plain(kind: str) -> str:
    """A type as a user would name it."""
    if literal := re.fullmatch(r"typing\.Literal\[(.+)\]", kind):
        return f"one of {literal.group(1)}"
    named = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text", "NoneType": "null"}
    name = re.sub(r"<class '(?:.*\.)?(\w+)'>", r"\1", kind)
    return named.get(name, f"a {name}")


def _keys_of(group: str) -> str:
    known = {
        "model": [*inspect.signature(build_task).parameters][:-1],
        "data": [*inspect.signature(DataModule.__init__).parameters][1:-1],
        "trainer": list(TRAINER_KEYS),
        "watch": [f.name for f in fields(Watch)],
        "data.split": [f.name for f in fields(Split)],
        "model.optimizer": [f.name for f in fields(OptimizerConfig)],
    }
    return ", ".join(known.get(group, known.get(group.partition(".")[0], ["model", "data", "trainer", "watch"])))


def _parameters_of(class_path: str) -> str:
    module, _, name = class_path.rpartition(".")
    found = getattr(import_module(module), name)
    if is_dataclass(found):
        return ", ".join(f.name for f in fields(found))
    return ", ".join(list(inspect.signature(found.__init__).parameters)[1:])


def _subclasses(base: type) -> list[str]:
    names: list[str] = []
    child: type
    for child in base.__subclasses__():
        names += [child.__name__, *_subclasses(child)]
    return names


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
