"""A domain in one function, for tests of the data path: one `id TAB payload TAB label ...` a line."""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from meristem.data.labels import text_column
from meristem.data.records import LABEL_PREFIX, SPLIT, ReadOptions, Refusal, Source
from meristem.data.tables import batch_of
from meristem.data.tokenizer import AlphabetTokenizer

RESIDUES = "ACDEFGHIKLMNPQRSTVWY"
TOKENIZER = AlphabetTokenizer(
    vocab=("<cls>", "<eos>", "<mask>", *RESIDUES),
    prefix=("<cls>",),
    suffix=("<eos>",),
    mask="<mask>",
    random=RESIDUES,
)


def read_lines(source: Source, options: ReadOptions) -> Iterator[pa.RecordBatch]:
    """Batches of three records; a label with `|` in it is a list; a record without a payload is refused."""
    rows = []
    with open(source.path) as file:
        for number, line in enumerate(file, start=1):
            name, payload, *labels = line.rstrip("\n").split("\t")
            if not payload:
                options.refuse(Refusal(source.name, number, name, "empty record"))
                continue
            rows.append((name, payload, number, labels))
    names = [LABEL_PREFIX + name for name in options.label_columns]
    names += [SPLIT] if options.split_column else []
    for start in range(0, len(rows), 3):
        part = rows[start : start + 3]
        extra = {name: text_column([_label(row[3][i]) for row in part]) for i, name in enumerate(names)}
        yield batch_of(
            pa.array([row[0] for row in part], pa.string()),
            pa.array([row[1] for row in part], pa.large_string()),
            source,
            np.array([row[2] for row in part]),
            extra,
        )


def _label(word: str) -> str | list[str] | None:
    return word.split("|") if "|" in word else word or None


def random_payloads(rng: np.random.Generator, count: int, low: int = 1, high: int = 60) -> list[str]:
    """Random residues of random lengths."""
    return ["".join(rng.choice(list(RESIDUES), rng.integers(low, high))) for _ in range(count)]
