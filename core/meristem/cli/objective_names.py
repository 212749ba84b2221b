"""Names of installed objectives in configs and arguments, replaced by the import paths that jsonargparse takes."""

import json
from importlib import import_module
from typing import Any

import yaml

from meristem.cli.config_reader import NumberLoader, ReadConfig
from meristem.cli.run_keys import OBJECTIVE
from meristem.errors import ConfigError
from meristem.objectives.objective import Objective
from meristem.registry import find, installed

GROUP = "meristem.objectives"


def with_class_path(objective: Any) -> Any:
    """What a config says of an objective, with the name of an installed one replaced by the import path of its class.

    Args:
        objective: a name, or a mapping with a `class_path`; anything else comes back as it is.

    Raises:
        ConfigError: several packages offer the name, the one that does cannot be imported, or offers no objective.
    """
    if isinstance(objective, str) and objective in installed(GROUP):
        found = find(GROUP, objective)
        if not (isinstance(found, type) and issubclass(found, Objective)):
            raise ConfigError(f"objective {objective!r} must be a subclass of Objective; its package offers {found!r}")
        return f"{found.__module__}.{found.__qualname__}"
    if isinstance(objective, dict):  # the arguments of an objective may be objectives
        return {
            key: with_class_path(value) if key == "class_path" or isinstance(value, dict) else value
            for key, value in objective.items()
        }
    return objective


def objective_class(said: Any) -> type[Objective]:
    """The class of the objective that a config names.

    Raises:
        ConfigError: there is no such class.
    """
    said = with_class_path(said)
    path = str(said["class_path"] if isinstance(said, dict) and "class_path" in said else said)
    module, _, name = path.rpartition(".")
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{OBJECTIVE} must name an objective; got {path!r}") from error
    if not (isinstance(found, type) and issubclass(found, Objective)):
        raise ConfigError(f"{OBJECTIVE} must name an objective; got {path!r}")
    return found


def name_in_config(values: dict[str, Any], read: ReadConfig) -> None:
    """Replace the name of the objective in the values of one config file.

    Raises:
        ConfigError: as `with_class_path`, with file and line.
    """
    model = values.get("model")
    if isinstance(model, dict) and "objective" in model:
        try:
            model["objective"] = with_class_path(model["objective"])
        except ConfigError as error:
            raise ConfigError(f"{read.place(OBJECTIVE)}{error}") from error


def name_in_arguments(arguments: list[str]) -> list[str]:
    """Arguments with the name of the objective replaced.

    Raises:
        ConfigError: as `with_class_path`.
    """
    keys = {f"--{OBJECTIVE}{part}" for part in ("", ".class_path", ".help")}
    left, done = list(arguments), []
    while left:
        word = left.pop(0)
        key, has_value, value = word.partition("=")
        if key not in keys or not (has_value or left):
            done.append(word)
            continue
        found = with_class_path(yaml.load(value if has_value else left.pop(0), Loader=NumberLoader))
        done += [key, found if isinstance(found, str) else json.dumps(found)]
    return done
