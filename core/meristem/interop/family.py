"""What a family of foreign models is: a value, made of functions and a key table."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meristem.data.tokenizer import Tokenizer
from meristem.interop.table import KeyTable
from meristem.model.config import TransformerConfig
from meristem.shapes import Tensor

ForeignConfig = Mapping[str, Any]
"""`config.json` of a foreign directory."""


@dataclass(frozen=True)
class Family:
    """A family that is at home.

    Attributes:
        name: as reports call it.
        domain: name of the domain that reads the inputs of its models.
        recognises: whether a foreign config is of this family.
        read_config: our config, of the foreign one and the tensors beside it.
        write_config: the foreign config, of ours and the tokenizer; what it cannot say is found by reading it
            back, so it need not check.
        read_tokenizer: the tokenizer of a foreign directory, and notes for the user.
        write_tokenizer: texts of the foreign tokenizer's files by file name.
        table: every tensor.
        heads: heads of ours by the prefix of their foreign tensors; a head is there where its tensors are.
        prefix: of the trunk's foreign tensors, which a trunk saved alone leaves out.
        derived: foreign tensors that we compute and do not keep.
        classes: names of the foreign classes with a symbol head and without.
    """

    name: str
    domain: str
    recognises: Callable[[ForeignConfig], bool]
    read_config: Callable[[ForeignConfig, Mapping[str, Tensor]], TransformerConfig]
    write_config: Callable[[TransformerConfig, Tokenizer], dict[str, Any]]
    read_tokenizer: Callable[[Path, ForeignConfig], tuple[Tokenizer, list[str]]]
    write_tokenizer: Callable[[Tokenizer], dict[str, str]]
    table: KeyTable
    heads: Mapping[str, str]
    prefix: str
    derived: Callable[[TransformerConfig], dict[str, Tensor]]
    classes: tuple[str, str]
