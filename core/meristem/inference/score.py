"""Scores of records: a table with one row a record, or arrays by id and figures of them."""

import re
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from meristem.domain import GROUP, Domain, load_domain
from meristem.errors import ConfigError
from meristem.figures.canvas import encode_figure
from meristem.files import replacing, write_file
from meristem.inference.encoding import Reading
from meristem.inference.engine import Advance, NotFinite, unheard, views_of
from meristem.inference.formats import SUFFIXES, write_table_file
from meristem.inference.job import Job, Running, too_long
from meristem.inference.output import parts_of
from meristem.model.model import Model
from meristem.model_directory import ModelCard
from meristem.registry import find_all
from meristem.scoring.likelihood import LIKELIHOOD
from meristem.scoring.running import RunningModel
from meristem.scoring.scorer import Scorer
from meristem.types import TokenColumn

ARRAY_CHUNK_SYMBOLS = 8192
"""Payload symbols of a chunk at most where results are arrays, which are large."""

MIN_CHUNK_SYMBOLS = 512


ARRAYS = pa.schema({"shape": pa.list_(pa.int64()), "values": pa.large_list(pa.float32()), "plot": pa.large_binary()})
"""Columns of a part that holds arrays, and PNGs of them."""


def find_scorers(domain: str = "") -> dict[str, Scorer]:
    """The scorers that can be asked for by name: the likelihood, and those of a domain.

    Args:
        domain: whose scorers; empty for those of all installed domains.

    Raises:
        ConfigError: no such domain, or two domains give one name to different scorers.
    """
    found, owners = {"likelihood": LIKELIHOOD}, {"likelihood": "meristem"}
    domains: Mapping[str, Domain] = {domain: load_domain(domain)} if domain else find_all(GROUP)
    for owner, one in domains.items():
        for name, scorer in one.scorers.items():
            if found.setdefault(name, scorer) is not scorer:
                raise ConfigError(
                    f"scorer {name!r} is offered by {owners[name]} and by {owner}; say which domain with --domain"
                )
            owners.setdefault(name, owner)
    return found


class RunningScore(Running):
    """Scores token columns."""

    def __init__(self, job: "Score", card: ModelCard, model: Model, device: str):
        self.scorer = job.find()
        self.is_reused = self.scorer.schema is not None
        if job.plots and self.scorer.draw is None:
            raise ConfigError(f"--plots has no effect on the scorer {job.scorer}, which draws nothing; leave it out")
        self._options = self.scorer.options() if job.scorer_options is None else job.scorer_options
        self._has_plots = bool(job.plots)
        trunk = job.trunk(model, device)
        self.tokens_per_batch, self._max_tokens = trunk.tokens_per_batch, model.config.max_length
        is_two_sided = self.scorer.reads_two_sides and bool(model.config.num_decoder_layers)
        self.reading = Reading.of_sides(card) if is_two_sided else Reading.of(card)
        *_, tokenizer = self.reading.tokenizers.values()
        self.model = RunningModel(trunk.runnable, tokenizer, trunk.budget)
        self.identity = {"scorer": job.scorer, **asdict(self._options), "plots": self._has_plots}
        self.facts = {"summary": self.scorer.describe(self.model, self._options)}
        self.fault = "its score is not finite; the model is damaged"

    def results(self, column: TokenColumn, advance: Advance = unheard) -> Iterator[Any]:
        """What the scorer gives for each sequence, in order.

        Raises:
            NotFinite: names the first sequence whose score is not finite.
        """
        model = replace(self.model, advance=lambda tokens: advance(0, tokens))
        of_views = [self.scorer.score(model, view, self._options) for view in views_of(column)]
        for row, results in enumerate(zip(*of_views, strict=True)):
            result = _mean_of(results)
            if not _is_finite(result):
                raise NotFinite(row)
            yield result
            advance(1, 0)

    def rows(self, column: TokenColumn, advance: Advance = unheard) -> pa.Table:
        results = enumerate(self.results(column, advance))
        if self.scorer.schema is not None:
            schema = self.scorer.schema(self.model, self._options)
            return pa.Table.from_pylist([result for _, result in results], schema)
        found = []
        for row, values in results:
            plot = b""
            if self._has_plots and self.scorer.draw is not None:
                plot = encode_figure(self.scorer.draw(values, self.model, column.take(np.array([row]))))
            found.append({"shape": list(values.shape), "values": values.astype(np.float32).ravel(), "plot": plot})
        return pa.Table.from_pylist(found, ARRAYS)

    def unfit(self, column: TokenColumn) -> Mapping[int, str]:
        return too_long(column, self._max_tokens)

    def work(self, column: TokenColumn) -> np.ndarray:
        return np.sum([self.scorer.work(self.model, view, self._options) for view in views_of(column)], axis=0)

    def most_symbols(self, most: int) -> int:
        most = most // max(1, self.scorer.num_runs(self.model, self._options))
        return max(MIN_CHUNK_SYMBOLS, most if self.scorer.schema is not None else min(most, ARRAY_CHUNK_SYMBOLS))


