"""Tensors of a directory, in safetensors or in `.bin`, whole or in shards; nothing in them is run."""

import json
import pickle
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from meristem.errors import CheckpointError
from meristem.shapes import Tensor

FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""Where a directory may keep its weights; the first that is there is read."""


def read_weights(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """All tensors of a directory, floats in fp32, and the file that lists them.

    Raises:
        CheckpointError: no file of weights, or one that is damaged, or a shard that is missing.
    """
    found = [folder / name for name in FILES if (folder / name).is_file()]
    if not found:
        raise CheckpointError(f"{folder} must hold one of {', '.join(FILES)}; it holds none")
    file = found[0]
    tensors: dict[str, Tensor] = {}
    for part in _shards(file) if file.suffix == ".json" else [file]:
        tensors.update(read_safetensors(part) if part.suffix == ".safetensors" else _read_bin(part))
    return file, {name: value.float() if value.is_floating_point() else value for name, value in tensors.items()}


def read_safetensors(file: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a mapping)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} must be a safetensors file: {error}") from error


def refuse_tensors(where: Path, missing: Sequence[str], extra: Sequence[str], shapes: Sequence[str]) -> None:
    """Refuse tensors that are not exactly those of the architecture; nothing happens where none is wrong.

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


def _read_bin(file: Path) -> dict[str, Tensor]:
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"{file} must be a file of tensors, and of nothing that runs: {reason}") from error
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise CheckpointError(f"{file} must map names to tensors; got {type(tensors).__name__}")
    return tensors


def _shards(index: Path) -> list[Path]:
    """The files that an index names, which must lie beside it."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{index} must be a JSON object with weight_map: {error}") from error
    for name in names:
        if Path(name).name != name:
            raise CheckpointError(f"{index} must name files beside it; got {name!r}")
        if not (index.parent / name).is_file():
            raise CheckpointError(f"{index} names {name}, which is missing")
    return [index.parent / name for name in names]
