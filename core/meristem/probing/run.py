"""Probe files: read and split the records, embed them, fit, evaluate on the test records, and write the results."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from meristem.data.records import ReadOptions, Refusal, Source
from meristem.data.split import require_whole_groups
from meristem.data.store import RecordStore, default_cache_dir
from meristem.domain import Domain, domain_of_model
from meristem.errors import ConfigError, DataError
from meristem.figures.predictions import draw_confusion, draw_values
from meristem.files import replacing, write_json
from meristem.inference.engine import best_device
from meristem.model_directory import find_model, hash_weights, is_own, load_any, load_card
from meristem.probing.fit import Fit, Unwatched, Watch
from meristem.probing.measures import class_figures, confusion_matrix, top_k_accuracy, value_figures
from meristem.probing.options import METHODS, ProbeOptions
from meristem.probing.records import deal, find_classes, find_numbers, read_labels, task_of
from meristem.probing.vectors import stored_vectors

METRICS, PREDICTIONS, CONFUSION, VALUES = "metrics.json", "predictions.csv", "confusion.png", "values.png"


def probe_files(
    model: Path | str,
    inputs: Sequence[str],
    output: Path | str | None,
    options: ProbeOptions,
    tests: Sequence[str] = (),
    watch: Watch | None = None,
    vectors_dir: Path | None = None,
) -> dict[str, Any]:
    """Fit probes to the vectors of training records and evaluate them on test records.

    Args:
        model: a run directory, a model directory or a foreign one.
        inputs: files of labelled records.
        output: folder of `metrics.json`, `predictions.csv` and a figure; None to write nothing.
        tests: files of test records; then all of `inputs` is for training.
        watch: receives the progress; None to ignore it.
        vectors_dir: folder in which vectors are kept for the next call; None for `vectors` in the cache.

    Returns:
        The content of `metrics.json`.

    Raises:
        ConfigError: options that do not fit each other, the model or the records.
        DataError: an input that cannot be used, labels of one class, or a part without a labelled record.
        CheckpointError: a model that cannot be read.
    """
    output, model, watch = Path(output) if output else None, Path(model), watch or Unwatched()
    if output:
        _check_output(output)
    place = find_model(model)
    domain = domain_of_model(options.embed.domain, (load_card(place) if is_own(place) else load_any(place)[0]).domain)
    vectors_dir = vectors_dir or (options.cache_dir or default_cache_dir()) / "vectors"

    # labels and split are looked at before the hours of embedding
    main, test, train, validation, test_rows = _dealt(inputs, tests, domain, options)
    _check_task(main, np.concatenate([train, validation]), test, test_rows, options)

    facts = _embed(main, model, options, vectors_dir, "embed", watch)
    if tests:
        _embed(test, model, options, vectors_dir, "embed test", watch)
    train, validation, test_rows = main.embedded(train), main.embedded(validation), test.embedded(test_rows)
    if not len(test_rows) or not len(train):
        raise DataError("no record is left, since the model's tokenizer refused the others")
    rows = np.concatenate([train, validation])
    task = _check_task(main, rows, test, test_rows, options)

    split = "files" if tests else f"column {options.split_column}" if options.split_column else options.split
    metrics: dict[str, Any] = {
        "label": options.label,
        "task": task,
        "records": _count_records(main, train, validation, test, test_rows),
        "model": {"path": str(model), "hash": hash_weights(model)},
        "vectors": facts | {"width": int(main.vectors.shape[1])},
        "split": {"by": split, "seed": options.seed},
    }
    is_validation = np.arange(len(rows)) >= len(train)
    vectors, test_vectors = main.vectors[main.places[rows]], test.vectors[test.places[test_rows]]
    fit = Fit(options, best_device(), watch, vectors, is_validation, test_vectors)
    metrics |= _evaluate(fit, task, main.labels[rows].tolist(), test, test_rows, output)
    if output:
        write_json(output / METRICS, metrics)
    return metrics


def _evaluate(
    fit: Fit, task: str, labels: list[str], test: "_Records", test_rows: np.ndarray, output: Path | None
) -> dict[str, Any]:
    """Fit the probes and return their figures; writes predictions and a figure into `output`."""
    if output:
        output.mkdir(parents=True, exist_ok=True)
    evaluate = _evaluate_classes if task == "classification" else _evaluate_values
    figures, columns = evaluate(fit, labels, test.labels[test_rows].tolist(), output)
    if output:
        ids = test.store.column("id").take(test_rows).to_pylist()
        _write_csv(output / PREDICTIONS, {"id": ids} | columns)
    return figures


def _check_output(output: Path) -> None:
    """Refuse a place for results that is a file or holds anything but an earlier probe."""
    if output.exists() and not output.is_dir():
        raise ConfigError(f"--output must be a folder; {output} is a file")
    if output.is_dir() and any(output.iterdir()) and not (output / METRICS).exists():
        raise ConfigError(f"--output {output} must be new, empty or of an earlier probe; it holds something else")


def _count_records(
    main: "_Records", train: np.ndarray, validation: np.ndarray, test: "_Records", test_rows: np.ndarray
) -> dict[str, int]:
    """Numbers of records by what became of them; `test` is `main` where the test records are among its own."""
    read = [main] if test is main else [main, test]
    seen = main.store.payload_hashes(0)[np.concatenate([train, validation])]
    return {
        "train": len(train),
        "validation": len(validation),
        "test": len(test_rows),
        "without_label": sum(int((~one.has_label).sum()) for one in read),
        "refused": sum(one.num_refused for one in read),
        "test_seen_in_training": int(np.isin(test.store.payload_hashes(0)[test_rows], seen).sum()),
    }


def figure_names(inputs: Sequence[str], options: ProbeOptions, domain: Domain, tests: Sequence[str] = ()) -> list[str]:
    """Names (`knn/accuracy`) of the figures that `probe_files` will find of a model, once the records are checked.

    Raises:
        ConfigError, DataError: as `probe_files`, but for what only the model can tell.
    """
    main, test, train, validation, test_rows = _dealt(inputs, tests, domain, options)
    rows = np.concatenate([train, validation])
    if _check_task(main, rows, test, test_rows, options) == "classification":
        num_classes = len(set(main.labels[rows]))
        names = [*class_figures(np.eye(2)), *(["top5_accuracy"] if num_classes > 5 else [])]
    else:
        names = [*value_figures(np.arange(2), np.arange(2))]
    return [f"{method}/{name}" for method in METHODS[options.method] for name in names]


@dataclass
class _Records:
    """The records of some files, and their vectors once they are embedded.

    Attributes:
        read: how the files were read.
        labels: `[N]` words, None where one is missing.
        num_refused: records that the reader or the tokenizer refused.
        vectors: `[M, D]`.
        places: `[N]` row of `vectors` that belongs to each record; -1 where the tokenizer refused it.
    """

    sources: Sequence[str]
    read: ReadOptions
    store: RecordStore
    labels: np.ndarray
    num_refused: int
    vectors: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))
    places: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))

    @property
    def has_label(self) -> np.ndarray:
        return np.array([label is not None for label in self.labels], bool)

    def embedded(self, rows: np.ndarray) -> np.ndarray:
        """Those of `rows` that have a vector: the tokenizer may have refused some."""
        return rows[self.places[rows] >= 0]


def _dealt(
    inputs: Sequence[str], tests: Sequence[str], domain: Domain, options: ProbeOptions
) -> tuple[_Records, _Records, np.ndarray, np.ndarray, np.ndarray]:
    """Records of the inputs and of the test (which may be the same), and rows for training, validation and test."""
    if tests and (options.split != "hash" or options.test_frac is not None):
        raise ConfigError("split and test_frac have no effect with files for the test; leave them out")
    cache_dir = options.cache_dir or default_cache_dir()
    main = _read(inputs, options.split_column, domain, options, cache_dir)
    test = _read(tests, "", domain, options, cache_dir) if tests else main
    if tests:
        stores = (("training", main.store), ("test", test.store))
        require_whole_groups([(name, store, np.arange(len(store))) for name, store in stores])
    train, validation, test_rows = deal(main.store, domain, main.has_label, options, has_test_files=bool(tests))
    return main, test, train, validation, np.flatnonzero(test.has_label) if tests else test_rows


def _read(
    sources: Sequence[str], split_column: str, domain: Domain, options: ProbeOptions, cache_dir: Path
) -> _Records:
    refused: list[Refusal] = []
    read = replace(
        options.embed.read,
        label_columns=(options.label,),
        split_column=split_column,
        group_column=options.group_column,
    )
    reporting = replace(read, on_error=refused.append) if options.embed.is_skipping else read
    store = RecordStore.build(
        domain.reader, [Source(name) for name in sources], reporting, name=domain.name, cache_dir=cache_dir
    )
    labels = np.array(read_labels(store, options.label, options.missing_labels), object)
    records = _Records(sources, read, store, labels, len(refused))
    if not records.has_label.any():
        raise DataError(f"{', '.join(sources)}: no record has a label {options.label!r}")
    return records


def _embed(
    records: _Records, model: Path, options: ProbeOptions, vectors_dir: Path, title: str, watch: Watch
) -> dict[str, Any]:
    """Give records their vectors; returns how these were made."""
    # the same records as the store's: a label that cannot be read is refused here as well
    embed, store = replace(options.embed, read=records.read), records.store
    rows, records.vectors, manifest = stored_vectors(store, model, records.sources, embed, vectors_dir, title, watch)
    records.places = np.full(len(store), -1, np.int64)
    records.places[rows] = np.arange(len(rows))
    records.num_refused += len(store) - len(rows)
    return {name: manifest["options"][name] for name in ("pool", "layer", "precision", "device")}


def _check_task(
    main: _Records, fit_rows: np.ndarray, test: _Records, test_rows: np.ndarray, options: ProbeOptions
) -> str:
    """Classification or regression; labels that cannot be probed are refused."""
    name, fit, true = options.label, main.labels[fit_rows].tolist(), test.labels[test_rows].tolist()
    task = task_of([*fit, *true], options.task, name)
    if task == "classification":
        find_classes(fit, true, name)
    else:
        numbers = find_numbers(fit, name, lambda place: main.store.where(int(fit_rows[place])))
        find_numbers(true, name, lambda place: test.store.where(int(test_rows[place])))
        if len(set(numbers)) < 2:
            raise DataError(f"label {name!r} must have two values or more for training; got {fit[:1]}")
    if options.k is not None and options.k > len(fit):
        raise ConfigError(f"k must be at most the records for training, {len(fit)}; got {options.k}")
    return task


def _evaluate_classes(
    fit: Fit, labels: list[str], true_labels: list[str], output: Path | None
) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """Figures of each method, and the columns of its predictions; the confusion of classes is drawn."""
    names, num_known = find_classes(labels, true_labels, fit.options.label)
    code = {name: number for number, name in enumerate(names)}
    codes, true = (np.array([code[label] for label in some], np.int64) for some in (labels, true_labels))
    most = int(np.argmax(np.bincount(codes)))
    counts_true = np.bincount(true, minlength=len(names))
    metrics: dict[str, Any] = {
        "classes": list(names[:num_known]),
        "unknown_classes": dict(zip(names[num_known:], counts_true[num_known:].tolist())),
        "most_frequent_class": {"class": names[most], "accuracy": float((true == most).mean())},
    }
    columns: dict[str, list[Any]] = {"label": true_labels}
    confusions = {}
    for method in METHODS[fit.options.method]:
        scores, facts = fit.class_scores(method, codes, num_known)
        predicted = scores.argmax(1)
        counts = confusion_matrix(true, predicted, len(names))
        figures = class_figures(counts)
        if num_known > 5:
            figures["top5_accuracy"] = top_k_accuracy(scores, true, 5)
        metrics[method] = figures | facts
        confusions[f"{method}: {figures['accuracy']:.1%} right"] = counts
        columns[method] = [names[code] for code in predicted]
        columns[f"{method}_probability"] = scores.max(1).tolist()
    if output:
        draw_confusion(output / CONFUSION, confusions, names)
        (output / VALUES).unlink(missing_ok=True)
    return metrics, columns


def _evaluate_values(
    fit: Fit, labels: list[str], true_labels: list[str], output: Path | None
) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """Figures of each method, and the columns of its predictions; predictions are drawn against true values."""
    values, true = (np.array([float(label) for label in some]) for some in (labels, true_labels))
    metrics: dict[str, Any] = {}
    predictions = {}
    for method in METHODS[fit.options.method]:
        predictions[method], facts = fit.values(method, values)
        metrics[method] = value_figures(true, predictions[method]) | facts
    if output:
        draw_values(output / VALUES, true, predictions, fit.options.label)
        (output / CONFUSION).unlink(missing_ok=True)
    return metrics, {"label": true.tolist()} | {name: some.tolist() for name, some in predictions.items()}


def _write_csv(path: Path, columns: dict[str, list[Any]]) -> None:
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(columns)
        for row in zip(*columns.values()):
            writer.writerow(f"{value:.6g}" if isinstance(value, float) else value for value in row)
