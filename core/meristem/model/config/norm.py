"""Configs of norms over the width of a row."""

from abc import ABC
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Norm(ABC):
    """How the rows of the trunk are normalised."""


@dataclass(frozen=True, kw_only=True)
class LayerNorm(Norm):
    """Layer normalisation (Ba 2016)."""

    eps: float = 1e-5
    bias: bool = True


@dataclass(frozen=True, kw_only=True)
class RMSNorm(Norm):
    """Root-mean-square normalisation (Zhang 2019)."""

    eps: float = 1e-6


@dataclass(frozen=True, kw_only=True)
class NoNorm(Norm):
    """No norm: rows are not changed."""
