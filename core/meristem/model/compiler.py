"""Whether `torch.compile` works on this machine, and functions that it fuses for a GPU."""

import logging
from collections.abc import Callable
from functools import lru_cache, wraps

import torch

from meristem.shapes import Tensor

logger = logging.getLogger(__name__)


def has_compiler(device: torch.device | str) -> bool:
    """Whether torch can compile for a device; if not, a warning says why."""
    try:
        torch.compile(_probe, dynamic=True)(torch.ones(2, 3, device=device))
    except Exception as error:  # what a missing compiler raises differs by backend and version
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        logger.warning("not compiled, since torch found no compiler that works here: %s", reason)
        return False
    return True


def _probe(x: torch.Tensor) -> torch.Tensor:
    return (x * 2).sigmoid()


@lru_cache
def compiles_for_gpu() -> bool:
    """Whether torch can compile for a GPU; asked once."""
    return has_compiler("cuda")


def fused(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Compile a function of tensors into one kernel when it is first called on a GPU; elsewhere run it as it is."""

    @lru_cache
    def compiled() -> Callable[..., Tensor]:
        return torch.compile(function, dynamic=True)

    @wraps(function)
    def run(x: Tensor, *more: Tensor) -> Tensor:
        is_alone = x.is_cuda and not torch.compiler.is_compiling()
        return compiled()(x, *more) if is_alone and compiles_for_gpu() else function(x, *more)

    return run
