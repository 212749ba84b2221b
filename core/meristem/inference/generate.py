"""Texts that go on from prompts: a row of samples for each prompt, and one file of all."""

import copy
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from meristem.data.budget import Budget
from meristem.data.reading.open import open_source
from meristem.data.reading.reader import Reader, gather
from meristem.data.records import ReadOptions, Refusal, Source, batch_of
from meristem.domain import Domain
from meristem.errors import ConfigError, DataError
from meristem.files import replacing
from meristem.generation.options import GenerateOptions
from meristem.generation.text import Generator
from meristem.inference.encoding import Reading
from meristem.inference.engine import PRECISIONS, Advance, best_precision, unheard
from meristem.inference.job import Job, Running
from meristem.inference.memory import fitting_tokens
from meristem.inference.output import PAYLOAD, parts_of
from meristem.model.model import Model
from meristem.model_directory import ModelCard
from meristem.types import TokenColumn

GIVEN = "prompt"
"""Name of the source of prompts that are given as texts."""

SAMPLE = pa.struct(
    {
        "text": pa.string(),
        "score": pa.float64(),
        "reason": pa.string(),
        "ids": pa.list_(pa.int64()),
        "log_probabilities": pa.list_(pa.float64()),
    }
)
"""A text in the file of samples."""


class RunningGenerate(Running):
    """Goes on from the prompts of a column."""

    def __init__(self, job: "Generate", card: ModelCard, model: Model, device: str):
        if job.is_compiled:
            raise ConfigError("--compile has no effect on generate, whose steps have ever other shapes; leave it out")
        dtype, on = PRECISIONS[best_precision(job.precision, device)], torch.device(device)
        if dtype != torch.float32:
            model = copy.deepcopy(model).to(dtype)
        self.reading = Reading.of(card)
        self.generator = Generator(model.to(on).eval(), card.tokenizer_of(list(card.inputs)[-1]))
        self.budget = Budget(job.tokens_per_batch or fitting_tokens(model.config, on, dtype), on)
        self.tokens_per_batch = self.budget.tokens
        values = asdict(job.options)
        values.pop("batch_size")
        self.identity = {**values, "stop": list(job.options.stop)}
        self.facts: dict[str, Any] = {}
        self.fault = "what the model says is not finite; it is damaged"
        self._options = job.options
        [self._tokenizer] = self.reading.tokenizers.values()

    def rows(self, column: TokenColumn, advance: Advance = unheard) -> pa.Table:
        prompts, work = self._prompts(column), self.work(column)
        made: list[list[dict[str, Any]]] = [[] for _ in prompts]

        def run(numbers: np.ndarray) -> None:
            texts = self.generator.go_on([prompts[number] for number in numbers], self._options)
            for number, samples in zip(numbers, texts, strict=True):
                behind = partial(self.generator.text_behind, prompts[number])
                made[number] = [{"text": behind(one.ids), **asdict(one)} for one in samples]
            advance(len(numbers), int(work[numbers].sum()))

        num_new, count = self._options.max_new_tokens, self._options.num_sequences
        lengths = np.array([(len(ids) + num_new) * count for ids in prompts], np.int64)
        for _ in self.budget.run(lengths, run):
            pass
        return pa.table({"samples": pa.array(made, pa.list_(SAMPLE))})

    def unfit(self, column: TokenColumn) -> Mapping[int, str]:
        reasons = (self.generator.refusal(ids, self._options) for ids in self._prompts(column))
        return {row: reason for row, reason in enumerate(reasons) if reason}

    def num_values(self, column: TokenColumn) -> np.ndarray:
        return np.full(len(column), self._options.num_samples)

    def work(self, column: TokenColumn) -> np.ndarray:
        """`[N]` tokens of each prompt, and those that are made from it at most."""
        return column.payload_lengths + self._options.max_new_tokens * self._options.num_samples

    def most_symbols(self, most: int) -> int:
        return max(1, most // (self._options.max_new_tokens * self._options.num_sequences))

    def _prompts(self, column: TokenColumn) -> list[np.ndarray]:
        return [self.generator.open_ids(self._tokenizer.tokens_at(column, row)) for row in range(len(column))]


@dataclass(frozen=True, kw_only=True)
class Generate(Job):
    """Go on from prompts.

    Attributes:
        options: how texts are made; `batch_size` has no effect.
        prompts: that are read under the name `GIVEN`.
    """

    verb: ClassVar[str] = "generate"
    running: ClassVar[type[Running]] = RunningGenerate
    suffixes: ClassVar[tuple[str, ...]] = (".jsonl",)
    keeps_payloads: ClassVar[bool] = True

    options: GenerateOptions = field(default_factory=GenerateOptions)
    prompts: tuple[str, ...] = ()

    def reader(self, domain: Domain) -> Reader:
        return PromptReader(domain.reader, self.prompts)

    def finish(self, parts: Path, output: Path, manifest: dict[str, Any]) -> None:
        with replacing(output, parts) as temporary, temporary.open("w", encoding="utf-8") as file:
            rows = (row for part in parts_of(parts) for row in pq.read_table(part).to_pylist())
            for number, row in enumerate(rows):
                for index, sample in enumerate(row["samples"]):
                    facts = {"id": row["id"], "prompt": row[PAYLOAD], "prompt_number": number, "sample": index}
                    file.write(json.dumps({**facts, **sample}, ensure_ascii=False) + "\n")


@dataclass(frozen=True)
class PromptReader(Reader):
    """Reads prompts: the lines of a text file or of standard input, and other files as a domain reads its records.

    Attributes:
        other: reader of the domain.
        given: prompts that are the source `GIVEN`.
    """

    other: Reader
    given: Sequence[str] = ()

    def read(self, source: Source, options: ReadOptions) -> Iterator[pa.RecordBatch]:
        if self.given and source.path == GIVEN:
            yield from _batches(source, self.given, options)
        elif source.is_stdin or Path(source.path).suffix in ("", ".txt"):
            options.require_bare(source.name, "it is a text of one prompt a line")
            with open_source(source) as stream:
                yield from _batches(source, (line.rstrip(b"\r\n") for line in stream), options)
        else:
            yield from self.other.read(source, options)


def _batches(source: Source, lines: Iterable[str | bytes], options: ReadOptions) -> Iterator[pa.RecordBatch]:
    for held in gather(_prompts(source, lines, options), lambda row: len(row[1]), options.batch_bytes):
        numbers, prompts = zip(*held)
        payloads = {options.main: pa.array(prompts, pa.large_string())}
        yield batch_of(pa.array(map(str, numbers)), payloads, source.name, numbers)


def _prompts(source: Source, lines: Iterable[str | bytes], options: ReadOptions) -> Iterator[tuple[int, str]]:
    """The prompts, each with its number from 1."""
    number = 0
    for number, line in enumerate(lines, 1):
        try:
            prompt = line.decode() if isinstance(line, bytes) else line
        except UnicodeDecodeError as error:
            raise DataError(f"{source.name}:{number}: must be UTF-8 text") from error
        if prompt.strip():
            yield number, prompt
        else:
            options.refuse(Refusal(source.name, number, str(number), "a prompt must not be empty"))
    if not number:
        raise DataError(f"{source.name}: must hold one prompt a line; it is empty")
