"""One transformer core; every domain grows from it."""

from typing import Any

__version__ = "0.1.0"

__all__ = ["Embeddings", "LoadedModel", "embed", "generate", "load", "read_embeddings"]


def __getattr__(name: str) -> Any:
    """The functions of `meristem.api`, imported when first used: `import meristem` must not import torch."""
    if name in __all__:
        from meristem import api

        return getattr(api, name)
    raise AttributeError(f"module 'meristem' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
