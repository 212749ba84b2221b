"""Embed files: check them, stream them through the engine, leave parts and a manifest.

Three threads share the work: one reads ahead, one computes, one writes behind. Each holds a chunk or two, so memory
does not grow with the input.
"""

import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from meristem import __version__
from meristem.data.records import ReadOptions, Source
from meristem.domain import load_domain
from meristem.errors import ConfigError, DataError
from meristem.inference.chunks import CHUNK_RECORDS, CHUNK_SYMBOLS, Chunk, ChunkReader
from meristem.inference.dedupe import Seen, Sources, take
from meristem.inference.engine import PLAIN_POOLS, POOLS, PRECISIONS, NotFinite, best_device, best_precision
from meristem.inference.formats import FORMATS, convert
from meristem.inference.threads import Behind, ahead
from meristem.inference.windows import OVERLAP_FRAC
from meristem.inference.workers import EngineOptions, InProcess, Workers
from meristem.inference.writer import OutputDirectory, PartWriter, run_id
from meristem.model.model import Model
from meristem.model_directory import ModelCard, hash_weights, load_any

MANIFEST_VERSION = 1
CHUNK_WORK = 1.5e11
"""Parameters times symbols of a chunk on a CPU, about: ten seconds of one core, and what a kill can cost."""

MIN_CHUNK_SYMBOLS = 4096

CHUNK_VALUES = 1 << 24
"""Numbers that the vectors of a chunk hold about, where each token has one: 64 MB."""


@dataclass(frozen=True, kw_only=True)
class EmbedOptions:
    """How to embed.

    Attributes:
        pool: mean, cls, max, own (the model's), or none for one vector a token; None for own, and mean where
            the model has none.
        layer: whose vectors are wanted: 0 is the embedding, -1 the last.
        format: parquet, or h5 or npz beside it.
        tokens_per_batch: tokens that are run at once at most; None for what suits the device.
        precision: fp32, bf16, or auto: bf16 on a GPU and fp32 on a CPU.
        devices: GPUs (or processes on a CPU) that share the work.
        is_compiled: torch compiles the blocks, where it can; vectors then agree within rounding.
        domain: reads the inputs; the model's own where empty.
        is_skipping: refused records are counted and named in the manifest; else they are errors.
        read: how to read tables.
    """

    pool: str | None = None
    layer: int = -1
    format: str = "parquet"
    tokens_per_batch: int | None = None
    precision: str = "auto"
    devices: int = 1
    is_compiled: bool = False
    domain: str = ""
    is_skipping: bool = False
    read: ReadOptions = field(default_factory=ReadOptions)

    def __post_init__(self) -> None:
        for name, allowed in (
            ("pool", [None, *POOLS]),
            ("format", [*FORMATS]),
            ("precision", ["auto", *PRECISIONS]),
        ):
            got = getattr(self, name)
            if got not in allowed:
                raise ConfigError(f"{name} must be one of {', '.join(filter(None, allowed))}; got {got!r}")
        for name in ("devices", "tokens_per_batch"):
            got = getattr(self, name)
            if got is not None and got < 1:
                raise ConfigError(f"{name} must be 1 or more; got {got}")


class Report(Protocol):
    """Is told how the work goes."""

    def chose(self, device: str, precision: str, tokens_per_batch: int) -> None:
        """How it will be done."""

    def found(self, records: int | None, tokens: int | None) -> None:
        """What there is to do, special rows left out; None where it is not known."""

    def skipped(self, records: int, tokens: int) -> None:
        """Done by an earlier run."""

    def advance(self, records: int, tokens: int) -> None:
        """Done now."""


class Silent:
    """Tells nobody."""

    def chose(self, device: str, precision: str, tokens_per_batch: int) -> None: ...

    def found(self, records: int | None, tokens: int | None) -> None: ...

    def skipped(self, records: int, tokens: int) -> None: ...

    def advance(self, records: int, tokens: int) -> None: ...


def embed_files(
    model: Path | str,
    inputs: Sequence[str],
    output: Path | str,
    options: EmbedOptions | None = None,
    report: Report | None = None,
) -> dict[str, Any]:
    """Embed files into a directory, or go on where that was stopped.

    Args:
        model: a run directory, a model directory or a foreign one.
        inputs: files; `-` is standard input.
        output: new, empty, or of the same run.

    Returns:
        The manifest.

    Raises:
        ConfigError: options that cannot work, or an output that belongs to another run.
        DataError: an input that cannot be used; nothing is left behind unless it came from standard input.
        CheckpointError: a model that cannot be read.
    """
    return _Run(Path(model), inputs, Path(output), options or EmbedOptions(), report or Silent()).go()


