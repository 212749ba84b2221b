"""`meristem probe MODEL DATA... --label COLUMN --output DIR`: what frozen vectors tell about a label."""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from meristem.cli.embed import add_vector_arguments
from meristem.cli.jobs import ProgressReport, add_engine_arguments, job_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a run directory, a model directory or a foreign directory")
    parser.add_argument("inputs", metavar="DATA", nargs="+", help="files of records with labels")
    parser.add_argument(
        "--test", metavar="DATA", nargs="+", default=[], help="files of test records; DATA is then for training alone"
    )
    parser.add_argument("--label", required=True, metavar="COLUMN", help="column of the label: classes or numbers")
    parser.add_argument("--output", required=True, help="folder of metrics.json, predictions.csv and a figure")
    parser.add_argument(
        "--method",
        default="both",
        choices=["linear", "knn", "both"],
        help="a linear map (logistic or ridge regression), votes of the nearest neighbours by cosine, or both",
    )
    parser.add_argument(
        "--task",
        default="auto",
        choices=["auto", "classification", "regression"],
        help="auto: regression where labels are numbers and one has a fraction",
    )
    parser.add_argument(
        "--missing-label",
        action="append",
        default=[],
        metavar="WORD",
        help="a word that means that a record has no label, such as NA; an empty cell always does (may be repeated)",
    )
    parser.add_argument("--k", type=int, help="neighbours that vote; 20 by default, or all where there are fewer")
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.07,
        help="a neighbour's vote has the weight exp(cosine / temperature); 0.07 by default",
    )
    add_vector_arguments(parser, ["mean", "cls", "max", "own"])
    parser.add_argument(
        "--split",
        default="hash",
        choices=["hash", "similarity"],
        help="how records are dealt: by hash, equal payloads together; or by similarity, similar ones together",
    )
    parser.add_argument(
        "--group-column", default="", metavar="COLUMN", help="column of what must stay on one side of the split"
    )
    parser.add_argument(
        "--split-column", default="", metavar="COLUMN", help="column that says train, validation or test"
    )
    parser.add_argument("--test-frac", type=float, help="share of the records for the test; 0.2 by default")
    parser.add_argument(
        "--validation-frac",
        type=float,
        default=0.1,
        help="share of the training records that the penalty of the linear map is chosen by; 0.1 by default",
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed of the split")
    add_engine_arguments(parser)
    parser.add_argument("--cache", metavar="DIR", help="folder in which vectors are kept for the next call")


def run(args: argparse.Namespace) -> int:
    from dataclasses import fields
    from pathlib import Path

    from meristem.inference.embed import Embed
    from meristem.probing.options import ProbeOptions
    from meristem.probing.run import probe_files

    options = ProbeOptions(
        missing_labels=tuple(args.missing_label),
        embed=job_of(Embed, args),
        cache_dir=Path(args.cache) if args.cache else None,
        **{one.name: getattr(args, one.name) for one in fields(ProbeOptions) if one.name in args},
    )
    metrics = probe_files(args.model, args.inputs, args.output, options, args.test, _Shown())
    _print_summary(metrics)
    print(f"metrics.json, predictions.csv and a figure in {args.output}")
    return 0


def _print_summary(metrics: dict[str, Any]) -> None:
    """Figures, and what of the records was left out: nothing happens in silence."""
    records, is_classes = metrics["records"], metrics["task"] == "classification"
    what = f"{len(metrics['classes'])} classes" if is_classes else "values"
    print(
        f"{metrics['label']}: {what} ({metrics['task']}); {records['train']:,} records for training, "
        f"{records['validation']:,} for validation, {records['test']:,} for the test (by {metrics['split']['by']})"
    )
    for key, text in (
        ("without_label", "without a label, left out"),
        ("refused", "refused, left out"),
        ("test_seen_in_training", "of the test whose payload is also in training"),
    ):
        if records[key]:
            print(f"records {text}: {records[key]:,}")
    if is_classes and metrics["unknown_classes"]:
        listed = ", ".join(f"{name} ({count:,})" for name, count in metrics["unknown_classes"].items())
        print(f"classes of the test that training lacks, counted as wrong: {listed}")
    for method in ("linear", "knn"):
        if method in metrics:
            figures = metrics[method]
            how = f"k {figures['k']}" if "k" in figures else f"L2 {figures['l2']:g}"
            print(f"{method}: {_class_line(figures) if is_classes else _value_line(figures)} ({how})")
    if is_classes:
        most = metrics["most_frequent_class"]
        print(f"always {most['class']!r}, the most frequent class: accuracy {most['accuracy']:.2%}")


def _class_line(figures: dict[str, Any]) -> str:
    top5 = f"top-5 {figures['top5_accuracy']:.2%}, " if "top5_accuracy" in figures else ""
    return f"accuracy {figures['accuracy']:.2%}, {top5}macro F1 {figures['macro_f1']:.4f}, MCC {figures['mcc']:.4f}"


def _value_line(figures: dict[str, Any]) -> str:
    names = {"spearman": "Spearman", "r2": "R2", "rmse": "RMSE"}
    return ", ".join(
        f"{text} {figures[key]:.4g}" if figures[key] is not None else f"{text} none (all equal)"
        for key, text in names.items()
    )


class _Shown:
    """Progress on the terminal."""

    def embedding(self, title: str) -> AbstractContextManager[Any]:
        return ProgressReport(title)

    def reused(self, records: int) -> None:
        print(f"{records:,} vectors of an earlier call are used again", file=sys.stderr)

    @contextmanager
    def fitting(self, total: int) -> Iterator[Callable[[int], None]]:
        from meristem.progress import Progress

        print("fitting the linear probe", file=sys.stderr)
        with Progress(total, "penalties", title="fit") as bar:
            yield bar.advance
