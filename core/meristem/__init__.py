"""One transformer core; every domain grows from it."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_API = ("Embeddings", "LoadedModel", "embed", "export", "generate", "import_model", "load", "predict", "probe")

_HOME = {
    **dict.fromkeys((*_API, "read_embeddings", "score"), "meristem.api"),
    **dict.fromkeys(("DataSpec", "ModelSpec", "RunSpec", "TrainerSpec"), "meristem.train.spec"),
    **dict.fromkeys(("fit", "test", "validate"), "meristem.train.run"),
}
"""Where each public name is defined."""

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    """A public name, imported when it is first used: `import meristem` must not import torch."""
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'meristem' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
