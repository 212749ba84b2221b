"""One loop for every job: check the inputs, stream them through the engine, leave parts and a manifest.

Three threads share the work: one reads ahead, one computes, one writes behind. Each holds a chunk or two, so memory
does not grow with the input.
"""

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import closing, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import torch

from meristem import __version__
from meristem.data.records import Source, columns_of
from meristem.domain import domain_of_model
from meristem.errors import ConfigError, DataError
from meristem.files import read_json, write_json
from meristem.inference.chunks import CHUNK_RECORDS, CHUNK_SYMBOLS, Chunk, ChunkReader
from meristem.inference.dedupe import Seen, Sources
from meristem.inference.engine import NotFinite, best_device, best_precision
from meristem.inference.job import Job
from meristem.inference.output import OutputDirectory, PartWriter, run_id
from meristem.inference.threads import Behind, ahead
from meristem.inference.windows import OVERLAP_FRAC
from meristem.inference.workers import InProcess, Workers
from meristem.model_directory import hash_weights, load_any
from meristem.types import INPUT, TokenColumn

MANIFEST_VERSION = 2
CHUNK_WORK = 1.5e11
"""Parameters times symbols of a chunk on a CPU, about: ten seconds of one core, and what a kill can cost."""

MIN_CHUNK_SYMBOLS = 4096


class Report(Protocol):
    """Is told how the work goes."""

    def chose(self, device: str, precision: str, tokens_per_batch: int) -> None:
        """How it will be done."""
        return

    def found(self, records: int | None, tokens: int | None) -> None:
        """What there is to do, special rows left out; None where it is not known."""
        return

    def skipped(self, records: int, tokens: int) -> None:
        """Done by an earlier run."""
        return

    def advance(self, records: int, tokens: int) -> None:
        """Done now."""
        return


class Silent(Report):
    """A report that ignores the progress."""


def run_job(
    job: Job, model: Path | str, inputs: Sequence[str], output: Path | str, report: Report | None = None
) -> dict[str, Any]:
    """Run a job over files, or go on where that was stopped; gives the manifest.

    Rows lie in the order of the input. Equal records are computed once. A job that writes one file keeps its parts in
    the folder `<output>.parts` until the file is whole; what the run did then stands in `<output>.manifest.json`.

    Args:
        model: a run directory, a model directory or a foreign one.
        inputs: files; `-` is standard input.
        output: a folder, new, empty or of the same run; or a file, where the job writes one.
        report: receives the progress.

    Raises:
        ConfigError: options that cannot work, or an output that belongs to another run or to the user.
        DataError: an input that cannot be used; nothing is left behind unless it came from standard input.
        CheckpointError: a model that cannot be read.
    """
    return _Run(job, Path(model), list(inputs), Path(output), report or Silent()).go()


