"""Probe files: read and deal the records, embed them, fit, measure on the test, write what came of it."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from meristem.data.records import ReadOptions, Refusal, Source
from meristem.data.split import require_whole_groups
from meristem.data.store import RecordStore, default_cache_dir
from meristem.domain import domain_of_model
from meristem.errors import ConfigError, DataError
from meristem.figures.predictions import draw_confusion, draw_values
from meristem.files import replacing, write_json
from meristem.inference.engine import best_device
from meristem.model_directory import find_model, hash_weights, is_own, load_any, load_card
from meristem.probing.fit import Fit, Unwatched, Watch
from meristem.probing.labels import Classes, find_classes, find_numbers, read_labels, task_of
from meristem.probing.measures import class_figures, confusion_matrix, top_k_accuracy, value_figures
from meristem.probing.options import METHODS, ProbeOptions
from meristem.probing.parts import Parts, count_shared, deal
from meristem.probing.vectors import stored_vectors

METRICS, PREDICTIONS, CONFUSION, VALUES = "metrics.json", "predictions.csv", "confusion.png", "values.png"
DEFAULT_TEST_FRAC = 0.2


def probe_files(
    model: Path | str,
    inputs: Sequence[str],
    output: Path | str,
    options: ProbeOptions,
    tests: Sequence[str] = (),
    watch: Watch | None = None,
) -> dict[str, Any]:
    """Fit probes to the vectors of training records and measure them on the test's.

    Args:
        model: a run directory, a model directory or a foreign one.
        inputs: files of labelled records.
        output: folder of `metrics.json`, `predictions.csv` and a figure.
        tests: files of the test; then all of `inputs` is for training.

    Returns:
        What `metrics.json` says.

    Raises:
        ConfigError: options that cannot work.
        DataError: an input that cannot be used, labels of one class, or a part without a labelled record.
        CheckpointError: a model that cannot be read.
    """
    output = Path(output)
    if output.exists() and not output.is_dir():
        raise ConfigError(f"--output must be a folder; {output} is a file")
    if output.is_dir() and any(output.iterdir()) and not (output / METRICS).exists():
        raise ConfigError(f"--output {output} must be new, empty or of an earlier probe; it holds something else")
    if tests and (options.split != "hash" or options.test_frac is not None):
        raise ConfigError("split and test_frac have no effect with files for the test; leave them out")
    return _Probe(Path(model), list(inputs), output, options, list(tests), watch or Unwatched()).go()


@dataclass(frozen=True)
class _Set:
    """Records of some files and their vectors.

    Attributes:
        has_vector: `[N]` all but those that the tokenizer refused.
        place: `[N]` row of `vectors` that each record has.
    """

    store: RecordStore
    labels: list[str | None]
    has_vector: np.ndarray
    place: np.ndarray
    vectors: np.ndarray
    num_refused: int

    @property
    def has_label(self) -> np.ndarray:
        return np.array([label is not None for label in self.labels])

    def labels_of(self, rows: np.ndarray) -> list[str]:
        return [str(self.labels[row]) for row in rows]

    def vectors_of(self, rows: np.ndarray) -> np.ndarray:
        return self.vectors[self.place[rows]]


class _Probe:
    def __init__(
        self, model: Path, inputs: list[str], output: Path, options: ProbeOptions, tests: list[str], watch: Watch
    ):
        self.model_path, self.inputs, self.output = model, inputs, output
        self.options, self.tests, self.watch = options, tests, watch
        self.device = best_device()
        self.cache_dir = options.cache_dir or default_cache_dir()

    def go(self) -> dict[str, Any]:
        options = self.options
        self.domain = domain_of_model(options.embed.domain, self._domain_of_model())
        main_store, main_refused = self._read(self.inputs, options.split_column)
        test_store, test_refused = self._read(self.tests, "") if self.tests else (main_store, [])
        if self.tests:
            stores = (("training", main_store), ("test", test_store))
            require_whole_groups([(name, store, np.arange(len(store))) for name, store in stores])
        # labels and split are looked at before the hours of embedding
        labels = read_labels(main_store, options.label, options.missing_labels)
        test_labels = read_labels(test_store, options.label, options.missing_labels) if self.tests else labels
        parts = self._deal(main_store, labels)
        test_rows = _labelled(test_labels) if self.tests else parts.test
        if not len(test_rows):
            raise DataError(f"{', '.join(self.tests)}: no record has a label {options.label!r}")
        self._task(main_store, labels, parts, test_store, test_labels, test_rows)
        main = self._embed(main_store, labels, self.inputs, main_refused, "embed")
        test = self._embed(test_store, test_labels, self.tests, test_refused, "embed test") if self.tests else main
        keep = lambda part, rows: rows[part.has_vector[rows]]  # noqa: E731
        train, validation = keep(main, parts.train), keep(main, parts.validation)
        test_rows = keep(test, test_rows)
        rows = np.concatenate([train, validation])
        is_validation = np.arange(len(rows)) >= len(train)
        fit_labels, true_labels = main.labels_of(rows), test.labels_of(test_rows)
        if not len(test_rows) or not len(train):
            raise DataError("no record is left, since the model's tokenizer refused the others")
        kept = Parts(train, validation, parts.test)
        task = self._task(main_store, labels, kept, test_store, test_labels, test_rows)
        sets = [main, test] if self.tests else [main]
        metrics: dict[str, Any] = {
            "label": options.label,
            "task": task,
            "records": {
                "train": len(train),
                "validation": len(validation),
                "test": len(test_rows),
                "without_label": sum(int((~one.has_label).sum()) for one in sets),
                "refused": sum(one.num_refused for one in sets),
                "test_seen_in_training": count_shared(main.store, rows, test.store, test_rows),
            },
            "model": {"path": str(self.model_path), "hash": hash_weights(self.model_path)},
            "vectors": self.facts | {"width": int(main.vectors.shape[1])},
            "split": self._split_facts(),
        }
        fit = Fit(options, self.device, self.watch, main.vectors_of(rows), is_validation, test.vectors_of(test_rows))
        columns: dict[str, list[Any]] = {"id": test.store.column("id").take(test_rows).to_pylist()}
        self.output.mkdir(parents=True, exist_ok=True)
        if task == "classification":
            classes = find_classes(fit_labels, true_labels, options.label)
            self._classes(fit, classes, classes.codes(fit_labels), classes.codes(true_labels), metrics, columns)
        else:
            self._values(fit, _numbers(fit_labels), _numbers(true_labels), metrics, columns)
        _write_csv(self.output / PREDICTIONS, columns)
        write_json(self.output / METRICS, metrics)
        return metrics

    def _domain_of_model(self) -> str:
        place = find_model(self.model_path)
        return (load_card(place) if is_own(place) else load_any(place)[0]).domain

    def _read(self, sources: list[str], split_column: str) -> tuple[RecordStore, list[Refusal]]:
        refused: list[Refusal] = []
        store = RecordStore.build(
            self.domain.reader,
            [Source(name) for name in sources],
            self._read_options(split_column, refused),
            name=self.domain.name,
            cache_dir=self.cache_dir,
        )
        return store, refused

    def _read_options(self, split_column: str, refused: list[Refusal] | None = None) -> ReadOptions:
        options = self.options
        return replace(
            options.embed.read,
            label_columns=(options.label,),
            split_column=split_column,
            group_column=options.group_column,
            on_error=refused.append if options.embed.is_skipping and refused is not None else None,
        )

    def _deal(self, store: RecordStore, labels: list[str | None]) -> Parts:
        options = self.options
        has_label = np.array([label is not None for label in labels])
        if not has_label.any():
            raise DataError(f"{', '.join(self.inputs)}: no record has a label {options.label!r}")
        test_frac = 0.0 if self.tests else DEFAULT_TEST_FRAC if options.test_frac is None else options.test_frac
        frac, seed, by_column = options.validation_frac, options.seed, bool(options.split_column)
        return deal(store, self.domain, has_label, options.split, by_column, test_frac, frac, seed)

    def _task(
        self,
        store: RecordStore,
        labels: list[str | None],
        parts: Parts,
        test_store: RecordStore,
        test_labels: list[str | None],
        test_rows: np.ndarray,
    ) -> str:
        """Classification or regression; labels that cannot be probed are refused."""
        fit_rows = [*parts.train, *parts.validation]
        fit, true = [str(labels[row]) for row in fit_rows], [str(test_labels[row]) for row in test_rows]
        task = task_of([*fit, *true], self.options.task, self.options.label)
        if task == "classification":
            find_classes(fit, true, self.options.label)
        else:
            numbers = find_numbers(fit, self.options.label, lambda place: store.where(int(fit_rows[place])))
            find_numbers(true, self.options.label, lambda place: test_store.where(int(test_rows[place])))
        if task == "regression" and len(set(numbers)) < 2:
            raise DataError(f"label {self.options.label!r} must have two values or more for training; got {fit[:1]}")
        if self.options.k is not None and self.options.k > len(fit):
            raise ConfigError(f"k must be at most the records for training, {len(fit)}; got {self.options.k}")
        return task

    def _embed(
        self, store: RecordStore, labels: list[str | None], sources: list[str], refused: list[Refusal], title: str
    ) -> _Set:
        # the same records as the store's: a label that cannot be read is refused here as well
        read = self._read_options("" if sources is self.tests else self.options.split_column)
        embed = replace(self.options.embed, read=read)
        rows, vectors, manifest = stored_vectors(
            store, self.model_path, sources, embed, self.cache_dir / "vectors", title, self.watch
        )
        self.facts = {name: manifest["options"][name] for name in ("pool", "layer", "precision", "device")}
        place = np.full(len(store), -1, np.int64)
        place[rows] = np.arange(len(rows))
        return _Set(store, labels, place >= 0, place, vectors, len(refused) + len(store) - len(rows))

    def _split_facts(self) -> dict[str, Any]:
        options = self.options
        if self.tests:
            by = "files"
        else:
            by = f"column {options.split_column}" if options.split_column else options.split
        return {"by": by, "seed": options.seed}

    def _classes(
        self,
        fit: Fit,
        classes: Classes,
        codes: np.ndarray,
        true: np.ndarray,
        metrics: dict[str, Any],
        columns: dict[str, list[Any]],
    ) -> None:
        columns["label"] = [classes.names[code] for code in true]
        most = int(np.argmax(np.bincount(codes)))
        metrics |= {
            "classes": list(classes.names[: classes.num_known]),
            "unknown_classes": classes.unknown(true),
            "most_frequent_class": {"class": classes.names[most], "accuracy": float((true == most).mean())},
        }
        confusions = {}
        for method in METHODS[self.options.method]:
            scores, facts = fit.class_scores(method, codes, classes.num_known)
            predicted = scores.argmax(1)
            counts = confusion_matrix(true, predicted, len(classes.names))
            figures = class_figures(counts)
            if classes.num_known > 5:
                figures["top5_accuracy"] = top_k_accuracy(scores, true, 5)
            metrics[method] = figures | facts
            confusions[f"{method}: {figures['accuracy']:.1%} right"] = counts
            columns[method] = [classes.names[code] for code in predicted]
            columns[f"{method}_probability"] = scores.max(1).tolist()
        draw_confusion(self.output / CONFUSION, confusions, classes.names)
        (self.output / VALUES).unlink(missing_ok=True)

    def _values(
        self,
        fit: Fit,
        values: np.ndarray,
        true: np.ndarray,
        metrics: dict[str, Any],
        columns: dict[str, list[Any]],
    ) -> None:
        columns["label"] = true.tolist()
        predictions = {}
        for method in METHODS[self.options.method]:
            predicted, facts = fit.values(method, values)
            metrics[method] = value_figures(true, predicted) | facts
            columns[method] = predicted.tolist()
            predictions[method] = predicted
        draw_values(self.output / VALUES, true, predictions, self.options.label)
        (self.output / CONFUSION).unlink(missing_ok=True)


def _labelled(labels: list[str | None]) -> np.ndarray:
    return np.flatnonzero([label is not None for label in labels])


def _numbers(labels: list[str]) -> np.ndarray:
    return np.array([float(label) for label in labels])


def _write_csv(path: Path, columns: dict[str, list[Any]]) -> None:
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(
            [f"{value:.6g}" if isinstance(value, float) else value for value in row] for row in zip(*columns.values())
        )
