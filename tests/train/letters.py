"""A domain of letters, for a second input that another domain's tokenizer reads."""

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from meristem.data.reading.reader import Reader
from meristem.data.records import ReadOptions, Source
from meristem.data.tokenizer import AlphabetTokenizer
from meristem.domain import Domain

LETTERS = "abcdefghijklmnopqrstuvwxyz "


class NoReader(Reader):
    """Letters stand in other domains' tables."""

    def read(self, source: Source, options: ReadOptions) -> Iterator[pa.RecordBatch]:
        raise AssertionError("the domain of the run reads")


def tokenizer(more: str = "") -> AlphabetTokenizer:
    return AlphabetTokenizer(("<s>", "</s>", *LETTERS, *more), prefix=("<s>",), suffix=("</s>",))


domain = Domain("letters", NoReader(), tokenizer, {}, Path(__file__))
