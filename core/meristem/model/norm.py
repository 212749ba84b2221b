"""Norms over the width of each row."""

from torch import nn

from meristem.model.config import LayerNorm, NoNorm, Norm, RMSNorm


def build_norm(config: Norm, width: int, has_bias: bool = True) -> nn.Module:
    """The module of a norm; all kinds are torch's own.

    Args:
        has_bias: whether the norm may have the bias that its config gives it.
    """
    match config:
        case LayerNorm():
            return nn.LayerNorm(width, eps=config.eps, bias=config.bias and has_bias)
        case RMSNorm():
            return nn.RMSNorm(width, eps=config.eps)
        case NoNorm():
            return nn.Identity()
        case _:
            raise AssertionError(config)
