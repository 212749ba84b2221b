"""`meristem predict MODEL INPUT... --output FILE`: labels, probabilities or values, one row a record or a token."""

import argparse

from meristem.cli.jobs import add_engine_arguments, add_model_arguments, run_shown


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--output", required=True, help="a .csv, .tsv or .parquet file")
    parser.add_argument(
        "--label", action="append", dest="labels", help="label to predict; may be repeated; all labels by default"
    )
    parser.add_argument(
        "--per-token",
        dest="is_per_token",
        action="store_true",
        help="one row a token with its probabilities; by default labels of tokens are one text a record",
    )
    add_engine_arguments(parser, writes_file=True)


def run(args: argparse.Namespace) -> int:
    from meristem.inference.predict import Predict

    manifest = run_shown(Predict, args, labels=tuple(args.labels) if args.labels else None)
    print(f"{manifest['rows']:,} rows for {manifest['records']:,} records in {args.output}")
    return 0
