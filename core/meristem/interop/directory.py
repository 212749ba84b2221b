"""Read a model directory of another library (import), and write one (export)."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from meristem.data.tokenizer import Tokenizer
from meristem.errors import CheckpointError, ConfigError, UserError
from meristem.files import read_json, replacing_folder
from meristem.interop.family import Family, find_family, installed_families
from meristem.interop.weights import Weights, open_weights
from meristem.model.config import TransformerConfig
from meristem.model.heads import HeadSpec, Readout, Symbols
from meristem.model.init import without_weights
from meristem.model.model import SYMBOLS, Model
from meristem.model.plain import from_json, to_json
from meristem.registry import find, installed
from meristem.shapes import Tensor


@dataclass(frozen=True)
class Imported:
    """A model and its tokenizer, read from a directory of another library.

    Attributes:
        tokenizer: the tokenizer; its ids are those of the directory.
        model: the model, in evaluation mode, on the CPU, in fp32.
        notes: messages for the user, such as tensors that were left out.
    """

    family: Family
    tokenizer: Tokenizer
    model: Model
    notes: tuple[str, ...]


def read_directory(folder: Path, family: Family | None = None) -> Imported:
    """Read model and tokenizer from a directory of another library; every tensor must have its place.

    Args:
        family: family of the model; found from its config by default.

    Raises:
        CheckpointError: no installed family recognises it, a file is missing or damaged, or tensors are missing,
            extra or of another shape.
    """
    config = read_config_file(folder)
    family = family or find_family(folder / "config.json", config)
    with _blamed(folder / "config.json"):
        tokenizer, notes = family.read_tokenizer(folder, config)
    model, left_out = read_model(folder, family)
    return Imported(family, tokenizer, model, (*notes, *left_out))


def read_model(folder: Path, family: Family | None = None) -> tuple[Model, list[str]]:
    """Read the model alone, in evaluation mode, from a directory of another library; also returns notes for the user.

    Raises:
        CheckpointError: as `read_directory`.
    """
    config = read_config_file(folder)
    family = family or find_family(folder / "config.json", config)
    weights = open_weights(folder).renamed(family.spell)
    if not any(name.startswith(family.prefix) for name in weights):  # a trunk that was saved alone
        weights = weights.renamed(lambda name: family.prefix + name)
    with _blamed(folder / "config.json"):
        architecture = family.read_config(config, weights)
        # a second reading checks the type of every value
        architecture = from_json(TransformerConfig, to_json(architecture))
        heads, left_out = _heads(family, config, weights)
        if SYMBOLS not in heads:
            architecture = replace(architecture, head=None)
        with without_weights():
            model = Model(architecture, heads)
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    table = family.table_of(architecture, config, weights).without_heads(left_out)
    tensors, notes = table.read(weights, wanted, architecture)
    model.load_state_dict(tensors, strict=True, assign=True)
    lacking = [f"head {name} left out: no installed package offers the kind of head {name!r}" for name in left_out]
    return model.eval(), [*notes, *lacking]


def _heads(family: Family, config: dict[str, Any], weights: Weights) -> tuple[dict[str, HeadSpec], list[str]]:
    """Heads by name that a foreign model has and an installed package offers, and names of the others."""
    found, known = family.read_heads(config, weights), installed(HeadSpec.group)
    kinds = {one: Symbols.kind if one == SYMBOLS else one for one in found if isinstance(one, str)}
    heads: dict[str, HeadSpec] = {name: find(HeadSpec.group, kind)() for name, kind in kinds.items() if kind in known}
    heads |= {one.name: one for one in found if isinstance(one, Readout)}
    return heads, [name for name, kind in kinds.items() if kind not in known]


def write_directory(
    folder: Path,
    architecture: TransformerConfig,
    tokenizer: Tokenizer,
    model: Model,
    library: str = "hf",
    family: Family | None = None,
) -> list[str]:
    """Write a model as a directory of another library. A failed export leaves no directory behind.

    Args:
        folder: must be new or empty.
        library: name of the library that is to read it, in the group `meristem.libraries`.
        family: family to write it as; by default the most general one of the library that can say the architecture.

    Returns:
        Notes for the user: what the other library has no place for.

    Raises:
        ConfigError: no such library, or no installed family of it can say this architecture; names what differs.
        CheckpointError: the place is taken.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder} must be new or an empty folder; it holds something else")
    if family is None:
        reader = find("meristem.libraries", library)
        candidates = [other for other in installed_families() if other.library == reader]
    tensors, files, notes = _first_that_can([family] if family else candidates, architecture, tokenizer, model)
    with replacing_folder(folder) as part:
        save_file(tensors, part / "model.safetensors", metadata={"format": "pt"})
        for name, text in files.items():
            (part / name).write_text(text, encoding="utf-8")
    return notes


def read_config_file(folder: Path) -> dict[str, Any]:
    """Read `config.json` of a model directory.

    Raises:
        CheckpointError: it is missing or no JSON object.
    """
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} must be a model directory; it has no config.json")
    return read_json(folder / "config.json", CheckpointError)


@contextmanager
def _blamed(file: Path) -> Iterator[None]:
    """Name the file in an error that a reader of it raises."""
    try:
        yield
    except (ConfigError, TypeError, KeyError) as error:
        reason = f"must have {error}" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(f"{file}: {reason}") from error


NUM_REASONS = 3
"""Families that a refusal names, the nearest ones."""

REFUSED, UNWRITABLE = 2, 100
"""As many differences as a config counts for that a family refuses to read back, or cannot even write."""

_Written = tuple[dict[str, Tensor], dict[str, str], list[str]]
"""What is written of a model: tensors, texts of files by name, and notes for the user."""


