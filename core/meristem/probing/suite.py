"""Probes as a suite: what `meristem probe` measures of a model, at each validation of a run."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from meristem.data.records import ReadOptions
from meristem.domain import load_domain
from meristem.inference.embed import Embed
from meristem.probing.options import METHODS, ProbeOptions
from meristem.probing.run import figure_names, probe_files
from meristem.train.spec import DataSpec
from meristem.train.suite import Suite
from meristem.types import INPUT


@dataclass(frozen=True, kw_only=True)
class Probe(Suite):
    """How well a label is predicted from the vectors of the model. Options mean what they do for `meristem probe`.

    Attributes:
        label: the column that is predicted.
        sources: files or folders of labelled records.
        test_sources: files of test records; then all of `sources` is for training.
        name: begins the names of the figures.
        method: linear, knn or both.
        task: classification, regression, or auto: regression where the labels are numbers and one has a fraction.
        k: number of neighbours that vote; null for 20, or all training records where there are fewer.
        temperature: softmax temperature of the neighbours' votes.
        column: column of a table that holds the payload, or a mapping of inputs to columns; empty for the usual one.
        id_column: column of a table that holds the ids; empty for id, entry, accession or mutant.
        missing_labels: words that mean "no label"; an empty cell always does.
        pool: mean, cls, max or own; null for the model's own, and mean where it has none.
        split: hash or similarity, by which records are split where neither a column nor test files do.
        split_column: column that says train, validation or test.
        group_column: column of a value whose records stay in one part of the split.
        test_frac: share of the records for the test, where neither a column nor files give it; null for 0.2.
        validation_frac: share of the training records by which the penalty of the linear probe is chosen.
        seed: random seed of the split.
    """

    label: str
    sources: list[str] | str
    test_sources: list[str] | str | None = None
    name: str = "probe"
    method: Literal["linear", "knn", "both"] = "knn"
    task: Literal["auto", "classification", "regression"] = "auto"
    k: int | None = None
    temperature: float = 0.07
    column: str | dict[str, str] = ""
    id_column: str = ""
    missing_labels: list[str] | None = None
    pool: str | None = None
    split: Literal["hash", "similarity"] = "hash"
    split_column: str = ""
    group_column: str = ""
    test_frac: float | None = None
    validation_frac: float = 0.1
    seed: int = 0

    def read(self, data: DataSpec) -> list[str]:
        sources, tests = _listed(self.sources), _listed(self.test_sources)
        return figure_names(sources, self._options(data), load_domain(data.domain), tests)

    def run(self, model: Path, data: DataSpec) -> Mapping[str, float | None]:
        with TemporaryDirectory() as folder:  # each validation has vectors of its own; none is needed twice
            sources, tests = _listed(self.sources), _listed(self.test_sources)
            metrics = probe_files(model, sources, None, self._options(data), tests, vectors_dir=Path(folder))
        methods = METHODS[self.method]
        return {f"{method}/{figure}": value for method in methods for figure, value in metrics[method].items()}

    def _options(self, data: DataSpec) -> ProbeOptions:
        columns = self.column if isinstance(self.column, dict) else {INPUT: self.column}
        read = ReadOptions(columns=columns, id_column=self.id_column)
        alike = {one.name: getattr(self, one.name) for one in fields(ProbeOptions) if hasattr(self, one.name)}
        return ProbeOptions(
            **alike | {"missing_labels": tuple(self.missing_labels or ())},
            embed=Embed(domain=data.domain, pool=self.pool, read=read),
            cache_dir=Path(data.cache_dir) if data.cache_dir else None,
        )


def _listed(said: list[str] | str | None) -> list[str]:
    return [said] if isinstance(said, str) else said or []
