"""Settings of a foreign config, and the fields of our architecture that say the same.

A `Field` is one rule for both directions, as a row of a key table is for tensors. What one rule cannot say is left to
the two functions of a family; a setting that changes numbers and that no part of ours can say is refused.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from meristem.errors import ConfigError, require
from meristem.model import config as arch

ACTIVATIONS: Mapping[str, arch.Activation] = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
"""Our activations by their names in `transformers`, where several are spellings of one function."""

PARTS: Mapping[str, type] = {
    "embedding": arch.Embedding,
    "attention": arch.Attention,
    "feedforward": arch.FeedForward,
    "norm": arch.LayerNorm,
    "residual": arch.Residual,
    "head": arch.TokenHead,
    "init": arch.Init,
}
"""Classes of the parts of an architecture that a family does not choose otherwise."""

REQUIRED = object()
"""The default of a setting that must be there."""


@dataclass(frozen=True)
class Field:
    """A setting of a foreign config and our fields of the same meaning, read and written by one rule.

    Attributes:
        foreign: name of the setting.
        own: dotted name of our field within `TransformerConfig` (`attention.dropout`), or names of several fields that
            the setting gives one value; the first of them is written.
        default: what a setting means that is not there.
        absent: what is written where our config has no such field or has None there.
        names: our values by their foreign names, the preferred name first; None where both are the same.
    """

    foreign: str
    own: str | tuple[str, ...]
    default: Any = REQUIRED
    absent: Any = None
    names: Mapping[str, Any] | None = None

    def write(self, architecture: arch.TransformerConfig) -> Any:
        value: Any = architecture
        for name in (self.own if isinstance(self.own, str) else self.own[0]).split("."):
            value = getattr(value, name, None)
        if value is None:
            return self.absent
        return value if self.names is None else next(name for name, own in self.names.items() if own == value)


SHAPE = (
    Field("vocab_size", "embedding.vocab_size"),
    Field("hidden_size", "width"),
    Field("num_hidden_layers", "num_layers"),
    Field("num_attention_heads", "attention.num_heads"),
    Field("intermediate_size", "feedforward.width"),
)
"""Sizes, under the names that most configs of `transformers` have for them."""

INIT_STD = Field("initializer_range", "init.std", 0.02)
IS_TIED = Field("tie_word_embeddings", "head.is_tied", True, absent=True)
COMMON = (*SHAPE, INIT_STD, IS_TIED)
BIASES = (
    Field("attention_bias", ("attention.qkv_bias", "attention.out_bias"), False),
    Field("mlp_bias", ("feedforward.in_bias", "feedforward.out_bias"), False),
)


def activation(foreign: str, default: Any = REQUIRED, own: str = "feedforward.activation", absent: Any = None) -> Field:
    return Field(foreign, own, default, absent, ACTIVATIONS)


class Settings(dict[str, Any]):
    """A foreign config with defaults; error messages name the kind of config, also for a setting that is missing.

    Args:
        kind: name of the kind of config in messages, with its article (`a BERT`).
        defaults: what a setting means that is not there; goes before the default of a field.
        aliases: other names of settings, which count where the setting itself is not there.
    """

    def __init__(
        self,
        kind: str,
        config: Mapping[str, Any],
        fields: Sequence[Field] = (),
        defaults: Mapping[str, Any] | None = None,
        aliases: Mapping[str, str] | None = None,
    ):
        own = {field.foreign: field.default for field in fields if field.default is not REQUIRED}
        renamed = {name: config[alias] for alias, name in (aliases or {}).items() if alias in config}
        super().__init__({**own, **(defaults or {}), **renamed, **config})
        self._kind, self._fields = kind, fields

    def __missing__(self, name: str) -> Any:
        raise ConfigError(f"{self._kind} config must have {name}")

    def require(self, **plain: Any) -> None:
        """Refuse settings that our architecture cannot express.

        Args:
            plain: the only accepted value, by name; a setting that is missing or null is accepted too.

        Raises:
            ConfigError: names the setting.
        """
        for name, value in plain.items():
            got = self.get(name)
            require(got is None or got == value, f"{name} must be {value} in {self._kind} config", repr(got))

    def choice(self, name: str, names: Mapping[str, Any] = ACTIVATIONS) -> Any:
        """Convert the value of the setting to ours; by default, the setting names an activation.

        Raises:
            ConfigError: the name is unknown.
        """
        value = self[name]
        if not isinstance(value, str) or value not in names:
            raise ConfigError(f"{name} must be one of {', '.join(names)} in {self._kind} config; got {value!r}")
        return names[value]

    def build(self, **parts: Any) -> arch.TransformerConfig:
        """Build the architecture that these settings describe.

        Args:
            parts: fields of `TransformerConfig` that are not those of a setting. A class of part, or a `partial` of
                one, is called with the fields that are settings; `PARTS` has the usual classes.
        """
        values: dict[str, dict[str, Any]] = {"": {}}
        for field in self._fields:
            value = self[field.foreign] if field.names is None else self.choice(field.foreign, field.names)
            for own in (field.own,) if isinstance(field.own, str) else field.own:
                part, _, name = own.rpartition(".")
                values.setdefault(part, {})[name] = value
        given = {**{name: PARTS[name] for name in PARTS if name in values}, **parts}
        assert set(values) <= {"", *given}, f"settings of {sorted(set(values) - set(given))} need a part"
        made = {name: part(**values.get(name, {})) if callable(part) else part for name, part in given.items()}
        return arch.TransformerConfig(**values[""], **made)


def write_fields(architecture: arch.TransformerConfig, fields: Sequence[Field]) -> dict[str, Any]:
    return {field.foreign: field.write(architecture) for field in fields}


def special_ids(tokenizer: object, *roles: str) -> dict[str, int | None]:
    """Ids of `bos`, `eos`, `pad` or other roles by name of the setting; None where the tokenizer has no such symbol."""
    special: Mapping[str, str] = getattr(tokenizer, "special", {})
    vocab: tuple[str, ...] = getattr(tokenizer, "vocab", ())
    return {
        f"{role}_token_id": vocab.index(special[role]) if role in special else None
        for role in roles or ("bos", "eos", "pad")
    }
