"""A Hugging Face directory to a model, and back."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from meristem.data.tokenizer import Tokenizer
from meristem.errors import CheckpointError, ConfigError
from meristem.interop.families import FAMILIES, find_family
from meristem.interop.family import Family
from meristem.interop.weights import read_weights
from meristem.model.config import Init, TransformerConfig
from meristem.model.model import SYMBOLS, Model
from meristem.model.plain import from_json, to_json
from meristem.shapes import Tensor


@dataclass(frozen=True)
class Imported:
    """What a foreign directory holds.

    Attributes:
        family: that it is of.
        architecture: of trunk and symbol head.
        tokenizer: with the directory's own ids.
        model: in evaluation mode, on the CPU, in fp32.
        notes: what the user should know, such as tensors left out.
    """

    family: Family
    architecture: TransformerConfig
    tokenizer: Tokenizer
    model: Model
    notes: tuple[str, ...]


def read_directory(folder: Path) -> Imported:
    """Read a Hugging Face directory, strictly.

    Raises:
        CheckpointError: no family at home, a file that is missing or damaged, or tensors that are missing, extra or
            of another shape.
    """
    config = read_config_file(folder)
    family = find_family(folder / "config.json", config)
    file, tensors = read_weights(folder)
    tensors = family.table.spell(file, _with_prefix(family, tensors))
    heads = [head for head, prefix in family.heads.items() if any(name.startswith(prefix) for name in tensors)]
    try:
        architecture = family.read_config(config, tensors)
        # a second reading checks the type of every value
        architecture = from_json(TransformerConfig, to_json(architecture))
        if SYMBOLS not in heads:
            architecture = replace(architecture, head=None)
        tokenizer, notes = family.read_tokenizer(folder, config)
    except (ConfigError, TypeError, KeyError) as error:
        raise CheckpointError(f"{folder / 'config.json'}: {error}") from error
    with torch.device("meta"):
        model = Model(architecture, heads)
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    own, left_out = family.table.read(file, tensors, wanted)
    model.load_state_dict(own, strict=True, assign=True)
    return Imported(family, architecture, tokenizer, model.eval(), (*notes, *left_out))


def write_directory(folder: Path, architecture: TransformerConfig, tokenizer: Tokenizer, model: Model) -> list[str]:
    """Write a model as a Hugging Face directory: all of it or nothing.

    Args:
        folder: must be new or empty.

    Returns:
        Notes for the user: what the other library has no place for.

    Raises:
        ConfigError: no family at home can say this architecture; names what differs.
        CheckpointError: the place is taken.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder} must be new or an empty folder; it holds something else")
    family, config, notes = _family_for(architecture, tokenizer)
    files, left_out = _weights_of(family, architecture, model)
    has_symbols = SYMBOLS in model.heads
    config = {"architectures": [family.classes[0 if has_symbols else 1]], **config, "dtype": "float32"}

    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        save_file(files, part / "model.safetensors", metadata={"format": "pt"})
        for name, text in family.write_tokenizer(tokenizer).items():
            (part / name).write_text(text, encoding="utf-8")
        (part / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        # safetensors lets nobody else read what it writes; the rest obeys the user's umask
        shutil.copymode(part / "config.json", part / "model.safetensors")
        if folder.exists():
            folder.rmdir()
        part.rename(folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    return [*notes, *left_out]


def read_config_file(folder: Path) -> dict[str, Any]:
    """`config.json` of a directory.

    Raises:
        CheckpointError: it is missing or no JSON object.
    """
    file = folder / "config.json"
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(f"{folder} must be a model directory; it has no config.json") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} must be JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{file} must be a JSON object; got {type(values).__name__}")
    return values


def _with_prefix(family: Family, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names of a trunk that was saved alone, as those of one within a whole model."""
    if any(name.startswith(family.prefix) for name in tensors):
        return dict(tensors)
    return {family.prefix + name: tensor for name, tensor in tensors.items()}


def _weights_of(family: Family, architecture: TransformerConfig, model: Model) -> tuple[dict[str, Tensor], list[str]]:
    """Foreign tensors of a model, and notes on the heads that stay behind or are missing there."""
    heads = set(model.heads)
    tensors = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if not name.startswith("heads.") or name.split(".")[1] in family.heads
    }
    foreign = {**family.table.write(tensors, architecture), **family.derived(architecture)}
    if SYMBOLS not in heads:
        foreign = {name.removeprefix(family.prefix): tensor for name, tensor in foreign.items()}
    notes = []
    if left := sorted(heads - set(family.heads)):
        notes.append(f"heads of labels stay behind, the other library has no place for them: {', '.join(left)}")
    if lacking := sorted(set(family.heads) - heads):
        notes.append(f"the other library starts at random the heads that this model lacks: {', '.join(lacking)}")
    return foreign, notes


def _family_for(architecture: TransformerConfig, tokenizer: Tokenizer) -> tuple[Family, dict[str, Any], list[str]]:
    """The family whose config, written and read back, says this architecture."""
    reasons = []
    for family in FAMILIES:
        try:
            config = family.write_config(architecture, tokenizer)
            back = family.read_config(config, {})
            if architecture.head is None:
                back = replace(back, head=None)
        except (ConfigError, TypeError) as error:
            reasons.append(f"{family.name}: {error}")
            continue
        # what matters in training alone may differ: the numbers of the model do not depend on it
        differences = _differences(to_json(_resolved(architecture)), to_json(_resolved(back)))
        wrong = [name for name in differences if not name.endswith("dropout")]
        if not wrong:
            lost = [name for name in differences if name.endswith("dropout")]
            return family, config, [f"the other library has no {name}" for name in lost]
        reasons.append(f"{family.name} cannot have {', '.join(f'{n}={differences[n]!r}' for n in wrong)}")
    raise ConfigError(f"a model must be of a family that is at home to be exported; {'; '.join(reasons)}")


def _resolved(config: TransformerConfig) -> TransformerConfig:
    """The config with implied values written out, and without those that have no part in a forward pass."""
    attention = replace(config.attention, num_kv_heads=config.num_kv_heads, head_width=config.head_width)
    return replace(config, attention=attention, init=Init(), pool=None)


def _differences(ours: Any, theirs: Any, where: str = "") -> dict[str, Any]:
    """Our values that theirs lack, by dotted name."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        found: dict[str, Any] = {}
        for name, value in ours.items():
            found.update(_differences(value, theirs.get(name), f"{where}.{name}" if where else name))
        return found
    return {} if ours == theirs else {where: ours}
