"""Notes from the field: one a line, read by byte pairs that were learned from the sample and fold case and accents."""

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from meristem.data.reading.open import open_source
from meristem.data.reading.reader import Reader
from meristem.data.records import ReadOptions, Refusal, Source, batch_of
from meristem.data.subwords import SubwordTokenizer
from meristem.domain import Domain
from meristem.model.config import Attention, Embedding, FeedForward, TokenHead, TransformerConfig

FOLDER = Path(__file__).parent
NUM_SYMBOLS = 300
SPECIAL = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}


class NoteReader(Reader):
    """Reads a text file: each line that is not blank is a note."""

    def read(self, source: Source, options: ReadOptions) -> Iterator[pa.RecordBatch]:
        options.require_bare(source.name, "a file of notes has one note a line and no columns")
        ids, notes, lines, size = [], [], [], 0
        with open_source(source) as stream:
            for line, raw in enumerate(stream, start=1):
                try:
                    note = raw.decode("utf-8").strip()
                except UnicodeDecodeError as error:
                    options.refuse(Refusal(source.name, line, f"note{line}", f"is not UTF-8: {error.reason}"))
                    continue
                if note:
                    ids.append(f"note{line}")
                    notes.append(note)
                    lines.append(line)
                    size += len(raw)
                if size >= options.batch_bytes:
                    yield batch_of(pa.array(ids), pa.array(notes, pa.large_string()), source.name, lines)
                    ids, notes, lines, size = [], [], [], 0
        if ids:
            yield batch_of(pa.array(ids), pa.array(notes, pa.large_string()), source.name, lines)

    def canonical(self, payload: str) -> bytes:
        """Notes that differ in case and spaces alone are one note."""
        return " ".join(payload.casefold().split()).encode()


def tokenizer() -> SubwordTokenizer:
    """The vocabulary that `learn.py` wrote."""
    return SubwordTokenizer((FOLDER / "vocabulary.json").read_text("utf-8"), SPECIAL)


PRESETS = {
    "small": TransformerConfig(
        width=64,
        num_layers=2,
        embedding=Embedding(vocab_size=NUM_SYMBOLS),
        attention=Attention(num_heads=4),
        feedforward=FeedForward(width=128),
        head=TokenHead(),
    )
}

domain = Domain("field-notes", NoteReader(), tokenizer, PRESETS, sample=FOLDER / "notes.txt")
