"""The files that `meristem domains new NAME` writes: a working domain as a package of its own."""

import keyword
import re
import sys
from importlib.metadata import entry_points
from importlib.resources import files
from pathlib import Path
from string import Template

from meristem.errors import ConfigError
from meristem.files import replacing_folder

FILES = {
    "pyproject.toml.in": "pyproject.toml",
    "README.md.in": "README.md",
    "domain.py.in": "$name/__init__.py",
    "sample.fasta": "$name/sample.fasta",
    "test_domain.py.in": "tests/test_$name.py",
}
"""Template and where it goes; `$name` is the domain's name in both."""


def write_domain(name: str, parent: Path) -> Path:
    """Write the domain `name` into `parent / name`, all of it or nothing.

    Args:
        name: a Python identifier in lower case that no module, domain or folder has yet.

    Raises:
        ConfigError: the name cannot be used, or the folder is there already.
    """
    if not re.fullmatch("[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        raise ConfigError(f"NAME must be a Python identifier in lower case; got {name!r}; for example: lab_rna")
    if name in sys.stdlib_module_names or name in ("meristem", "meristem_domains"):
        raise ConfigError(f"NAME must not hide a module that is there; got {name!r}; for example: my_{name}")
    # a package of that very name is an earlier run of this command; it may be written again where it is gone
    taken = [p for p in entry_points(group="meristem.domains", name=name) if p.dist is None or p.dist.name != name]
    if taken:
        raise ConfigError(f"NAME must be a new domain's; {name!r} is installed already (meristem domains list)")
    folder = parent / name
    if folder.exists():
        raise ConfigError(f"{name}/ must not exist yet; it does, and is left as it is")
    with replacing_folder(folder) as part:
        for template, target in FILES.items():
            path = part / Template(target).substitute(name=name)
            path.parent.mkdir(parents=True, exist_ok=True)
            text = files(__name__).joinpath(template).read_text("utf-8")
            path.write_text(Template(text).substitute(name=name), encoding="utf-8")
    return folder
