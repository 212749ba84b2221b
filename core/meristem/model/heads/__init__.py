"""Heads: what a model predicts from the hidden rows of its trunk."""

from meristem.model.heads.head import Head, HeadSpec
from meristem.model.heads.labels import LabelHead, Readout, readouts_of
from meristem.model.heads.symbols import SymbolHead, Symbols

__all__ = ["Head", "HeadSpec", "LabelHead", "Readout", "SymbolHead", "Symbols", "readouts_of"]
