"""What is computed for each record and how it is run, as one value for each verb.

A `Job` says what the rows of its output are. `run.run_job` reads the records, hands them out in chunks, writes the rows
and goes on where a run was stopped.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from meristem.data.reading.reader import Reader
from meristem.data.records import ReadOptions
from meristem.domain import Domain
from meristem.errors import ConfigError
from meristem.inference.encoding import Reading, sides_of
from meristem.inference.engine import PRECISIONS, Advance, TrunkRunner, best_precision, unheard
from meristem.model.model import Model
from meristem.model_directory import ModelCard
from meristem.types import TokenColumn


@dataclass(frozen=True, kw_only=True)
class JobOptions:
    """How a job is run.

    Attributes:
        tokens_per_batch: tokens that are run at once at most; None for what suits the device.
        precision: fp32, bf16, or auto: bf16 on a GPU and fp32 on a CPU.
        devices: GPUs (or processes on a CPU) that share the work.
        workers: processes that turn payloads into tokens, which takes long for encoded files; 0 for a thread.
        is_compiled: torch compiles the blocks, where it can; results then agree within rounding.
        domain: name of the domain that reads the inputs; the model's own where empty.
        tokenizer: options of the domain's tokenizer that are to differ from the model's.
        is_skipping: refused records are counted and named in the manifest; else they are errors.
        is_overwriting: an output file that is there already is replaced.
        column: columns of a table that hold the inputs, as `columns_of` takes them; empty for those of `read`.
        read: how to read tables.
    """

    tokens_per_batch: int | None = None
    precision: str = "auto"
    devices: int = 1
    workers: int = 0
    is_compiled: bool = False
    domain: str = ""
    tokenizer: Mapping[str, Any] = field(default_factory=dict)
    is_skipping: bool = False
    is_overwriting: bool = False
    column: str | Mapping[str, str] | Sequence[str] = ()
    read: ReadOptions = field(default_factory=ReadOptions)

    def __post_init__(self) -> None:
        if self.precision not in ("auto", *PRECISIONS):
            raise ConfigError(f"precision must be one of auto, {', '.join(PRECISIONS)}; got {self.precision!r}")
        for name, least in (("devices", 1), ("tokens_per_batch", 1), ("workers", 0)):
            got = getattr(self, name)
            if got is not None and got < least:
                raise ConfigError(f"{name} must be {least} or more; got {got}")

    def trunk(self, model: Model, device: str, layer: int = -1) -> TrunkRunner:
        """Runs the trunk of a model up to a layer, on `cpu`, `cuda` or one of several GPUs (`cuda:1`)."""
        dtype = PRECISIONS[best_precision(self.precision, device)]
        return TrunkRunner(model, layer, self.tokens_per_batch, dtype, device, self.is_compiled)


class Running(ABC):
    """A job with the model that it runs on.

    Args:
        job: of the class that names this one as its `running`.

    Raises:
        ConfigError: the model cannot do it.

    Attributes:
        reading: what it reads of a record.
        identity: what decides the rows beside model, input, device and precision: plain values by option name.
        facts: what the manifest says of the rows.
        fault: what is wrong where a row is not finite, as messages say it.
        is_reused: whether the row of a record serves equal records of later parts; rows with a value a token are too
            large.
    """

    reading: Reading
    tokens_per_batch: int
    identity: Mapping[str, Any]
    facts: Mapping[str, Any]
    fault: str
    is_reused: bool = True

    @abstractmethod
    def __init__(self, job: Any, card: ModelCard, model: Model, device: str): ...

    @abstractmethod
    def rows(self, column: TokenColumn, advance: Advance = unheard) -> pa.Table:
        """The rows of some sequences, one each, in their order.

        Args:
            advance: told of records and tokens as they are done; of as many in all as `work` says.

        Raises:
            NotFinite: names the first sequence whose row is not finite.
        """

    def unfit(self, column: TokenColumn) -> Mapping[int, str]:
        """Rows of a column that the job cannot work on, and why; they are refused."""
        return {}

    def num_values(self, column: TokenColumn) -> np.ndarray:
        """`[N]` how many results each row holds: one, or one a token."""
        return np.ones(len(column), np.int64)

    def work(self, column: TokenColumn) -> np.ndarray:
        """`[N]` tokens that are run for each row, as progress counts them: here those of the payloads, once."""
        return np.sum([side.payload_lengths for side in sides_of(column)], axis=0)

    def most_symbols(self, most: int) -> int:
        """Payload symbols of a chunk at most, where `most` are few enough for the time a chunk takes."""
        return most


@dataclass(frozen=True, kw_only=True)
class Job(JobOptions, ABC):
    """What is computed for each record, and how; a plain value, which travels to the processes that share the work."""

    verb: ClassVar[str]
    """As the manifest calls it."""

    running: ClassVar[type[Running]]
    """Runs the job on a model."""

    suffixes: ClassVar[tuple[str, ...]] = ()
    """Endings of the file that is written; none where the output is a folder."""

    keeps_payloads: ClassVar[bool] = False
    """Whether rows also hold the payload of their record, as the column `payload`."""

    def reader(self, domain: Domain) -> Reader:
        """The reader of the records; by default that of the domain."""
        return domain.reader

    @abstractmethod
    def finish(self, parts: Path, output: Path, manifest: dict[str, Any]) -> None:
        """Make what was asked for of finished parts; the manifest gets the name of a `file` made in the output folder.

        Args:
            manifest: counts of records and values among others.
        """


def too_long(column: TokenColumn, limit: int | None) -> dict[int, str]:
    """Rows of a column that are longer than a model's positions allow, and what must hold.

    Args:
        limit: tokens of a sequence, special ones included; None for no bound.
    """
    found = {}
    for side in sides_of(column) if limit is not None else ():
        for row in np.flatnonzero(side.lengths > limit).tolist():
            got = side.payload_lengths[row]
            most = limit - (side.lengths[row] - got)
            found[row] = f"must be {most} tokens or fewer, as the model's positions allow; got {got}"
    return found
