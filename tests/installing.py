"""Packages as pip leaves them in a folder, made without a build: modules, and a dist-info with entry points."""

import importlib
import shutil
import tomllib
from collections.abc import Mapping
from pathlib import Path


def write_package(
    target: Path,
    name: str,
    entry_points: Mapping[str, Mapping[str, str]],
    modules: Mapping[str, str] | None = None,
    version: str = "1.0",
) -> Path:
    """Install a package that is made up.

    Args:
        target: folder that is, or will be, on `sys.path`.
        entry_points: by group, then by name.
        modules: source of each module by its name.

    Returns:
        The folder.
    """
    info = target / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "RECORD").write_text("")
    lines = []
    for group, points in entry_points.items():
        lines += [f"[{group}]", *(f"{key} = {value}" for key, value in points.items()), ""]
    (info / "entry_points.txt").write_text("\n".join(lines))
    for module, source in (modules or {}).items():
        (target / f"{module}.py").write_text(source)
    importlib.invalidate_caches()
    return target


def install(project: Path, target: Path) -> Path:
    """Install the package of a project folder: what `pip install --no-deps --target` leaves of it.

    Args:
        project: holds `pyproject.toml` and the package's folder, which has the project's name.
    """
    values = tomllib.loads((project / "pyproject.toml").read_text())["project"]
    name = values["name"].replace("-", "_")
    write_package(target, name, values.get("entry-points", {}), version=values["version"])
    shutil.copytree(project / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
    return target