@dataclass(frozen=True, kw_only=True)
class Score(Job):
    """Score records; the manifest says in `summary` what the values are.

    Attributes:
        scorer_options: a value of its `options`; None for its defaults.
        domain: reads the inputs and has the scorer; empty for the model's own, and a scorer of any installed one.
        plots: folder for a PNG of each array; empty for none.
    """

    verb: ClassVar[str] = "score"
    running: ClassVar[type[Running]] = RunningScore

    scorer: str = "likelihood"
    scorer_options: Any = None
    domain: str = ""
    plots: str = ""

    def find(self) -> Scorer:
        """The scorer of that name.

        Raises:
            ConfigError: there is none.
        """
        if self.scorer == "likelihood":  # no domain is imported for it
            return LIKELIHOOD
        scorers = find_scorers(self.domain)
        if self.scorer not in scorers:
            raise ConfigError(f"--scorer must be one of {', '.join(scorers)}; got {self.scorer!r}")
        return scorers[self.scorer]

    @property
    def suffixes(self) -> tuple[str, ...]:  # type: ignore[override]
        return (".npz",) if self.find().schema is None else SUFFIXES

    def finish(self, parts: Path, output: Path, manifest: dict[str, Any]) -> None:
        if output.suffix != ".npz":
            write_table_file(parts, output)
            return
        # numpy's format, each array by the id of its record
        with replacing(output, parts) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as file:
            for number, (name, row) in enumerate(_named_rows(parts), start=1):
                with file.open(f"{name}.npy", "w", force_zip64=True) as stream:
                    np.lib.format.write_array(stream, row["values"].values.to_numpy().reshape(row["shape"].as_py()))
                if self.plots:
                    safe = re.sub(r"[^A-Za-z0-9._-]+", "_", name)[:80]
                    write_file(Path(self.plots) / f"{number:05}_{safe}.png", row["plot"].as_py())


def _mean_of(results: Sequence[Any]) -> Any:
    """The mean of what is said of the views of a record: of arrays, or of the numbers of a row that are no counts."""
    if len(results) == 1:
        return results[0]
    if isinstance(results[0], np.ndarray):
        return np.mean(results, axis=0)
    first = results[0]
    return {
        name: float(np.mean([one[name] for one in results])) if isinstance(value, float) else value
        for name, value in first.items()
    }


def _is_finite(result: Any) -> bool:
    """Whether no value of a row is nan or infinite; nan may stand in an array where there is nothing to score, but not
    everywhere in a slice of it."""
    if isinstance(result, np.ndarray):
        return bool(np.isfinite(result).any(axis=tuple(range(1, result.ndim))).all())
    return all(np.isfinite(value) for value in result.values() if isinstance(value, float))


def _named_rows(parts: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of all parts as Arrow scalars, each with a name of its own: its id, or the id and `#2`, `#3` ..."""
    names: set[str] = set()
    seen: Counter[str] = Counter()
    for part in parts_of(parts):
        table = pq.read_table(part)
        for row in range(len(table)):
            name = id = table["id"][row].as_py()
            while name in names:
                seen[id] += 1
                name = f"{id}#{seen[id] + 1}"
            names.add(name)
            yield name, {column: table[column][row] for column in ARRAYS.names}
