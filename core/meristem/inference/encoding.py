"""From payloads to token columns ahead of the model: in this process, or in several where decoding takes long."""

import multiprocessing
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from meristem.data.records import PAYLOAD
from meristem.data.tokenizer import RefusedSymbol, Tokenizer
from meristem.types import TokenColumn


@dataclass(frozen=True)
class Encoded:
    """The tokens of a table of records.

    Attributes:
        column: of the records that the tokenizer takes.
        is_kept: `[N]` which these are.
        refused: row and reason of the others; where none is to be skipped, of the first, and then `column` is empty.
    """

    column: TokenColumn
    is_kept: np.ndarray
    refused: tuple[tuple[int, str], ...] = ()


def encode(tokenizer: Tokenizer, payloads: pa.Array, is_skipping: bool) -> Encoded:
    """Encode a column of payloads, without those that the tokenizer refuses."""
    is_kept = np.ones(len(payloads), bool)
    refused: list[tuple[int, str]] = []
    while True:
        try:
            kept = payloads if not refused else payloads.filter(pa.array(is_kept))
            return Encoded(tokenizer.encode_column(kept), is_kept, tuple(refused))
        except RefusedSymbol as error:
            row = int(np.flatnonzero(is_kept)[error.row])
            refused.append((row, str(error)))
            is_kept[row] = False
            if not is_skipping:
                nothing = TokenColumn(ids=np.zeros(0, np.int64), offsets=np.zeros(1, np.int64))
                return Encoded(nothing, is_kept, tuple(refused))


def encode_tables(
    tables: Iterable[pa.RecordBatch], tokenizer: Tokenizer, is_skipping: bool, workers: int = 0
) -> Iterator[tuple[pa.RecordBatch, Encoded]]:
    """Each table and its tokens, in the order of the tables.

    Args:
        is_skipping: refused records are left out; else encoding a table ends at the first.
        workers: processes that encode; 0 for this one. Without effect on what comes.
    """
    if not workers:
        for table in tables:
            yield table, encode(tokenizer, table[PAYLOAD], is_skipping)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start, (tokenizer, is_skipping)) as pool:
        waiting: deque = deque()
        try:
            for table in tables:
                waiting.append((table, pool.submit(_encode, table[PAYLOAD])))
                if len(waiting) > 2 * workers:
                    done, future = waiting.popleft()
                    yield done, future.result()
            while waiting:
                done, future = waiting.popleft()
                yield done, future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


_own: tuple[Tokenizer, bool] | None = None
"""Tokenizer of a worker process, and whether it skips."""


def _start(tokenizer: Tokenizer, is_skipping: bool) -> None:
    global _own
    _own = (tokenizer, is_skipping)


def _encode(payloads: pa.Array) -> Encoded:
    assert _own is not None
    tokenizer, is_skipping = _own
    return encode(tokenizer, payloads, is_skipping)
