"""`meristem predict MODEL INPUT... --output FILE`: labels, probabilities or values, one row a record or a token."""

import argparse
import sys

from meristem.cli.embed import ProgressReport, add_engine_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to label, with what, and where to."""
    parser.add_argument("model", metavar="MODEL", help="a run directory or model directory of a fine-tuned model")
    parser.add_argument("inputs", metavar="INPUT", nargs="+", help="files of records; - for standard input")
    parser.add_argument("--output", required=True, help="a .csv, .tsv or .parquet file")
    parser.add_argument("--label", action="append", dest="labels", help="to predict, may be repeated; all by default")
    parser.add_argument(
        "--per-token",
        action="store_true",
        help="one row a token with its probabilities; by default labels of tokens are one text a record",
    )
    add_engine_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Label every record, then put the table in its place."""
    from meristem.data.records import ReadOptions
    from meristem.inference.predict_run import predict_files

    with ProgressReport("predict") as report:
        done = predict_files(
            args.model,
            args.inputs,
            args.output,
            is_per_token=args.per_token,
            labels=args.labels,
            tokens_per_batch=args.tokens_per_batch,
            precision=args.precision,
            domain=args.domain,
            is_skipping=args.on_error == "skip",
            read=ReadOptions(payload_column=args.sequence_column, id_column=args.id_column),
            report=report,
        )
    if done.replaced:
        print(f"replaced: {', '.join(f'{what} {count:,}' for what, count in done.replaced.items())}")
    for refusal in done.refused:
        print(f"refused {refusal}", file=sys.stderr)
    if done.num_refused:
        print(f"refused records: {done.num_refused:,}")
    print(f"{done.num_rows:,} rows for {done.num_records:,} records in {args.output}")
    return 0
