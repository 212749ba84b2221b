"""Records in memory for binding an objective, and what gives it their tokens."""

from meristem.data.parts import Encoder, Part, RunData
from meristem.data.tokenizer import Tokenizer
from meristem.types import INPUT, Record, Tokens


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


def ready(*tokens: Tokens, tokenizer: Tokenizer | None = None, inputs: tuple[str, ...] = (INPUT,)) -> Encoder:
    """Gives an objective these tokens, of the inputs in turn."""
    return Encoder(dict(zip(inputs, tokens)), {} if tokenizer is None else dict.fromkeys(inputs, tokenizer))


def encoded(tokenizer: Tokenizer, record: Record) -> Encoder:
    """Gives an objective the tokens of the inputs of a record, and of other payloads."""
    tokens = [tokenizer.encode(payload) for payload in record.inputs.values()]
    return ready(*tokens, tokenizer=tokenizer, inputs=tuple(record.inputs))
