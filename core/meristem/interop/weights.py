"""Read the tensors of a directory: safetensors or `.bin`, whole or in shards. No code in a file is run.

Names and shapes are known at once, a tensor is read when it is asked for and held by nobody here: what fills a
model with them needs the memory of one model and not of two.
"""

import json
import pickle
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from meristem.errors import CheckpointError
from meristem.shapes import Tensor

FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""Where a directory may keep its weights; the first that is there is read."""

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Types of safetensors that are read."""


class SafePart:
    """A safetensors file, read by offsets, because a mapped file counts as memory while it is open."""

    def __init__(self, file: Path):
        try:
            with safe_open(file, framework="pt"):  # refuses what is damaged
                pass
            with file.open("rb") as stream:
                length = int.from_bytes(stream.read(8), "little")
                header = json.loads(stream.read(length))
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{file} must be a safetensors file: {error}") from error
        header.pop("__metadata__", None)
        if wrong := sorted({entry["dtype"] for entry in header.values()} - set(DTYPES)):
            raise CheckpointError(f"{file}: tensors must be of {', '.join(DTYPES)}; got {wrong[0]}")
        self.file, self._header, self._start = file, header, 8 + length
        self.shapes = {name: torch.Size(entry["shape"]) for name, entry in header.items()}

    def read(self, name: str) -> Tensor:
        entry = self._header[name]
        begin, end = entry["data_offsets"]
        data = np.fromfile(self.file, np.uint8, end - begin, offset=self._start + begin)
        if len(data) < end - begin:
            raise CheckpointError(f"{self.file} was cut short while it was read")
        return torch.from_numpy(data).view(DTYPES[entry["dtype"]]).view(entry["shape"])

    def close(self) -> None:
        """Nothing is held open between two reads."""


class BinPart:
    """A file that `torch.save` wrote; held open while tensors are read from it, and mapped where possible."""

    def __init__(self, file: Path):
        self.file = file
        self._tensors: dict[str, Tensor] | None = None
        self.shapes = {name: tensor.shape for name, tensor in self._open().items()}
        self.close()

    def read(self, name: str) -> Tensor:
        return self._open()[name].clone()

    def close(self) -> None:
        self._tensors = None

    def _open(self) -> dict[str, Tensor]:
        if self._tensors is not None:
            return self._tensors
        try:
            # files from before torch 1.6 are no archives, and cannot be mapped
            is_archive = zipfile.is_zipfile(self.file)
            tensors = torch.load(self.file, map_location="cpu", weights_only=True, mmap=is_archive or None)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            reason = str(error).partition("\n")[0]
            raise CheckpointError(
                f"{self.file} must be a file of tensors, and of nothing that runs: {reason}"
            ) from error
        if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
            raise CheckpointError(f"{self.file} must map names to tensors; got {type(tensors).__name__}")
        self._tensors = tensors
        return tensors


Part = SafePart | BinPart
"""A file of tensors: their `shapes` by name; `read` copies one into new memory, `close` frees what is held between."""


@dataclass(frozen=True)
class Weights(Mapping[str, Tensor]):
    """Tensors by name. Each is read from its file on access; floats become fp32.

    Attributes:
        file: the file that lists them, for messages.
        places: file and name within it, by name.
    """

    file: Path
    places: Mapping[str, tuple[Part, str]]

    def __getitem__(self, name: str) -> Tensor:
        part, stored = self.places[name]
        for other in {id(p): p for p, _ in self.places.values()}.values():
            if other is not part:  # one file open at a time
                other.close()
        tensor = part.read(stored)
        return tensor.float() if tensor.is_floating_point() else tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)

    def shape(self, name: str) -> torch.Size:
        """Shape of a tensor, without reading it."""
        part, stored = self.places[name]
        return part.shapes[stored]

    def renamed(self, change: Callable[[str], str]) -> "Weights":
        """The same tensors under other names.

        Raises:
            CheckpointError: two tensors of one name.
        """
        places: dict[str, tuple[Part, str]] = {}
        for old, place in self.places.items():
            name = change(old)
            if name in places:
                raise CheckpointError(f"{self.file}: a tensor must be there once; got {name} under two names")
            places[name] = place
        return Weights(self.file, places)


def open_weights(folder: Path) -> Weights:
    """Open all tensors of a directory.

    Raises:
        CheckpointError: no file of weights, or one that is damaged, or a shard that is missing.
    """
    found = [folder / name for name in FILES if (folder / name).is_file()]
    if not found:
        raise CheckpointError(f"{folder} must hold one of {', '.join(FILES)}; it holds none")
    places: dict[str, tuple[Part, str]] = {}
    for file in _shards(found[0]) if found[0].suffix == ".json" else [found[0]]:
        part: Part = SafePart(file) if file.suffix == ".safetensors" else BinPart(file)
        if twice := sorted(set(places) & set(part.shapes)):
            raise CheckpointError(f"{found[0]}: a tensor must be there once; got {twice[0]} in two files")
        places.update({name: (part, name) for name in part.shapes})
    return Weights(found[0], places)


def read_safetensors(file: Path) -> dict[str, Tensor]:
    """Read all tensors of a safetensors file.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    part = SafePart(file)
    return {name: part.read(name) for name in part.shapes}


def refuse_tensors(where: Path, missing: Sequence[str], extra: Sequence[str], shapes: Sequence[str]) -> None:
    """Raise an error unless the three lists of wrong tensors are empty.

    Raises:
        CheckpointError: names what is missing, extra and of another shape.
    """
    wrong = [
        f"{what}: {', '.join(names[:5])}{f' and {len(names) - 5} more' if len(names) > 5 else ''}"
        for what, names in (("missing", missing), ("extra", extra), ("of another shape", shapes))
        if names
    ]
    if wrong:
        raise CheckpointError(f"{where}: tensors must be those of the architecture; {'; '.join(wrong)}")


def _shards(index: Path) -> list[Path]:
    try:
        values: Any = json.loads(index.read_text(encoding="utf-8"))
        names = sorted(set(values["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} must be a JSON object with weight_map: {error}") from error
    for name in names:
        if Path(name).name != name:
            raise CheckpointError(f"{index} must name files beside it; got {name!r}")
        if not (index.parent / name).is_file():
            raise CheckpointError(f"{index} names {name}, which is missing")
    return [index.parent / name for name in names]
