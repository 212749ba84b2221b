"""Norms over the width of each row."""

from torch import nn

from meristem.model.config import LayerNorm, Norm, RMSNorm


def build_norm(config: Norm, width: int) -> nn.Module:
    """The module of a norm; both kinds are torch's own."""
    match config:
        case LayerNorm():
            return nn.LayerNorm(width, eps=config.eps, bias=config.bias)
        case RMSNorm():
            return nn.RMSNorm(width, eps=config.eps)
        case _:
            raise AssertionError(config)