class _Run:
    def __init__(self, job: Job, model: Path, inputs: list[str], output: Path, report: Report) -> None:
        self.job, self.model_path, self.inputs, self.output, self.report = job, model, inputs, output, report
        if inputs.count("-") > 1:
            raise ConfigError("standard input (-) can be read once; got it twice")
        if job.suffixes and output.suffix not in job.suffixes:
            raise ConfigError(f"--output must end in {', '.join(job.suffixes)}; got {output}")
        if job.suffixes and output.is_dir():
            raise ConfigError(f"--output must be a file; {output} is a directory")
        if not job.suffixes and output.suffix in (".h5", ".hdf5", ".npz", ".parquet"):
            raise ConfigError(
                f"--output must be a directory; got {output}; with --output {output.with_suffix('')} "
                f"--format {output.suffix[1:]} the file is in it"
            )
        self.parts = OutputDirectory(output.with_name(f"{output.name}.parts") if job.suffixes else output)
        self.summary = output.with_name(f"{output.name}.manifest.json") if job.suffixes else None
        self.began = time.monotonic()
        self.num_new = self.num_windowed = self.num_rows = 0

    def go(self) -> dict[str, Any]:
        self.parts.check_foreign()
        if self.summary is not None and not self.summary.exists():
            self._finished({})  # refuses a file of another before any work is done
        self.card, model = load_any(self.model_path, self.job.tokenizer)
        self.domain = domain_of_model(self.job.domain, self.card.domain)
        self.domain = replace(self.domain, reader=self.job.reader(self.domain))
        self.device = best_device()
        self.job = replace(self.job, precision=best_precision(self.job.precision, self.device))
        self.running = self.job.running(self.job, self.card, model, self.device)
        self.max_length = model.config.max_length
        # tokens of a chunk: fewer where they cost much, or where each has a row that must fit in memory
        most = CHUNK_SYMBOLS
        if self.device == "cpu":
            num_parameters = sum(parameter.numel() for parameter in model.trunk.parameters())
            most = min(most, max(MIN_CHUNK_SYMBOLS, int(CHUNK_WORK / num_parameters)))
        self.chunk_symbols = self.running.most_symbols(most)
        counted = work = None
        if "-" not in self.inputs:
            counted = self._reader()
            work = sum(self._work_of(chunk.column) for chunk in counted)
        identity = {
            "model": hash_weights(self.model_path),
            "input": counted.digest if counted else "<stdin>",
            **({"tokenizer": self.card.tokenizer.fingerprint} if self.job.tokenizer else {}),
            "job": self.job.verb,
            **self.running.identity,
            "precision": self.job.precision,
            "device": self.device,
            "compile": self.job.is_compiled,
            "chunk": [CHUNK_RECORDS, self.chunk_symbols],
        }
        self.parts.check_identity(identity)
        done = self._finished(identity)
        self.report.chose(self.device, self.job.precision, self.running.tokens_per_batch)
        self.report.found(counted.num_records if counted else None, work)
        if done is not None:
            self.report.skipped(done["records"], done["tokens"])
            return done
        is_here = self.job.devices == 1
        workers = InProcess(self.running) if is_here else Workers(self.model_path, self.job, self.device)
        with self.parts.claimed(), closing(workers):
            return self._work(identity, workers)

    def _finished(self, identity: Mapping[str, Any]) -> dict[str, Any] | None:
        """The manifest of an earlier run that wrote this very file; ConfigError where another has written it."""
        if self.summary is None or not self.output.exists() or self.parts.path.exists():
            return None
        manifest = read_json(self.summary) if self.summary.exists() else {}
        if manifest.get("run") == identity and identity["input"] != "<stdin>":
            return manifest
        if not self.job.is_overwriting:
            raise ConfigError(
                f"--output {self.output} is there already, and not by this command; name another file, or --overwrite"
            )
        return None

    def _reader(self) -> ChunkReader:
        options, reading = self.job, self.running.reading
        names = tuple(reading.tokenizers)
        said = options.column or options.read.columns
        if isinstance(said, Mapping) and tuple(said) == (INPUT,):  # a record of one input, whatever its name
            said = said[INPUT]
        foreign = [name for name, card in self.card.inputs.items() if card.domain not in ("", self.domain.name)]
        return ChunkReader(
            self.domain,
            replace(reading, views=self.domain.build_verb_views(self.card.tokenizer)),
            self.inputs,
            replace(options.read, columns=columns_of(said, names), foreign=tuple(set(foreign) & set(names))),
            options.is_skipping,
            self.chunk_symbols,
            options.workers,
            self.running.unfit,
        )

    def _work(self, identity: dict[str, Any], workers: "Workers | InProcess") -> dict[str, Any]:
        done = self.parts.count_parts()
        spent = self.parts.part_facts(done - 1)["seconds"] if done else 0.0
        reader = self._reader()
        run = run_id(identity)
        manifest = lambda is_complete: self._manifest(identity, reader, is_complete, spent)  # noqa: E731
        self.parts.write_manifest(manifest(False))
        writer = PartWriter(self.parts, run, self.job.keeps_payloads)
        seen = Seen(is_across_parts=self.running.is_reused)
        behind: Behind[tuple[Chunk, Sources, Future[pa.Table] | None]] = Behind(
            lambda piece: self._write(writer, spent, *piece), ahead=2 * self.job.devices
        )
        try:
            with ahead(reader) as chunks:
                for chunk in chunks:
                    sources = seen.look_up(chunk.index, chunk.column)
                    self.num_new += len(sources.new_rows)
                    self.num_rows += int(self.running.num_values(chunk.column).sum())
                    if self.max_length is not None:
                        self.num_windowed += int((chunk.column.lengths > self.max_length).sum())
                    if chunk.index < done:
                        self._check_part(chunk, run)
                        self.report.skipped(len(chunk), self._work_of(chunk.column))
                        continue
                    is_new = len(sources.new_rows) == len(chunk)
                    column = chunk.column if is_new else chunk.column.take(sources.new_rows)
                    size = self._work_of(column)
                    future = workers.submit(column, self.report.advance, size) if len(column) else None
                    if again := len(chunk) - len(column):
                        self.report.advance(again, self._work_of(chunk.column) - size)
                    behind.put((chunk, sources, future))
            behind.close()
        except BaseException:
            behind.close(is_giving_up=True)
            # leave things so that the run can go on, or nothing where there is nothing to go on from
            with suppress(OSError, DataError):  # a full disk: the manifest that is there says incomplete as well
                left = manifest(False)
                if left["parts"]:
                    self.parts.write_manifest(left)
                else:
                    self.parts.remove()
            raise
        num_parts = self.parts.count_parts()
        if chunk.index + 1 != num_parts:
            raise DataError(
                f"--output {self.parts.path} has {num_parts} parts and this input makes {chunk.index + 1}; "
                "it belongs to a longer input: name another directory"
            )
        return self._finish(manifest(True))

    def _finish(self, values: dict[str, Any]) -> dict[str, Any]:
        self.output.parent.mkdir(parents=True, exist_ok=True)
        self.job.finish(self.parts.path, self.output, values)
        if self.summary is None:
            self.parts.write_manifest(values)
        else:
            write_json(self.summary, values, self.parts.path)
            self.parts.remove()
        return values

    def _work_of(self, column: TokenColumn) -> int:
        """Tokens of a column as progress counts them."""
        return int(self.running.work(column).sum())

    def _check_part(self, chunk: Chunk, run: str) -> None:
        facts = self.parts.part_facts(chunk.index)
        if facts.get("run") != run or facts.get("digest") != chunk.digest:
            raise ConfigError(
                f"--output {self.parts.path} belongs to another input: {self.parts.part(chunk.index).name} holds "
                "other records; name another directory, or remove this one"
            )

    def _write(
        self, writer: PartWriter, spent: float, chunk: Chunk, sources: Sources, rows: "Future[pa.Table] | None"
    ) -> None:
        """Write a chunk; `rows` is None if all its records are copies of earlier ones."""
        try:
            new_rows = pa.table({}) if rows is None else rows.result()
        except NotFinite as error:
            name = chunk.name(int(sources.new_rows[error.row]))
            raise DataError(f"{name}: {self.running.fault}") from error
        writer.write(chunk, sources, new_rows, spent + time.monotonic() - self.began)

    def _manifest(
        self, identity: dict[str, Any], reader: ChunkReader, is_complete: bool, spent: float
    ) -> dict[str, Any]:
        job, inputs = self.job, zip(self.inputs, reader.per_input)
        values, stated = asdict(job), self.running.identity
        return {
            "format_version": MANIFEST_VERSION,
            "complete": is_complete,
            "run": identity,
            "model": str(self.model_path),
            "domain": self.domain.name,
            "inputs": [{"path": Source(name).name, "records": count} for name, count in inputs],
            "options": {
                **stated,
                # what this class of jobs declares itself, not how every job is run
                **{name: values[name] for name in type(job).__annotations__ if name in values.keys() - stated.keys()},
                "precision": job.precision,
                "device": self.device,
                "devices": job.devices,
                "threads": torch.get_num_threads(),
                "tokens_per_batch": self.running.tokens_per_batch,
                "on_error": "skip" if job.is_skipping else "refuse",
                "columns": dict(reader.options.columns),
                "id_column": job.read.id_column,
            },
            **self.running.facts,
            "parts": self.parts.count_parts(),
            "records": reader.num_records,
            "tokens": reader.num_symbols,
            "rows": self.num_rows,
            "computed": self.num_new,
            "windowed": {"records": self.num_windowed, "overlap": OVERLAP_FRAC},
            "replaced": dict(reader.replaced),
            "refused": {"count": reader.num_refused, "records": [asdict(refusal) for refusal in reader.refused]},
            "seconds": round(spent + time.monotonic() - self.began, 3),
            "versions": {"meristem": __version__, "torch": torch.__version__},
        }
