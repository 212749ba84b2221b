"""Pictures in tar files with their labels in members beside them, as in the WebDataset format.

Members whose file names are equal up to the first dot are one sample, and follow each other: `0001.jpg`, `0001.cls`,
`0001.json`. A tar file of class folders is read like the folders. Where records have several inputs, the column of each
further one is the ending of its member: `txt` for `0001.txt`, `left` for `0001.left.jpg`.
"""

import json
import posixpath
import tarfile
from collections.abc import Iterator, Mapping
from typing import IO, Any

from meristem.data.records import ReadOptions, Refusal, Source
from meristem.errors import DataError
from meristem_domains.vision.folders import LABEL, Found, class_and_part, is_hidden, is_picture_name

TEXTS = ("cls", "txt")
"""Endings of members that hold a label as text. The first of them that a sample has gives the label `label`."""

JSON = "json"
"""Ending of a member that holds labels by name, as a JSON object."""

SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")

_MAGIC_AT, _MAGIC = 257, b"ustar"


def is_tar(head: bytes, source: Source) -> bool:
    """Whether a file is a tar file, from its first bytes after decompression or its name."""
    return head[_MAGIC_AT:].startswith(_MAGIC) or source.path.lower().endswith(SUFFIXES)


def read_members(stream: IO[bytes], source: Source, options: ReadOptions) -> Iterator[Found]:
    """The pictures of a tar file, in the order of its members.

    Raises:
        DataError: the file is damaged, or no sample has a column that is asked for.
    """
    wanted = [name for name in (*options.label_columns, options.split_column, options.group_column) if name]
    inputs = {name: column or name for name, column in options.columns.items() if name != options.main}
    texts = (*TEXTS, *wanted, *inputs.values())
    known: set[str] = set()
    sample = _Sample("")
    try:
        with tarfile.open(fileobj=stream, mode="r|", tarinfo=_Header) as archive:
            for member in archive:
                name = posixpath.normpath(member.name).lstrip("/")
                if is_hidden(name) or member.isdir():
                    continue
                folder, _, last = name.rpartition("/")
                stem, _, ending = last.partition(".")
                key, ending = f"{folder}/{stem}", ending.lower()
                if key != sample.key:
                    yield from sample.finish(source, options, wanted, inputs, known)
                    sample = _Sample(key)
                if is_picture_name(name) and ending.rpartition(".")[0] in inputs.values():
                    sample.beside[ending.rpartition(".")[0]] = _content(archive, member)
                elif is_picture_name(name) and ending not in inputs.values():
                    sample.pictures.append((name, _content(archive, member)))
                elif ending in (*texts, JSON):
                    sample.beside[ending] = _content(archive, member)
            while rest := archive.fileobj.read(1 << 16):
                if rest.strip(b"\0"):
                    raise tarfile.ReadError("it goes on behind its end, as several put together do")
    except (tarfile.TarError, EOFError, ValueError, OSError) as error:
        raise DataError(f"{source.name}: damaged tar file: {' '.join(str(error).split())}") from error
    yield from sample.finish(source, options, wanted, inputs, known)
    lacking = [name for name in (*wanted, *inputs.values()) if name not in known]
    if lacking:
        raise DataError(
            f"{source.name}: no column {lacking[0]!r}: no member of a sample names it "
            f"({', '.join(f'NAME.{ending}' for ending in (*TEXTS, JSON))}), nor does a folder"
        )


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes | str:
    file = archive.extractfile(member) if member.isreg() else None
    return "a link, which cannot be followed in a tar file" if file is None else file.read()


class _Header(tarfile.TarInfo):
    """Raises an error at a damaged header, which Python takes for the end of the file."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> "_Header":
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.EmptyHeaderError as error:  # type: ignore[attr-defined]
            raise tarfile.ReadError("it ends without an end mark; it was cut off") from error
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from error


class _Sample:
    """The members of a tar file whose names are equal up to the first dot."""

    def __init__(self, key: str):
        self.key = key
        self.pictures: list[tuple[str, bytes | str]] = []
        self.beside: dict[str, bytes | str] = {}

    def finish(
        self, source: Source, options: ReadOptions, wanted: list[str], inputs: Mapping[str, str], known: set[str]
    ) -> Iterator[Found]:
        """The pictures with their labels and other inputs; the names of these are added to `known`."""
        if not self.pictures and TEXTS[0] in self.beside:
            reason = "a label without a picture beside it in the tar file"
            options.refuse(Refusal(source.within, 0, f"{self.key.lstrip('/')}.{TEXTS[0]}", reason))
        for name, content in self.pictures:
            labels: dict[str, Any] = {}
            others: dict[str, bytes | str] = {}
            try:
                labels = self._labels(name, options, wanted) if wanted else {}
                others = {name: self._input(column, name in options.foreign) for name, column in inputs.items()}
            except ValueError as error:
                content, labels = str(error), {}
            known.update(labels, self.beside)
            yield Found(name, content, labels, others)

    def _input(self, column: str, is_text: bool) -> bytes | str:
        """The content of a member beside the picture: a text, or the file of another picture."""
        content = self.beside.get(column)
        if not content or isinstance(content, str):
            raise ValueError(content or f"there is no member {self.key.rpartition('/')[2]}.{column} beside it")
        try:
            return content.decode("utf-8") if is_text else content
        except UnicodeDecodeError as error:
            raise ValueError(f"the member {column!r} beside it is not UTF-8") from error

    def _labels(self, name: str, options: ReadOptions, wanted: list[str]) -> dict[str, Any]:
        given: dict[str, Any] = {}
        if isinstance(self.beside.get(JSON), bytes):
            try:
                # numbers stay as they are written: 1.10 and 1.1 may be two classes
                given = json.loads(self.beside[JSON], parse_int=str, parse_float=str, parse_constant=str)
            except ValueError as error:
                raise ValueError(f"the labels beside it are no JSON: {error}") from error
            if not isinstance(given, dict):
                raise ValueError(f"the labels beside it must be a JSON object; got {type(given).__name__}")
        for ending, content in self.beside.items():
            if ending in (*TEXTS, *wanted) and isinstance(content, bytes):
                try:
                    given.setdefault(ending, content.decode("utf-8").strip())
                except UnicodeDecodeError as error:
                    raise ValueError(f"the label {ending!r} beside it is not UTF-8") from error
        text = next((given[ending] for ending in TEXTS if ending in given), None)
        of_folder, part = class_and_part(name, bool(options.split_column) and options.split_column not in given)
        for column, value in ((LABEL, text if text is not None else of_folder), (options.split_column, part)):
            if value is not None:
                given.setdefault(column, value)
        return {column: given[column] for column in wanted if given.get(column) is not None}