class _Differs(ConfigError):
    """A family has no such config; `count` says how far it is from one."""

    def __init__(self, message: str, count: int):
        super().__init__(message)
        self.count = count


def _first_that_can(
    candidates: Sequence[Family], architecture: TransformerConfig, tokenizer: Tokenizer, model: Model
) -> _Written:
    reasons: list[tuple[int, str]] = []
    for family in candidates:
        distance = UNWRITABLE
        try:
            config = family.write_config(architecture, tokenizer)
            distance = REFUSED
            refuse_config(family, config, architecture)
            distance = 0
            return _write(family, config, architecture, tokenizer, model)
        except (UserError, TypeError) as error:  # also of reading back what it wrote
            distance = error.count if isinstance(error, _Differs) else distance
            reasons.append((distance, f"{family.name}: {error}"))
    nearest = [reason for _, reason in sorted(reasons, key=lambda reason: reason[0])]
    others = f"; and {len(nearest) - NUM_REASONS} families that differ more" if len(nearest) > NUM_REASONS else ""
    raise ConfigError(
        f"a model must be of a supported family to be exported; {'; '.join(nearest[:NUM_REASONS])}{others}"
    )


def refuse_config(family: Family, config: dict[str, Any], architecture: TransformerConfig) -> None:
    """Refuse a config that a family wrote, before any tensor is moved: read back, it must say the same.

    Names and shapes of tensors can still tell a difference that this does not see.

    Raises:
        ConfigError: the family cannot say the architecture; names what differs.
    """
    _refuse_differences(architecture, family.read_config(config, family.derived(architecture)), has_pool=False)


def _write(
    family: Family, config: dict[str, Any], architecture: TransformerConfig, tokenizer: Tokenizer, model: Model
) -> _Written:
    """A model as one of the family, whose tensors or tokenizer may refuse it even though its config can say it."""
    table = family.table_of(architecture, config)
    tensors = model.state_dict()
    heads = {head: [name for name in tensors if name.startswith(f"heads.{head}.")] for head in model.heads}
    kept = [head for head, names in heads.items() if all(table.has(name, architecture) for name in names)]
    readouts = [readout for readout in model.readouts if readout.name in kept]
    # a pool without weights that no label reads is a way to embed, and not a part of the model
    has_pool = any(readout.pool is None for readout in readouts) or any(name.startswith("pool.") for name in tensors)
    behind = {name for head, names in heads.items() if head not in kept for name in names}
    foreign = table.write({name: t for name, t in tensors.items() if name not in behind}, architecture)
    foreign |= family.derived(architecture)
    config = {**config, **family.write_readouts(readouts)}
    if family.name_class is not None:
        config = {"architectures": [family.name_class(kept)], **config, "dtype": "float32"}
    back = family.read_config(config, foreign)
    lost = _refuse_differences(architecture, back, has_pool)
    if not kept and family.prefix:
        foreign = {name.removeprefix(family.prefix): tensor for name, tensor in foreign.items()}
    notes = [f"the other library has no {name}" for name in lost]
    if left := sorted(set(heads) - set(kept)):
        notes.append(f"heads of labels stay behind, the other library has no place for them: {', '.join(left)}")
    if lacking := [head for head in family.implied_heads if SYMBOLS in kept and head not in kept]:
        notes.append(f"the other library starts at random the heads that this model lacks: {', '.join(lacking)}")
    files = {**family.write_tokenizer(tokenizer), "config.json": json.dumps(config, indent=2) + "\n"}
    return foreign, files, notes


def _refuse_differences(ours: TransformerConfig, theirs: TransformerConfig, has_pool: bool) -> list[str]:
    """Refuse what the other library makes of our config, unless it differs in `TRAINING_ONLY` alone; returns those."""
    if ours.head is None:
        theirs = replace(theirs, head=None)
    differences = _differences(_of_model(ours, has_pool), _of_model(theirs, has_pool))
    if ours.total_layers == theirs.total_layers:
        # layer by layer: one stack can be said by several sets of rules
        for layer in range(ours.total_layers):
            differences |= _differences(_of_layer(ours, layer), _of_layer(theirs, layer))
    lost = [name for name in differences if name.rpartition(".")[2] in TRAINING_ONLY]
    if wrong := [name for name in differences if name not in lost]:
        raise _Differs(f"cannot have {', '.join(f'{n}={differences[n]!r}' for n in wrong)}", len(wrong))
    return lost


TRAINING_ONLY = {"dropout", "drop_path", "jitter", "balance_weight", "z_weight"}
"""Fields of a config without part in a forward pass of a trained model."""


def _of_model(config: TransformerConfig, has_pool: bool) -> dict[str, Any]:
    """What a config says of the whole model, without what has no part in a forward pass."""
    by_layer = ("attention", "feedforward", "experts", "position", "layers", "init")
    plain = to_json(replace(config, pool=config.pool if has_pool else None))
    return {name: value for name, value in plain.items() if name not in by_layer}


def _of_layer(config: TransformerConfig, layer: int) -> Any:
    """What a config says of one layer, with implied values written out."""
    parts = config.layer(layer)
    attention = replace(parts.attention, num_kv_heads=parts.attention.kv_heads, head_width=parts.head_width)
    return to_json(replace(parts, attention=attention))


def _differences(ours: Any, theirs: Any, where: str = "") -> dict[str, Any]:
    """Our values that theirs lack, by dotted name."""
    if not isinstance(ours, dict) or not isinstance(theirs, dict):
        return {} if ours == theirs else {where.removeprefix("."): ours}
    found = (_differences(value, theirs.get(name), f"{where}.{name}") for name, value in ours.items())
    return {name: value for part in found for name, value in part.items()}
