"""What a way of scoring records is, so that a domain can bring its own."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # importing torch takes seconds, and help shows options without it
    import numpy as np
    import pyarrow as pa

    from meristem.scoring.running import RunningModel
    from meristem.types import TokenColumn


def option(default: Any, help: str) -> Any:
    """A field of a scorer's options: its default, and the line that `--help` shows for it."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class NoOptions:
    """The options of a scorer that has none."""


@dataclass(frozen=True, kw_only=True)
class Scorer:
    """A way of scoring records with a model: `meristem score MODEL INPUT --scorer NAME`.

    A domain offers scorers by name (`Domain.scorers`). Each gives a row of a table for each record, or an array.

    Attributes:
        help: one line that says what it gives.
        describe: given the model and the options, says in one line what the values are. It is called before any record
            is read, and raises ConfigError where the model cannot be scored so.
        score: given the model, a column and the options, gives a result for each record, in order: a mapping of column
            names to values, or an array. It reports the tokens that it runs by `RunningModel.advance`.
        schema: given the model and the options, the columns of the table beside `id`; None where results are arrays.
        options: a frozen dataclass whose fields are made by `option`. Each becomes an option of the command line; its
            type is bool, int, float, str, a Literal of strings, or one of these or None.
        work: given the model, a column and the options, `[N]` tokens that scoring each record runs, for progress.
        num_runs: given the model and the options, how often a token is run, about: records that take long are handed
            out and written in smaller chunks.
        draw: gives a matplotlib figure of one array, given the array, the model and a column of the one record.
        reads_two_sides: of an encoder-decoder it scores targets given sources: the column has a `source`.
    """

    help: str
    describe: "Callable[[RunningModel, Any], str]"
    score: "Callable[[RunningModel, TokenColumn, Any], Iterable[Any]]"
    schema: "Callable[[RunningModel, Any], pa.Schema] | None" = None
    options: type = NoOptions
    work: "Callable[[RunningModel, TokenColumn, Any], np.ndarray]" = lambda running, column, options: column.lengths
    num_runs: "Callable[[RunningModel, Any], int]" = lambda running, options: 1
    draw: "Callable[[np.ndarray, RunningModel, TokenColumn], Any] | None" = None
    reads_two_sides: bool = False