def default_pool(card: ModelCard) -> str:
    """The model's own pooling, and mean where it has none."""
    own = card.architecture.pool
    return next((name for name, pool in PLAIN_POOLS.items() if pool == own), "mean" if own is None else "own")


class _Run:
    def __init__(self, model: Path, inputs: Sequence[str], output: Path, options: EmbedOptions, report: Report):
        self.model_path, self.inputs, self.options, self.report = model, list(inputs), options, report
        if output.suffix in (".h5", ".hdf5", ".npz", ".parquet"):
            raise ConfigError(
                f"--output must be a directory; got {output}; with --output {output.with_suffix('')} "
                f"--format {output.suffix[1:]} the file is in it"
            )
        if self.inputs.count("-") > 1:
            raise ConfigError("standard input (-) can be read once; got it twice")
        self.output = OutputDirectory(output)
        self.began = time.monotonic()
        self.num_new = self.num_windowed = self.num_vectors = 0

    def go(self) -> dict[str, Any]:
        self.output.check_foreign()
        self.card, model = load_any(self.model_path)
        self.domain = load_domain(self.options.domain or self.card.domain)
        self.engine = self._engine_options(model)
        self.embedder = self.engine.build(model, self.card.tokenizer.num_special)
        counted = None
        if "-" not in self.inputs:
            counted = self._reader()
            for _ in counted:
                pass
        identity = {
            "model": hash_weights(self.model_path),
            "input": counted.digest if counted else "<stdin>",
            "pool": self.engine.pool,
            "layer": self.engine.layer,
            "precision": self.engine.precision,
            "device": self.engine.device,
            "compiled": self.engine.is_compiled,
            "chunk": [CHUNK_RECORDS, self._max_symbols()],
        }
        self.output.check_identity(identity)
        self.report.chose(self.engine.device, self.engine.precision, self.embedder.trunk.tokens_per_batch)
        if counted:
            self.report.found(counted.num_records, counted.num_symbols)
        else:
            self.report.found(None, None)
        workers = self._workers()
        self.output.claim()
        try:
            return self._work(identity, workers)
        finally:
            workers.close()
            self.output.release()

    def _engine_options(self, model: Model) -> EngineOptions:
        options = self.options
        device = best_device()
        pool = options.pool or default_pool(self.card)
        layer = model.trunk.resolve_layer(options.layer)
        precision = best_precision(options.precision, device)
        return EngineOptions(pool, layer, precision, device, options.tokens_per_batch, options.is_compiled)

    def _workers(self) -> "Workers | InProcess":
        if self.options.devices == 1:
            return InProcess(self.embedder)
        return Workers(self.model_path, self.engine, self.options.devices)

    def _max_symbols(self) -> int:
        """Tokens of a chunk: fewer where they cost much, or where each has a vector that must fit in memory."""
        most = CHUNK_SYMBOLS
        if self.engine.device == "cpu":
            num_parameters = sum(parameter.numel() for parameter in self.embedder.trunk.model.trunk.parameters())
            most = min(most, max(MIN_CHUNK_SYMBOLS, int(CHUNK_WORK / num_parameters)))
        if self.engine.pool == "none":
            most = min(most, max(1024, CHUNK_VALUES // self.embedder.width))
        return most

    def _reader(self) -> ChunkReader:
        return ChunkReader(
            self.domain,
            self.card.tokenizer,
            self.inputs,
            self.options.read,
            self.options.is_skipping,
            self._max_symbols(),
        )

    def _work(self, identity: dict[str, Any], workers: "Workers | InProcess") -> dict[str, Any]:
        done = self.output.count_parts()
        spent = self.output.part_facts(done - 1)["seconds"] if done else 0.0
        reader = self._reader()
        run = run_id(identity)
        manifest = lambda is_complete: self._manifest(identity, reader, is_complete, spent)  # noqa: E731
        self.output.write_manifest(manifest(False))
        tokenizer = self.card.tokenizer
        writer = PartWriter(
            self.output, run, self.embedder.width, self.engine.pool != "none", tokenizer.vocab, tokenizer.num_special
        )
        seen = Seen(is_across_parts=self.engine.pool != "none")
        behind: Behind[_Job] = Behind(lambda job: self._write(writer, job, spent), ahead=2 * self.options.devices)
        try:
            with ahead(reader) as chunks:
                for chunk in chunks:
                    sources = seen.look_up(chunk.index, chunk.column)
                    self._count(chunk, sources)
                    if chunk.index < done:
                        self._check_part(chunk, run)
                        self.report.skipped(len(chunk), self._num_symbols(chunk))
                        continue
                    column = take(chunk.column, sources.new_rows)
                    future = workers.submit(column, self._advance)
                    again = len(chunk) - len(column)
                    if again:
                        self.report.advance(again, self._num_symbols(chunk) - self._num_symbols(column))
                    behind.put(_Job(chunk, sources, future))
            behind.close()
        except BaseException:
            behind.close(is_giving_up=True)
            self._leave(manifest(False))
            raise
        num_parts = self.output.count_parts()
        if chunk.index + 1 != num_parts:
            raise DataError(
                f"--output {self.output.path} has {num_parts} parts and this input makes {chunk.index + 1}; "
                "it belongs to a longer input: name another directory"
            )
        file = convert(self.output.path, self.options.format, reader.num_records, self.num_vectors)
        values = manifest(True) | ({"file": file} if file else {})
        self.output.write_manifest(values)
        return values

    def _leave(self, manifest: dict[str, Any]) -> None:
        """Leave things so that the run can go on, or nothing where there is nothing to go on from."""
        try:
            if manifest["parts"]:
                self.output.write_manifest(manifest)
            else:
                self.output.remove()
        except (OSError, DataError):  # a full disk: the manifest that is there says incomplete as well
            pass

    def _num_symbols(self, chunk: Any) -> int:
        column = chunk.column if isinstance(chunk, Chunk) else chunk
        return int(column.offsets[-1]) - len(column) * sum(self.card.tokenizer.num_special)

    def _advance(self, records: int, tokens: int) -> None:
        self.report.advance(records, tokens - records * sum(self.card.tokenizer.num_special))

    def _count(self, chunk: Chunk, sources: Sources) -> None:
        self.num_new += len(sources.new_rows)
        self.num_vectors += int(self.embedder.num_vectors(chunk.column).sum())
        limit = self.card.architecture.max_length
        if limit is not None:
            self.num_windowed += int((chunk.column.lengths > limit).sum())

    def _check_part(self, chunk: Chunk, run: str) -> None:
        facts = self.output.part_facts(chunk.index)
        if facts.get("run") != run or facts.get("digest") != chunk.digest:
            raise ConfigError(
                f"--output {self.output.path} belongs to another input: {self.output.part(chunk.index).name} holds "
                "other records; name another directory, or remove this one"
            )

    def _write(self, writer: PartWriter, job: "_Job", spent: float) -> None:
        try:
            values = job.values.result()
        except NotFinite as error:
            name = job.chunk.name(int(job.sources.new_rows[error.row]))
            raise DataError(
                f"{name}: its vector is not finite (layer {self.engine.layer}, {self.engine.precision}); "
                "the model is damaged, or needs --precision fp32"
            ) from error
        writer.write(job.chunk, job.sources, values, spent + time.monotonic() - self.began)

    def _manifest(
        self, identity: dict[str, Any], reader: ChunkReader, is_complete: bool, spent: float
    ) -> dict[str, Any]:
        refused = [asdict(refusal) for refusal in reader.refused]
        return {
            "format_version": MANIFEST_VERSION,
            "complete": is_complete,
            "run": identity,
            "model": str(self.model_path),
            "domain": self.domain.name,
            "inputs": [
                {"path": Source(name).name, "records": count} for name, count in zip(self.inputs, reader.per_input)
            ],
            "options": {
                "pool": self.engine.pool,
                "layer": self.engine.layer,
                "format": self.options.format,
                "precision": self.engine.precision,
                "device": self.engine.device,
                "devices": self.options.devices,
                "threads": torch.get_num_threads(),
                "tokens_per_batch": self.embedder.trunk.tokens_per_batch,
                "on_error": "skip" if self.options.is_skipping else "refuse",
                "sequence_column": self.options.read.payload_column,
                "id_column": self.options.read.id_column,
            },
            "width": self.embedder.width,
            "parts": self.output.count_parts(),
            "records": reader.num_records,
            "tokens": reader.num_symbols,
            "vectors": self.num_vectors,
            "computed": self.num_new,
            "windowed": {"records": self.num_windowed, "overlap": OVERLAP_FRAC},
            "replaced": dict(reader.replaced),
            "refused": {"count": reader.num_refused, "records": refused},
            "seconds": round(spent + time.monotonic() - self.began, 3),
            "versions": {"meristem": __version__, "torch": torch.__version__},
        }


@dataclass(frozen=True)
class _Job:
    chunk: Chunk
    sources: Sources
    values: "Future[np.ndarray]"
