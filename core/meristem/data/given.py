"""Payloads that are passed from Python, and the error for one that is refused."""

from collections.abc import Sequence
from typing import Any

from meristem.errors import DataError


class RefusedSymbol(DataError):
    """A symbol that the tokenizer does not take.

    Attributes:
        row: row of the column it stands in (0 for a single payload).
        offset: byte of the payload.
        symbol: what was found; empty where the whole payload is refused.
        reason: why it is refused.
    """

    def __init__(self, row: int, offset: int, symbol: str, reason: str):
        super().__init__(f"{reason} at position {offset + 1}" if symbol else reason)
        self.row, self.offset, self.symbol, self.reason = row, offset, symbol, reason


def texts_of(values: Sequence[Any]) -> list[bytes]:
    """Encode texts as UTF-8.

    Args:
        values: texts, or objects of other libraries that are one (with a method `__bytes__`) or hold one (as `seq`).

    Raises:
        RefusedSymbol: a value that is neither, or empty.
    """
    found = []
    for row, value in enumerate(values):
        text = getattr(value, "seq", value)
        if not isinstance(text, str) and not hasattr(text, "__bytes__"):
            got = type(value).__name__
            raise RefusedSymbol(row, 0, "", f"must be a text, or an object that is or holds one; got {got}")
        found.append(text.encode() if isinstance(text, str) else bytes(text))
        if not found[-1]:
            raise RefusedSymbol(row, 0, "", "empty")
    return found
