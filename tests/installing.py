"""Packages beside the tests: made up of a few lines (`write_package`), or built and installed by pip (`install`)."""

import importlib
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path


def write_package(
    target: Path,
    name: str,
    entry_points: Mapping[str, Mapping[str, str]],
    modules: Mapping[str, str] | None = None,
    version: str = "1.0",
) -> Path:
    """Write what pip leaves of a package in a folder: its modules, and a dist-info with entry points.

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
    """Build the wheel of a project and install it, as its user would: by pip, and without the network.

    Args:
        project: holds `pyproject.toml`; nothing is written into it.
        target: folder that is, or will be, on `sys.path`; its `wheels` keeps the wheel.

    Returns:
        The wheel.
    """
    built = target / "wheels" / project.name
    pip("wheel", "--no-build-isolation", "--wheel-dir", built, project)
    [wheel] = built.glob("*.whl")
    pip("install", "--target", target, wheel)
    importlib.invalidate_caches()
    return wheel


def pip(action: str, *arguments: object) -> None:
    """Run pip. It takes no index and no dependencies: those are installed beside the tests."""
    offline = ("--no-deps", "--no-index", "--disable-pip-version-check", "--quiet")
    command = [sys.executable, "-m", "pip", action, *offline, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
