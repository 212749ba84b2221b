"""Finds configs: files of the user's own, and those that ship with Meristem (`<domain>/sample`)."""

import difflib
from importlib import resources
from pathlib import Path

from meristem.errors import ConfigError


def shipped_configs() -> dict[str, Path]:
    """The configs that ship with Meristem, by `<domain>/<name>`."""
    package = Path(str(resources.files("meristem")))
    wheel, checkout = package / "configs", package.parents[1] / "configs"
    folder = wheel if wheel.is_dir() else checkout
    found = sorted(folder.glob("*/*.yaml"))
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in found}


def find_config(name: str) -> Path:
    """The file that `--config NAME` means.

    Args:
        name: a path; or, where there is no such file, `<domain>/<name>` of a shipped config, with or without `.yaml`.

    Raises:
        ConfigError: neither a file nor a shipped config.
    """
    path = Path(name)
    if path.is_file():
        return path
    shipped = shipped_configs()
    plain = name.removesuffix(".yaml").removesuffix(".yml")
    if plain in shipped:
        return shipped[plain]
    got = "a folder" if path.is_dir() else "no such file"
    near = difflib.get_close_matches(plain, shipped, n=1)
    hint = f"; nearest: {near[0]}" if near else ""
    raise ConfigError(
        f"--config must be a file or a shipped config; got {name!r} ({got}){hint}; "
        f"shipped: {', '.join(shipped) or 'none'}"
    )
