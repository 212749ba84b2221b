"""Heads: what a model predicts from the hidden rows of its trunk."""

from meristem.model.heads.head import Head

__all__ = ["Head"]
