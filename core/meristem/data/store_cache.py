"""Where record stores are kept, and by which key a store is found again."""

import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path

from meristem.data.records import ReadOptions, Source
from meristem.errors import DataError

VERSION = 4
"""Changes with the format, so that a store of another one is not opened but built anew."""


def default_cache_dir() -> Path:
    """Where stores are kept: `$MERISTEM_CACHE`, else `~/.cache/meristem`."""
    return Path(os.environ.get("MERISTEM_CACHE") or Path.home() / ".cache" / "meristem")


def store_key(
    sources: Sequence[Source], options: ReadOptions, name: str, named: Mapping[Source, Sequence[Path]]
) -> str:
    """A hash of everything that a store depends on."""
    if not sources:
        raise DataError("there must be at least one source of records; got none")
    wanted = {key: value for key, value in asdict(replace(options, on_error=None)).items() if key != "batch_bytes"}
    wanted |= {"version": VERSION, "name": name, "is_refusing": options.on_error is None}
    wanted["columns"] = list(options.columns.items())  # their order counts
    digest = hashlib.blake2b(json.dumps(wanted, sort_keys=True, default=str).encode(), digest_size=16)
    for source in sources:
        if source.is_stdin:
            raise DataError("<stdin>: training data is read more than once; write it to a file and name that")
        is_folder = os.path.isdir(source.path)
        root = Path(source.path) if is_folder else Path(source.path).parent
        for path in named[source]:
            digest.update(json.dumps([os.path.relpath(path, root), *_facts_of(path)]).encode())
        if is_folder:
            if not named[source]:
                raise DataError(f"{source.name}: is a directory; name the files in it")
            continue
        # a reader may go by the ending of a name, so it counts as content
        digest.update(json.dumps(Path(source.path).suffixes[-2:]).encode())
        try:
            with open(source.path, "rb") as file:
                digest.update(hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).digest())
        except FileNotFoundError as error:
            raise DataError(f"{source.name}: no such file") from error
        except OSError as error:
            raise DataError(f"{source.name}: cannot be read: {error.strerror}") from error
    return digest.hexdigest()


def _facts_of(file: Path) -> tuple[int, int]:
    """Size and time of the last change; of a file that is not there, none."""
    try:
        facts = file.stat()
    except OSError:
        return -1, -1
    return facts.st_size, facts.st_mtime_ns


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make the folder and let one builder in at a time: the others wait and find the store built.

    Without locks on its disk, all build. Errors of the disk name the folder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
        try:
            with suppress(OSError):
                fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)
    except OSError as error:
        what = f"cannot be written ({error.strerror or error}); make it writable"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            what = "no space is left on its disk; free some"
        raise DataError(f"{folder}: the cache of record stores: {what}, or set MERISTEM_CACHE") from error
