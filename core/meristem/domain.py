"""What a domain is, and how an installed one is found.

A domain is one folder and one value: a `Domain`. It is found through the entry-point group
`meristem.domains` or by dotted path (`my_lab.rna`). Built-in domains use nothing that a third party could not.
"""

import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from inspect import signature
from pathlib import Path
from typing import Any

import pyarrow as pa

from meristem.data.records import ReadOptions, Source
from meristem.data.store import Files
from meristem.data.tokenizer import Tokenizer
from meristem.data.views import Views
from meristem.errors import ConfigError
from meristem.model.config import TransformerConfig
from meristem.objectives.objective import Objective
from meristem.registry import find, installed
from meristem.scoring.scorer import Scorer

GROUP = "meristem.domains"


@dataclass(frozen=True)
class Domain:
    """Everything that is particular to one kind of data.

    Attributes:
        name: as `--domain` and configs say it.
        read: from a source to Arrow record batches (`meristem.data.records.SCHEMA` and label columns).
            It checks what it reads and refuses what is no record, by file and line.
        tokenizer: makes the tokenizer; its keyword arguments are the domain's tokenizer options.
        presets: architectures by name.
        sample: a small file of real records that ships with the domain.
        objectives: what core has not; core's own are there for all.
        metrics: torchmetrics that core has not, by name.
        sample_tokenizer: options of the tokenizer that suit the sample.
        files: gives the files that a source names beside itself, such as those in a folder; None where a source is one
            file. A change in one of them is a change of the source.
        augment: makes the views that training takes of a record, of the tokenizer and the options of `data.augment`;
            None for a domain that has none.
        scorers: ways of scoring records that core has not, by the names that `meristem score --scorer` takes.
    """

    name: str
    read: Callable[[Source, ReadOptions], Iterator[pa.RecordBatch]]
    tokenizer: Callable[..., Tokenizer]
    presets: Mapping[str, TransformerConfig]
    sample: Path
    objectives: Mapping[str, type[Objective]] = field(default_factory=dict)
    metrics: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    sample_tokenizer: Mapping[str, Any] = field(default_factory=dict)
    files: Files | None = None
    augment: Callable[..., Views] | None = None
    scorers: Mapping[str, Scorer] = field(default_factory=dict)

    def build_tokenizer(self, **options: Any) -> Tokenizer:
        """The domain's tokenizer with these options.

        Raises:
            ConfigError: an option that it does not take.
        """
        try:
            return self.tokenizer(**options)
        except TypeError as error:
            raise ConfigError(
                f"data.tokenizer: the tokenizer of {self.name} does not take that: {error}; "
                f"its options: {', '.join(signature(self.tokenizer).parameters) or 'none'}"
            ) from error


def load_domain(name: str) -> Domain:
    """The installed domain of that name, or the one at a dotted path.

    A dotted path names a module with an attribute `domain`, or that attribute itself
    (`my_lab.rna` or `my_lab.rna:domain`). It is imported, so it is code that you trust.

    Raises:
        ConfigError: no such domain, or what was found is none.
    """
    points = installed(GROUP)
    if name in points:
        found = find(GROUP, name)
    elif "." in name or ":" in name:
        module_name, _, attribute = name.partition(":")
        try:
            found = getattr(importlib.import_module(module_name), attribute or "domain")
        except (ImportError, AttributeError) as error:
            raise ConfigError(f"domain {name!r} cannot be imported: {error}") from error
    else:
        known = ", ".join(points) or "none"
        raise ConfigError(
            f"domain must be installed or a dotted path; got {name!r}; installed: {known} (meristem domains list)"
        )
    if not isinstance(found, Domain):
        raise ConfigError(f"domain {name!r} must be a meristem.domain.Domain; got {type(found).__name__}")
    return found
