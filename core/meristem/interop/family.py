"""What a family of foreign models is, and how the family of a foreign config is found.

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

TENSORFLOW_SPELLINGS = ((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias"))
"""Names of TensorFlow, which checkpoints from before 2019 have."""

HeadReader = Callable[[ForeignConfig, Collection[str]], tuple[str, ...]]


@dataclass(frozen=True, kw_only=True)
class Family:
    """A family of foreign models that can be imported and exported.

    Attributes:
        name: as reports call it.
        domain: name of the domain that reads the inputs of its models.
        recognises: whether a foreign config is of this family (`of_type`).
        variant_of: a more general family. Where both recognise a config, this one is taken; where both can say a model
            that is exported, the general one is. Families that are not variants of each other must not recognise the
            same config.
        read_config: our config, of the foreign one and the tensors beside it (names of the table; read when asked
            for). At export it is called with the tensors that are written. It raises a `ConfigError` at a setting that
            changes numbers and that no part of ours can say.
        write_config: the foreign config, of ours and the tokenizer; what it cannot say is found by reading it
            back, so it need not check.
        table: every tensor; or a function of our config, the foreign one and the names of the tensors that are there
            (none at export), where the names of the table depend on them.
        read_heads: names of heads that are no label's, of the foreign config and the names of its tensors: `tokens` for
            that of symbols, or the name under which a head is registered, which has no settings.
        read_tokenizer: the tokenizer of a foreign directory, and notes for the user; of subwords by default.
        write_tokenizer: texts of the foreign tokenizer's files by file name.
        read_readouts: labels that a foreign model predicts, of the same.
        write_readouts: settings of the foreign config about the labels that come along; the others stay behind.
        spellings: other spellings of foreign names, a regular expression and what to write in its place, in order.
        prefix: of the trunk's foreign tensors, which a trunk saved alone leaves out.
        derived: foreign tensors that we compute and do not keep.
        name_class: name of the foreign class, of the names of the heads and labels that are written; goes into
            the foreign config as `architectures`.
        implied_heads: heads that the other library makes anew where a model with symbols lacks them.
        runner: runs its models beside the reference; None where no library that can be installed has it.
        library: that reads what is written.
    """

    name: str
    domain: str
    recognises: Callable[[ForeignConfig], bool]
    read_config: Callable[[ForeignConfig, Mapping[str, Tensor]], TransformerConfig]
    write_config: Callable[[TransformerConfig, Tokenizer], dict[str, Any]]
    table: KeyTable | Callable[[TransformerConfig, ForeignConfig, Collection[str]], KeyTable]
    read_heads: HeadReader
    read_tokenizer: Callable[[Path, ForeignConfig], tuple[Tokenizer, list[str]]] = read_subwords
    write_tokenizer: Callable[[Tokenizer], dict[str, str]] = write_subwords
    read_readouts: Callable[[ForeignConfig, Collection[str]], tuple[Readout, ...]] = lambda config, names: ()
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
        """The families that this one is a variant of, the nearest first."""
        return () if self.variant_of is None else (self.variant_of, *self.variant_of.general)

    def variant(self, **changes: Any) -> "Family":
        """A variant of this family, which differs in the fields that are given."""
        return replace(self, variant_of=self, **changes)

    def table_of(self, config: TransformerConfig, foreign: ForeignConfig, names: Collection[str] = ()) -> KeyTable:
        """The key table of models of our config.

        Args:
            foreign: config that it was read from, or that is written.
            names: of the foreign tensors that are there; none at export.
        """
        return self.table if isinstance(self.table, KeyTable) else self.table(config, foreign, names)

    def spell(self, name: str) -> str:
        """A foreign name as the rows of the table have it."""
        for pattern, plain in self.spellings:
            name = re.sub(pattern, plain, name)
        return name


def of_type(*model_types: str) -> Callable[[ForeignConfig], bool]:
    """Recognises configs by `model_type`."""
    return lambda config: config.get("model_type") in model_types


def heads_by_prefix(**prefixes: str) -> HeadReader:
    """A head is there where a tensor has its prefix."""
    return lambda config, names: tuple(
        head for head, prefix in prefixes.items() if any(name.startswith(prefix) for name in names)
    )


def symbols_by_class(*classes: str) -> HeadReader:
    """The symbol head is there where the config names one of these classes: a tied head has no tensor of its own."""
    return lambda config, names: (SYMBOLS,) if set(classes) & set(config.get("architectures") or ()) else ()


def symbols_but_for(trunk: str) -> HeadReader:
    """The symbol head is there unless the config names the class of a trunk alone.

    For decoders: most heads are tied and have no tensor, and files of long ago name no class.
    """
    return lambda config, names: () if trunk in (config.get("architectures") or ()) else (SYMBOLS,)


def classes_by_head(with_symbols: str, without: str) -> Callable[[Collection[str]], str]:
    """One class for models with a symbol head, one for trunks alone."""
    return lambda heads: with_symbols if SYMBOLS in heads else without


def sequence_family(
    name: str,
    domain: str,
    model_type: str,
    stem: str,
    table: KeyTable,
    read_config: Callable[[ForeignConfig, Mapping[str, Tensor]], TransformerConfig],
    write_config: Callable[[TransformerConfig, Tokenizer], dict[str, Any]],
    prefix: str = "transformer.",
    suffix: str = "ForCausalLM",
    read_heads: HeadReader | None = None,
    variant_of: Family | None = None,
) -> Family:
    """A family of encoders or decoders of `transformers`; arguments that are not named here are fields of it.

    Args:
        model_type: by which its configs are recognised.
        stem: of the names of its classes: `<stem>Model` is a trunk alone.
        suffix: of the class with a symbol head, `<stem><suffix>`.
        read_heads: by default a model has a symbol head unless its config names the class of a trunk alone.
    """
    return Family(
        name=name,
        domain=domain,
        recognises=of_type(model_type),
        read_config=read_config,
        write_config=write_config,
        table=table,
        read_heads=read_heads or symbols_but_for(f"{stem}Model"),
        prefix=prefix,
        name_class=classes_by_head(stem + suffix, f"{stem}Model"),
        runner=SEQUENCES,
        variant_of=variant_of,
    )


def installed_families() -> list[Family]:
    """Families of all installed packages, general ones before their variants."""
    return sorted(find_all("meristem.families").values(), key=lambda family: len(family.general))


def find_family(where: object, config: ForeignConfig) -> Family:
    """The family of a foreign config.

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
