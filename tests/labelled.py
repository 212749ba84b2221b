"""Records in memory that have nothing but labels, for binding an objective."""

from meristem.data.parts import Part, RunData
from meristem.data.tokenizer import Tokenizer
from meristem.types import Record


def records_of(payloads: list[str] | None = None, start: int = 2, **columns: list) -> list[Record]:
    """One record a row of `columns`, of the file `file.csv`, whose lines begin with `start`."""
    count = max(map(len, columns.values()))
    columns = {name: [*values, *[None] * (count - len(values))] for name, values in columns.items()}
    payloads = payloads or ["M"] * count
    return [
        Record.of(
            f"r{row}",
            payloads[row],
            {name: values[row] for name, values in columns.items() if values[row] is not None},
            f"file.csv:{row + start}",
        )
        for row in range(count)
    ]


def run_data(tokenizer: Tokenizer, payloads: list[str] | None = None, **columns: list) -> RunData:
    """Training records with these labels."""
    return RunData(tokenizer, {"train": Part.of(records_of(payloads, **columns))})
