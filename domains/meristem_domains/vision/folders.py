"""Pictures in folders, whose names give class and part."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from meristem.data.records import Source
from meristem.errors import DataError
from meristem_domains.vision.pictures import SUFFIXES

LABEL = "label"
"""Name of the label that a folder gives."""


@dataclass(frozen=True)
class Found:
    """A picture of a source.

    Attributes:
        id: path within the source.
        payload: content of the file, or the reason why it cannot be read.
        labels: labels by name; also the part of the split, by the name of the split column.
        others: payloads of the other inputs by name: contents of picture files, or texts.
    """

    id: str
    payload: bytes | str
    labels: Mapping[str, Any]
    others: Mapping[str, bytes | str] = field(default_factory=dict)


@dataclass(frozen=True)
class Pictures:
    """The pictures in a folder.

    Attributes:
        paths: paths of the pictures, with `/`, sorted.
        classes: paths of the folders that name a class.
        empty: paths of the class folders without a picture.
    """

    paths: tuple[str, ...]
    classes: tuple[str, ...]
    empty: tuple[str, ...]


def class_and_part(path: str, has_parts: bool) -> tuple[str | None, str | None]:
    """Class and part of the picture at a path within its source; None where no folder names one.

    Args:
        has_parts: whether the top folder names a part, such as train, and the next one the class.
    """
    *folders, _ = path.split("/")
    part = folders.pop(0) if has_parts and folders else None
    return (folders[0] if folders else None), part


def is_hidden(path: str) -> bool:
    """Whether the name of a file, or of a folder above it, begins with a dot, or is that of macOS archives."""
    return any(name.startswith(".") or name == "__MACOSX" for name in path.split("/"))


def is_picture_name(path: str) -> bool:
    return path.lower().endswith(SUFFIXES)


def find_pictures(source: Source, has_parts: bool = False) -> Pictures:
    """All pictures in a folder and its subfolders, recognised by their endings, without hidden ones.

    Args:
        has_parts: as for `class_and_part`.

    Raises:
        DataError: there is no picture, or a folder cannot be read.
    """
    paths: list[str] = []
    classes: set[str] = set()
    depth = 2 if has_parts else 1
    num_others = 0
    seen: set[tuple[int, int]] = set()

    def fail(error: OSError) -> None:
        raise DataError(f"{error.filename}: cannot be read: {error.strerror or error}") from error

    for place, folders, names in os.walk(source.path, onerror=fail, followlinks=True):
        facts = os.stat(place)
        if (facts.st_dev, facts.st_ino) in seen:  # a link that leads back
            folders.clear()
            continue
        seen.add((facts.st_dev, facts.st_ino))
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        inner = os.path.relpath(place, source.path).replace(os.sep, "/")
        if inner != "." and inner.count("/") == depth - 1:
            classes.add(inner)
        for name in names:
            path = name if inner == "." else f"{inner}/{name}"
            if is_picture_name(name) and not is_hidden(name):
                paths.append(path)
            else:
                num_others += 1
    if not paths:
        others = f"; it has {num_others:,} other file(s)" if num_others else ""
        raise DataError(f"{source.name}: no picture in the folder ({', '.join(SUFFIXES[:5])} ...){others}")
    paths.sort(key=lambda path: path.split("/"))
    filled = {"/".join(path.split("/")[:depth]) for path in paths}
    return Pictures(tuple(paths), tuple(sorted(classes)), tuple(sorted(classes - filled)))
