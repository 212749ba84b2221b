"""A model on disk, written and read.

A model directory is data and nothing executable: `config.json`, `model.safetensors`, `tokenizer.json`, `README.md`, and
`tokenizers/<input>.json` for each input that has a tokenizer of its own. Opening one never imports or runs what it
names. Reading is strict: a tensor that is missing, extra or of another shape is an error that lists them.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from meristem.data.tokenizer import Tokenizer
from meristem.domain import domain_of_model
from meristem.errors import CheckpointError, ConfigError
from meristem.files import read_json, replacing_folder, write_json
from meristem.interop.directory import Imported, read_config_file, read_directory
from meristem.interop.weights import read_safetensors, refuse_tensors
from meristem.model.changes import ChangeSpec
from meristem.model.config import TransformerConfig
from meristem.model.grid import resampled, with_grid
from meristem.model.heads import HeadSpec, Readout, readouts_of
from meristem.model.init import without_weights
from meristem.model.model import SYMBOLS, Model
from meristem.model.plain import from_json, to_json
from meristem.registry import find, installed
from meristem.shapes import Tensor
from meristem.types import INPUT

FORMAT_VERSION = 3
CONFIG, WEIGHTS, TOKENIZER, README = "config.json", "model.safetensors", "tokenizer.json", "README.md"
TOKENIZERS = "tokenizers"


@dataclass(frozen=True)
class InputCard:
    """The domain and tokenizer of one input of a model.

    Attributes:
        domain: name of the domain; empty for that of the model.
        tokenizer: None for that of the model.
    """

    domain: str = ""
    tokenizer: Tokenizer | None = None


@dataclass(frozen=True)
class ModelCard:
    """All of a model but its weights.

    Attributes:
        architecture: of the trunk and the symbol head.
        tokenizer: reads the first input, and each other one that has no tokenizer of its own.
        heads: what the model predicts, by name of the head.
        domain: name of the domain that reads its inputs.
        facts: plain values about how it came to be (data, steps, scores), shown and not acted on.
        changes: of the built model, in the order in which they are applied.
        inputs: the inputs of the records it was trained on, by name, in the order in which its objective names them.
        joined_by: installed objective that makes one sequence of the inputs; empty where each is a sequence.
    """

    architecture: TransformerConfig
    tokenizer: Tokenizer
    heads: Mapping[str, HeadSpec] = field(default_factory=dict)
    domain: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)
    changes: tuple[ChangeSpec, ...] = ()
    inputs: Mapping[str, InputCard] = field(default_factory=lambda: {INPUT: InputCard()})
    joined_by: str = ""

    def tokenizer_of(self, name: str) -> Tokenizer:
        """The tokenizer that reads an input."""
        return self.inputs[name].tokenizer or self.tokenizer

    @property
    def readouts(self) -> tuple[Readout, ...]:
        """The labels that the model predicts."""
        return readouts_of(self.heads)

    def build(self) -> Model:
        """A model of this card with initial weights, all changes applied."""
        model = Model(self.architecture, self.heads)
        for change in self.changes:
            change.apply(model)
        return model


def save_model(path: Path | str, card: ModelCard, model: Model, tensors: Mapping[str, Tensor] | None = None) -> None:
    """Write a model directory: all of it or nothing, replacing one that is there.

    Args:
        tensors: the model's parameters and buffers by name, where it holds shares of them only.

    Raises:
        CheckpointError: the place holds something that is no model directory, or cannot be written.
    """
    path = Path(path)
    if path.exists() and any(path.iterdir()) and not (path / CONFIG).exists():
        raise CheckpointError(f"{path} must be new, empty or a model directory; it holds something else")
    try:
        with replacing_folder(path) as part:
            given = model.state_dict() if tensors is None else tensors
            whole = {name: value.detach().cpu().contiguous() for name, value in given.items()}
            save_file(whole, part / WEIGHTS, metadata={"format": "pt"})
            _write_tokenizer(part / TOKENIZER, card.tokenizer)
            for name, one in card.inputs.items():
                if one.tokenizer is not None:
                    _write_tokenizer(part / TOKENIZERS / f"{name}.json", one.tokenizer)
            (part / README).write_text(_readme(card, model), encoding="utf-8")
            values = {
                "format_version": FORMAT_VERSION,
                "architecture": to_json(card.architecture),
                "heads": {name: to_json(spec) for name, spec in card.heads.items()},
                "changes": [to_json(change) for change in card.changes],
                "domain": card.domain,
                "tokenizer": _stated(card.tokenizer),
                "inputs": {
                    name: {"domain": one.domain, "tokenizer": one.tokenizer and _stated(one.tokenizer)}
                    for name, one in card.inputs.items()
                },
                **({"joined_by": card.joined_by} if card.joined_by else {}),
                "facts": dict(card.facts),
            }
            write_json(part / CONFIG, values)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error.strerror or error}") from error


def load_card(path: Path | str) -> ModelCard:
    """Read all of a model directory but its weights.

    Raises:
        CheckpointError: a file is missing or damaged, or says what this version does not know.
    """
    path = Path(path)
    values = dict(read_config_file(path))
    if values.get("format_version") not in (2, FORMAT_VERSION):
        got = values.get("format_version", "none: is this a model directory?")
        raise CheckpointError(f"{path / CONFIG}: format_version must be 2 or {FORMAT_VERSION}; got {got}")
    try:
        if values["format_version"] == 2:
            # heads were named by their kind alone, but for one, and labels stood beside them
            heads = {name: {"kind": "symbols" if name == SYMBOLS else name} for name in values["heads"]}
            labels = {readout["name"]: {"kind": Readout.kind, **readout} for readout in values["readouts"]}
            values |= {"heads": {**heads, **labels}, "changes": []}
        if not isinstance(values["heads"], dict):
            raise ConfigError(f"heads must be specs by name; got {values['heads']!r}")
        return ModelCard(
            architecture=from_json(TransformerConfig, values["architecture"]),
            tokenizer=_read_tokenizer(path / TOKENIZER, values["tokenizer"]),
            heads={
                name: from_json(HeadSpec, spec, f"heads.{name}")  # type: ignore[type-abstract]
                for name, spec in values["heads"].items()
            },
            domain=values["domain"],
            facts=values["facts"],
            changes=tuple(
                from_json(ChangeSpec, change, f"changes[{index}]")  # type: ignore[type-abstract]
                for index, change in enumerate(values["changes"])
            ),
            inputs={
                name: InputCard(
                    domain=one["domain"],
                    tokenizer=one["tokenizer"]
                    and _read_tokenizer(path / TOKENIZERS / f"{name}.json", one["tokenizer"]),
                )
                # not written before records had several inputs
                for name, one in values.get("inputs", {INPUT: {"domain": "", "tokenizer": None}}).items()
            },
            joined_by=values.get("joined_by", ""),
        )
    except (KeyError, TypeError, ConfigError) as error:
        reason = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(f"{path / CONFIG}: {reason}") from error


def load_model(path: Path | str) -> tuple[ModelCard, Model]:
    """Read a model directory, strictly; the model is in evaluation mode, on the CPU, in fp32.

    Raises:
        CheckpointError: as `load_card`, or tensors that are missing, extra or of another shape.
    """
    path = Path(path)
    card = load_card(path)
    tensors = read_safetensors(path / WEIGHTS)
    with without_weights():
        model = card.build()
    wanted = {name: value.shape for name, value in model.state_dict().items()}
    shapes = [
        f"{name} {list(tensors[name].shape)} for {list(shape)}"
        for name, shape in wanted.items()
        if name in tensors and tensors[name].shape != shape
    ]
    missing, extra = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
    refuse_tensors(path / WEIGHTS, missing, extra, shapes)
    model.load_state_dict(tensors, strict=True, assign=True)
    return card, model.eval()


def find_model(path: Path | str) -> Path:
    """The directory that holds the model: `path` itself, or `model` within a run directory.

    Raises:
        CheckpointError: neither.
    """
    path = Path(path)
    for place in (path, path / "model"):
        if (place / CONFIG).is_file():
            return place
    got = "no such folder" if not path.exists() else "a file" if path.is_file() else "a folder without config.json"
    known = ", ".join(installed("meristem.libraries"))
    raise CheckpointError(f"{path} must be the directory of a run, a model or another library ({known}); got {got}")


def load_any(path: Path | str, tokenizer: Mapping[str, Any] | None = None) -> tuple[ModelCard, Model]:
    """Read a run directory, a model directory or one of another library, strictly.

    Args:
        tokenizer: options of the domain's tokenizer that are to differ from the model's.

    Raises:
        CheckpointError: as `load_model`, or of no supported family.
        ConfigError: as `with_tokenizer_options`.
    """
    place = find_model(path)
    card, model = load_model(place) if is_own(place) else import_model(place)[:2]
    return with_tokenizer_options(card, model, tokenizer or {})


def with_tokenizer_options(card: ModelCard, model: Model, options: Mapping[str, Any]) -> tuple[ModelCard, Model]:
    """The model with other options of its domain's tokenizer.

    Where its inputs then have another grid of positions, its table of positions is resampled (`resample_grid`).

    Args:
        options: by name; without any, the model as it is.

    Raises:
        ConfigError: options that the tokenizer does not take or that the model cannot be used with.
    """
    if not options:
        return card, model
    tokenizer = card.tokenizer.adapted(domain_of_model("", card.domain).build_tokenizer, options)
    changed = replace(card, tokenizer=tokenizer, architecture=with_grid(card.architecture, tokenizer.grid))
    with without_weights():
        other = changed.build()
    tensors = resampled(model.state_dict(), card.architecture, changed.architecture)
    other.load_state_dict(tensors, strict=True, assign=True)
    return changed, other.eval()


def is_own(place: Path) -> bool:
    """Whether a directory is one of ours, or foreign."""
    return "format_version" in read_config_file(place)


def import_model(place: Path, domain: str = "") -> tuple[ModelCard, Model, Imported]:
    """Read a foreign directory.

    Args:
        domain: that reads the inputs; the family's own where empty.

    Raises:
        CheckpointError: of no supported family, or not exactly what its config says.
    """
    imported = read_directory(place)
    family = imported.family
    card = ModelCard(
        architecture=imported.model.config,
        tokenizer=imported.tokenizer,
        heads=imported.model.specs,
        domain=domain or family.domain,
        facts={"imported_from": f"a {family.library.name} directory of {family.name}: {place.name}"},
    )
    return card, imported.model, imported


def hash_weights(path: Path | str) -> str:
    """Changes with any weight or setting of a model; the manifest of embeddings carries it."""
    digest = hashlib.blake2b(digest_size=16)
    folder = find_model(path)
    for file in sorted([*folder.iterdir(), *(folder / TOKENIZERS).glob("*.json")]):
        if file.suffix in (".json", ".txt", ".safetensors", ".bin"):
            digest.update(file.relative_to(folder).as_posix().encode())
            with file.open("rb") as stream:
                while block := stream.read(1 << 20):
                    digest.update(block)
    return digest.hexdigest()


def _stated(tokenizer: Tokenizer) -> dict[str, str]:
    return {"kind": tokenizer.kind, "fingerprint": tokenizer.fingerprint}


def _write_tokenizer(file: Path, tokenizer: Tokenizer) -> None:
    write_json(file, {"kind": tokenizer.kind, **tokenizer.to_json()})


def _read_tokenizer(file: Path, stated: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer of a file, which must be the one that `config.json` states."""
    values = read_json(file, CheckpointError)
    tokenizer: Tokenizer = find("meristem.tokenizers", str(values.pop("kind", None))).from_json(values)
    if tokenizer.fingerprint != stated["fingerprint"]:
        raise CheckpointError(
            f"{file}: fingerprint must be {stated['fingerprint']} as in {CONFIG}; got {tokenizer.fingerprint}; "
            "it is not the tokenizer this model was trained with"
        )
    return tokenizer


def _readme(card: ModelCard, model: Model) -> str:
    config, facts = card.architecture, "".join(f"* {name}: {value}\n" for name, value in card.facts.items())
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    # `embed` if an installed domain reads the inputs, else `inspect`
    command = "meristem inspect THIS_DIRECTORY"
    if card.domain in installed("meristem.domains"):
        read = list(card.inputs) if card.joined_by else [*card.inputs][:1]
        columns = "".join(f" --column {name}=COLUMN" for name in read if len(card.inputs) > 1)
        command = f"meristem embed THIS_DIRECTORY INPUT{columns} --output vectors"
    return f"""# A {card.domain or "Meristem"} model

{num_parameters:,} parameters: {config.num_layers} layers of width {config.width}, {config.attention.num_heads} heads.
Heads: {", ".join(model.heads) or "none"}.

    {command}

{facts}"""
