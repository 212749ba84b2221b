"""What a domain is, and how an installed one is found.

A domain is one folder and one value: a `Domain`. It is found through the entry-point group
`meristem.domains` or by dotted path (`my_lab.rna`). Built-in domains use nothing that a third party could not.
"""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from inspect import signature
from pathlib import Path
from typing import Any

from meristem.data.reading.reader import Reader
from meristem.data.similarity import Similarity
from meristem.data.tokenizer import Tokenizer
from meristem.data.views import Views
from meristem.errors import ConfigError, require
from meristem.model.config import TransformerConfig
from meristem.objectives.objective import Objective
from meristem.registry import find, installed
from meristem.scoring.scorer import Scorer

GROUP = "meristem.domains"


def masked_symbols() -> Objective:
    """Symbols that are hidden, which most domains can be trained for."""
    from meristem.objectives.masked import MaskedTokens  # imports torchmetrics, which takes seconds

    return MaskedTokens()


@dataclass(frozen=True)
class Domain:
    """Everything that is particular to one kind of data.

    Attributes:
        name: as `--domain` and configs say it.
        tokenizer: makes the tokenizer; its keyword arguments are the domain's tokenizer options.
        presets: architectures by name.
        sample: a small file of real records that ships with the domain.
        sample_options: the part `data` of a config that suits the sample, but for `domain` and `sources`.
        sample_objective: makes an objective that a model can be trained for on the sample.
        views: makes the views that are used in the place of a record, given the tokenizer and the options of
            `data.views`; None for a domain that has none.
        similarity: when two payloads are similar, for splits that keep similar ones together; None for a domain whose
            payloads cannot be compared by the bytes they share.
        scorers: ways of scoring records that core has not, by the names that `meristem score --scorer` takes.
    """

    name: str
    reader: Reader
    tokenizer: Callable[..., Tokenizer]
    presets: Mapping[str, TransformerConfig]
    sample: Path
    sample_options: Mapping[str, Any] = field(default_factory=dict)
    sample_objective: Callable[[], Objective] = masked_symbols
    views: Callable[..., Views] | None = None
    similarity: Similarity | None = None
    scorers: Mapping[str, Scorer] = field(default_factory=dict)

    def build_tokenizer(self, **options: Any) -> Tokenizer:
        """The domain's tokenizer with these options.

        Raises:
            ConfigError: an option that it does not take.
        """
        rule = f"data.tokenizer: the tokenizer of {self.name} does not take that: {{}}; its options: {{}}"
        return _made(rule, self.tokenizer, (), options)

    def build_views(self, tokenizer: Tokenizer, **options: Any) -> Views:
        """The domain's views of records with these options, read by this tokenizer.

        Raises:
            ConfigError: an option that they do not take, or the domain has no views.
        """
        if self.views is None:
            raise ConfigError(f"data.views must not be set: the domain {self.name} has no views of records")
        rule = f"data.views: the views of {self.name} do not take that: {{}}; their options: {{}}"
        return _made(rule, self.views, (tokenizer,), options)

    def build_verb_views(self, tokenizer: Tokenizer) -> Views | None:
        """The views, with their default options, that verbs such as embed run in the place of a record.

        What a model says of all views of a record is averaged. None where views are for training only, which the class
        says that makes them, or the class that a function that makes them is said to return.
        """
        if self.views is None:
            return None
        made = self.views if isinstance(self.views, type) else getattr(self.views, "__annotations__", {}).get("return")
        if getattr(made, "is_training_only", False):
            return None
        views = self.build_views(tokenizer)
        return None if views.is_training_only else views

    def similarity_with(self, k: int | None = None, threshold: float | None = None) -> Similarity:
        """When two payloads are similar, with the numbers of `Similarity` that a user asks for; None for the domain's.

        Raises:
            ConfigError: payloads of the domain cannot be compared, or a number is out of range.
        """
        if self.similarity is None:
            raise ConfigError(
                f"a split by similarity needs a domain whose payloads can be compared; {self.name} has none "
                "(Domain.similarity): use hash or a column"
            )
        asked: dict[str, Any] = {"k": k, "threshold": threshold}
        return replace(self.similarity, **{name: one for name, one in asked.items() if one is not None})


def load_domain(name: str) -> Domain:
    """The domain that a user asks for: an installed one by its name, or the one at a dotted path.

    A dotted path names a module with an attribute `domain`, or that attribute itself
    (`my_lab.rna` or `my_lab.rna:domain`). It is imported, so it is code that you trust.

    Raises:
        ConfigError: no such domain, or what was found is none.
    """
    points = installed(GROUP)
    if name in points:
        return _checked(find(GROUP, name), name)
    if not ("." in name or ":" in name):
        known = ", ".join(points) or "none"
        raise ConfigError(
            f"domain must be installed or a dotted path; got {name!r}; installed: {known} (meristem domains list)"
        )
    module_name, _, attribute = name.partition(":")
    try:
        return _checked(getattr(importlib.import_module(module_name), attribute or "domain"), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"domain {name!r} cannot be imported: {error}") from error


def domain_of_model(asked: str, named: str) -> Domain:
    """The domain that reads the inputs of a model.

    Args:
        asked: by the user, as `load_domain` takes it; empty for the model's own.
        named: by the model directory. Only an installed domain is found by it: a directory never names what is
            imported.

    Raises:
        ConfigError: no such domain, or neither names one.
    """
    if asked:
        return load_domain(asked)
    if not named:
        raise ConfigError("the model names no domain; say which one reads its inputs (--domain)")
    try:
        return _checked(find(GROUP, named), named)
    except ConfigError as error:
        raise ConfigError(
            f"{error}; the model was trained with it: install it, or say another with --domain"
        ) from error


def _made(rule: str, make: Callable[..., Any], given: tuple[Any, ...], options: Mapping[str, Any]) -> Any:
    """What `make` makes; an option that it does not take is an error by this rule."""
    try:
        return make(*given, **options)
    except TypeError as error:
        known = ", ".join([*signature(make).parameters][len(given) :]) or "none"
        raise ConfigError(rule.format(error, known)) from error


def _checked(found: Any, name: str) -> Domain:
    require(isinstance(found, Domain), f"domain {name!r} must be a meristem.domain.Domain", type(found).__name__)
    return found
