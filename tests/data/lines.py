"""A reader, for tests of the data path: one `id TAB payload ... TAB label ...` a line."""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from meristem.data.labels import text_column
from meristem.data.reading.reader import Reader
from meristem.data.records import GROUP, LABEL_PREFIX, SPLIT, ReadOptions, Refusal, Source, batch_of
from meristem.data.tokenizer import AlphabetTokenizer

RESIDUES = "ACDEFGHIKLMNPQRSTVWY"
TOKENIZER = AlphabetTokenizer(
    vocab=("<cls>", "<eos>", "<mask>", *RESIDUES),
    prefix=("<cls>",),
    suffix=("<eos>",),
    mask="<mask>",
    random=RESIDUES,
)


class LinesReader(Reader):
    """Batches of three records; an empty label is missing; one with `|` is a list; an empty payload is refused."""

    def read(self, source: Source, options: ReadOptions) -> Iterator[pa.RecordBatch]:
        rows = []
        with open(source.path) as file:
            for number, line in enumerate(file, start=1):
                name, *more = line.rstrip("\n").split("\t")
                payloads, labels = more[: len(options.columns)], more[len(options.columns) :]
                if not all(payloads):
                    options.refuse(Refusal(source.name, number, name, "empty record"))
                    continue
                rows.append((name, payloads, number, labels))
        names = [GROUP] if options.group_column else []
        names += [SPLIT] if options.split_column else []
        names = [LABEL_PREFIX + name for name in options.label_columns] + names
        for start in range(0, len(rows), 3):
            part = rows[start : start + 3]
            inputs = {
                name: pa.array([row[1][i] for row in part], pa.large_string()) for i, name in enumerate(options.columns)
            }
            extra = {name: text_column([_label(row[3][i]) for row in part]) for i, name in enumerate(names)}
            yield batch_of(pa.array([row[0] for row in part]), inputs, source.name, [row[2] for row in part], extra)

    def canonical(self, payload: str | bytes) -> bytes:
        return super().canonical(payload).upper()


def _label(word: str) -> str | list[str] | None:
    return word.split("|") if "|" in word else word or None


def random_payloads(rng: np.random.Generator, count: int, low: int = 1, high: int = 60) -> list[str]:
    """Random residues of random lengths."""
    return ["".join(rng.choice(list(RESIDUES), rng.integers(low, high))) for _ in range(count)]
