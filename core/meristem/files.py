"""Files and folders that are written as a whole or not at all, and JSON objects that are read strictly."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from meristem.errors import DataError, UserError

TEMPORARY = ".tmp"
"""Ending of the names of files that are being written."""


@contextmanager
def replacing(path: Path, folder: Path | None = None) -> Iterator[Path]:
    """Yield a new temporary file that takes the place of `path` when the block ends without an error.

    The temporary file has a name of its own, so two writers never share one. Its content is on the disk before it is
    renamed. After an error it is removed, and `path` stays as it was.

    Args:
        folder: where the temporary file lies, on the same disk; None for beside `path`.
    """
    handle, name = tempfile.mkstemp(prefix=f"{path.name}.", suffix=TEMPORARY, dir=folder or path.parent)
    temporary = Path(name)
    try:
        os.fchmod(handle, 0o666 & ~_umask())  # mkstemp lets nobody else read the file
        os.close(handle)
        yield temporary
        _sync(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync(path.parent)


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Yield a new temporary folder for files; it takes the place of `path` when the block ends without an error.

    Its files are on the disk before it is renamed. After an error it is removed, and `path` stays as it was.
    """
    part, old = (path.with_name(path.name + ending) for ending in (".part", ".old"))
    for leftover in (part, old):
        shutil.rmtree(leftover, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        for file in part.rglob("*"):
            if file.is_file():
                file.chmod(0o666 & ~_umask())  # safetensors lets nobody else read what it writes
            _sync(file)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    if path.exists():
        path.rename(old)
    part.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def write_file(path: Path, content: bytes, folder: Path | None = None) -> None:
    """Write a small file, and its folder where there is none: afterwards it is the old file or the new one.

    Args:
        folder: as in `replacing`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, folder) as temporary:
        temporary.write_bytes(content)


def write_json(path: Path, values: Any, folder: Path | None = None) -> None:
    """Write plain values as indented JSON, by `write_file`."""
    write_file(path, (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "replace"), folder)


def read_json(path: Path, error: type[UserError] = DataError) -> dict[str, Any]:
    """The JSON object that a file holds; raises `error` where it is missing, cannot be read or holds something else."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as missing:
        raise error(f"{path}: no such file") from missing
    except (OSError, ValueError) as wrong:
        raise error(f"{path} must be JSON: {wrong}") from wrong
    if not isinstance(values, dict):
        raise error(f"{path} must be a JSON object; got {type(values).__name__}")
    return values


def _umask() -> int:
    """The bits that the user wants new files to lack; there is no way to read them but to set them."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
