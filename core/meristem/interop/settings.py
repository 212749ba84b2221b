"""Settings of a foreign config: each is read, or refused where it changes numbers and no part of ours can say it."""

from collections.abc import Mapping
from typing import Any

from meristem.errors import ConfigError
from meristem.model.config import Activation

ACTIVATIONS: Mapping[str, Activation] = {
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


class Settings(Mapping[str, Any]):
    """A foreign config with the defaults of its kind, and messages that name the kind.

    Args:
        kind: as messages call it.
        config: as it was found.
        defaults: what a setting means that is not there.
        aliases: other names of settings, which count where the setting itself is not there.
    """

    def __init__(
        self,
        kind: str,
        config: Mapping[str, Any],
        defaults: Mapping[str, Any] | None = None,
        aliases: Mapping[str, str] | None = None,
    ):
        renamed = {name: config[alias] for alias, name in (aliases or {}).items() if alias in config}
        self._values = {**(defaults or {}), **renamed, **config}
        self._kind = kind

    def __getitem__(self, name: str) -> Any:
        """The setting.

        Raises:
            ConfigError: it is not there and has no default.
        """
        if name not in self._values:
            raise ConfigError(f"{self._kind} config must have {name}")
        return self._values[name]

    def __iter__(self) -> Any:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, name: object) -> bool:
        return name in self._values

    def get(self, name: str, default: Any = None) -> Any:
        """The setting, or `default` where it is not there and has none of its own."""
        return self._values.get(name, default)

    def require(self, **plain: Any) -> None:
        """Refuse settings that no part of ours can say.

        Args:
            plain: the one value by name that is taken; a setting that is not there or null is taken too.

        Raises:
            ConfigError: names the setting.
        """
        for name, value in plain.items():
            got = self._values.get(name)
            if got is not None and got != value:
                raise ConfigError(f"{name} must be {value} in {self._kind} config; got {got!r}")

    def activation(self, name: str) -> Activation:
        """Our activation of the setting.

        Raises:
            ConfigError: none of ours is this function.
        """
        value = self[name]
        if value not in ACTIVATIONS:
            raise ConfigError(f"{name} must be one of {', '.join(ACTIVATIONS)} in {self._kind} config; got {value!r}")
        return ACTIVATIONS[value]


def foreign_activation(activation: Activation) -> str:
    """The foreign name of an activation of ours: the first of its spellings."""
    return next(name for name, ours in ACTIVATIONS.items() if ours == activation)


def special_ids(tokenizer: object, *roles: str) -> dict[str, int | None]:
    """Settings that name special symbols: ids, by `bos_token_id` and its like; null where there is none.

    Args:
        roles: of the symbols; `bos`, `eos` and `pad` by default.
    """
    special: Mapping[str, str] = getattr(tokenizer, "special", {})
    vocab: tuple[str, ...] = getattr(tokenizer, "vocab", ())
    return {
        f"{role}_token_id": vocab.index(special[role]) if role in special else None
        for role in roles or ("bos", "eos", "pad")
    }
