"""Families of models of other libraries, and how the family of a config is found.

A family is a value, made of functions and a key table, that an installed package lists as an entry point of the group
`meristem.families`. At import the family is asked for by a foreign config; at export families are asked in turn whether
they can say our config. The order in which packages list families decides neither: see `Family.variant_of`.
"""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from meristem.data.tokenizer import Tokenizer
from meristem.errors import CheckpointError
from meristem.interop.library import HUGGING_FACE, Library
from meristem.interop.runners import SEQUENCES, Runner
from meristem.interop.table import KeyTable
from meristem.interop.vocabulary import read_subwords, write_subwords
from meristem.model.config import TransformerConfig
from meristem.model.heads import Readout
from meristem.model.model import SYMBOLS
from meristem.registry import find_all
from meristem.shapes import Tensor

ForeignConfig = Mapping[str, Any]
"""`config.json` of a foreign directory."""

Tensors = Mapping[str, Tensor]
"""Foreign tensors by name."""

TENSORFLOW_SPELLINGS = ((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias"))
"""Names of TensorFlow, which checkpoints from before 2019 have."""

HeadReader = Callable[[ForeignConfig, Collection[str]], tuple[str | Readout, ...]]


@dataclass(frozen=True, kw_only=True)
class Family:
    """A family of models of another library that can be imported and exported.

    Attributes:
        name: name in messages and reports.
        domain: name of the domain that reads the inputs of its models.
        recognises: tells whether a foreign config is of this family (`of_type`).
        variant_of: a more general family. Where both recognise a config, this one is taken; where both can say a model
            that is exported, the general one is. Families that are not variants of each other must not recognise the
            same config.
        read_config: our config, of the foreign one and the tensors beside it (names of the table; read when asked
            for). At export it is called with the tensors that are written. It raises a `ConfigError` at a setting that
            changes numbers and that no part of ours can say.
        write_config: the foreign config, of ours and the tokenizer; what it cannot say is found by reading it
            back, so it need not check.
        table: key table of all tensors; or, where its names depend on them, a function of our config, the foreign one
            and the names of the tensors that are there (none at export).
        read_heads: heads of a foreign model, of its config and the names of its tensors: a `Readout` for a label,
            `tokens` for the symbol head, or the name under which a head that has no settings is registered.
        read_tokenizer: the tokenizer of a foreign directory, and notes for the user; of subwords by default.
        write_tokenizer: texts of the foreign tokenizer's files by file name.
        write_readouts: settings of the foreign config about the labels that come along; the others stay behind.
        spellings: regular expressions for other spellings of foreign names, and their replacements, applied in order.
        prefix: prefix of the names of the trunk's foreign tensors, which a trunk saved alone leaves out.
        derived: computes foreign tensors that our models do not hold, such as buffers.
        name_class: name of the foreign class, of the names of the heads and labels that are written; goes into
            the foreign config as `architectures`.
        implied_heads: heads that the other library makes anew where a model with symbols lacks them.
        runner: runs its models beside the reference implementation; None where no installable library has one.
        library: the library that reads an exported directory.
    """

    name: str
    domain: str
    recognises: Callable[[ForeignConfig], bool]
    read_config: Callable[[ForeignConfig, Tensors], TransformerConfig]
    write_config: Callable[[TransformerConfig, Tokenizer], dict[str, Any]]
    table: KeyTable | Callable[[TransformerConfig, ForeignConfig, Collection[str]], KeyTable]
    read_heads: HeadReader
    read_tokenizer: Callable[[Path, ForeignConfig], tuple[Tokenizer, list[str]]] = read_subwords
    write_tokenizer: Callable[[Tokenizer], dict[str, str]] = write_subwords
    write_readouts: Callable[[Sequence[Readout]], dict[str, Any]] = lambda readouts: {}
    spellings: tuple[tuple[str, str], ...] = ()
    prefix: str = ""
    derived: Callable[[TransformerConfig], dict[str, Tensor]] = lambda config: {}
    name_class: Callable[[Collection[str]], str] | None = None
    implied_heads: tuple[str, ...] = ()
    runner: Runner | None = None
    library: Library = HUGGING_FACE
    variant_of: "Family | None" = None

    @property
    def general(self) -> tuple["Family", ...]:
        """Families that this one is a variant of, the nearest first."""
        return () if self.variant_of is None else (self.variant_of, *self.variant_of.general)

    def variant(self, **changes: Any) -> "Family":
        """A variant of this family, which differs in the fields that are given."""
        return replace(self, variant_of=self, **changes)

    def table_of(self, config: TransformerConfig, foreign: ForeignConfig, names: Collection[str] = ()) -> KeyTable:
        """The key table for an architecture; `names` are those of the tensors that are there, none at export."""
        return self.table if isinstance(self.table, KeyTable) else self.table(config, foreign, names)

    def spell(self, name: str) -> str:
        """The spelling of a foreign name that the key table uses."""
        for pattern, plain in self.spellings:
            name = re.sub(pattern, plain, name)
        return name


def of_type(*model_types: str) -> Callable[[ForeignConfig], bool]:
    """A test of whether a config has one of these values of `model_type`."""
    return lambda config: config.get("model_type") in model_types


def heads_by_prefix(**prefixes: str) -> HeadReader:
    """A `read_heads` that finds a head where some tensor has its prefix."""
    return lambda config, names: tuple(
        head for head, prefix in prefixes.items() if any(name.startswith(prefix) for name in names)
    )


def symbols_by_class(*classes: str) -> HeadReader:
    """A `read_heads` that finds the symbol head where the config names one of these classes.

    For heads that are tied to the embedding and have no tensor of their own.
    """
    return lambda config, names: (SYMBOLS,) if set(classes) & set(config.get("architectures") or ()) else ()


def classes_by_head(with_head: str, without: str, head: str = SYMBOLS) -> Callable[[Collection[str]], str]:
    """A `name_class` with one class for models with a head, the symbol head by default, and one for trunks alone."""
    return lambda heads: with_head if head in heads else without


def sequence_family(
    name: str,
    domain: str,
    model_type: str,
    stem: str,
    table: KeyTable,
    read_config: Callable[[ForeignConfig, Tensors], TransformerConfig],
    write_config: Callable[[TransformerConfig, Tokenizer], dict[str, Any]],
    prefix: str = "transformer.",
    suffix: str = "ForCausalLM",
    variant_of: Family | None = None,
) -> Family:
    """Make a family of encoders or decoders of `transformers`; arguments not listed here are fields of `Family`.

    A model has a symbol head unless its config names the class of a trunk alone: most heads of decoders are tied and
    have no tensor, and files of long ago name no class.

    Args:
        model_type: value of `model_type` in its configs.
        stem: beginning of the names of its classes: `<stem>Model` is a trunk alone.
        suffix: end of the name of the class with a symbol head, `<stem><suffix>`.
    """
    return Family(
        name=name,
        domain=domain,
        recognises=of_type(model_type),
        read_config=read_config,
        write_config=write_config,
        table=table,
        read_heads=lambda config, names: () if f"{stem}Model" in (config.get("architectures") or ()) else (SYMBOLS,),
        prefix=prefix,
        name_class=classes_by_head(stem + suffix, f"{stem}Model"),
        runner=SEQUENCES,
        variant_of=variant_of,
    )


def installed_families() -> list[Family]:
    """All installed families, general ones before their variants."""
    return sorted(find_all("meristem.families").values(), key=lambda family: len(family.general))


def find_family(where: object, config: ForeignConfig) -> Family:
    """Find the family that a foreign config belongs to.

    Raises:
        CheckpointError: no installed family recognises it, or several do that are not variants of each other.
    """
    families = installed_families()
    found = [family for family in families if family.recognises(config)]
    general = {other.name for family in found for other in family.general}
    match [family for family in found if family.name not in general]:
        case [family]:
            return family
        case []:
            known = ", ".join(sorted(family.name for family in families))
            kind = config.get("model_type") or config.get("architecture")
            got = repr(kind) if kind else "none: is this a model directory?"
            raise CheckpointError(f"{where}: model_type must be of a supported family ({known}); got {got}")
        case several:
            names = " and ".join(family.name for family in several)
            raise CheckpointError(f"{where}: exactly one installed family must recognise it; {names} do")
