"""Blocks compiled by torch, where the machine has what that takes."""

import logging

import torch
from torch import nn

from meristem.model.attention import AttentionLayer, CrossAttentionLayer

logger = logging.getLogger(__name__)


def compile_blocks(trunk: nn.Module, device: torch.device | str) -> bool:
    """Compile each block of a trunk, once for packs of any size; without a compiler, say so and leave it as it is.

    Norms, maps, rotations and activations are fused. Attention stays as it is: which kernel runs, and how sequences
    are grouped, depends on their lengths, which the host knows. Names of parameters do not change.

    Args:
        trunk: of any kind.
        device: that it will run on.

    Returns:
        Whether it is compiled.
    """
    if not has_compiler(device):
        return False
    for layer in trunk.modules():
        if isinstance(layer, AttentionLayer | CrossAttentionLayer):
            layer._attend = torch.compiler.disable(layer._attend)  # type: ignore[method-assign]
    for stack in trunk.modules():
        for block in getattr(stack, "blocks", ()):
            block.compile(dynamic=True)
    return True


def has_compiler(device: torch.device | str) -> bool:
    """Whether torch can compile for a device; if not, a line says so."""
    try:
        torch.compile(_probe, dynamic=True)(torch.ones(2, 3, device=device))
    except Exception as error:  # what a missing compiler raises differs by backend and version
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        logger.warning("not compiled, since torch found no compiler that works here: %s", reason)
        return False
    return True


def _probe(x: torch.Tensor) -> torch.Tensor:
    return (x * 2).sigmoid()
