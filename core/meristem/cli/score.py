"""`meristem score MODEL INPUT... --output FILE`: how likely records are, or what a domain's scorer says of them."""

import argparse
import sys

from meristem.cli.embed import ProgressReport, add_engine_arguments
from meristem.cli.main import Parser
from meristem.cli.options import add_options, flags_of, options_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to score, with what, how, and where to."""
    parser.add_argument("model", metavar="MODEL", help="a run directory, a model directory or a Hugging Face directory")
    parser.add_argument("inputs", metavar="INPUT", nargs="+", help="files of records; - for standard input")
    parser.add_argument(
        "--output",
        required=True,
        help="a .csv or .parquet of one row a record; an .npz of arrays by id where the scorer gives arrays",
    )
    parser.add_argument(
        "--scorer", default="likelihood", metavar="NAME", help="what is scored (below); likelihood by default"
    )
    parser.add_argument(
        "--plots", metavar="FOLDER", help="where the scorer draws arrays: a PNG a record, in this folder"
    )
    add_engine_arguments(parser)


def run_argv(argv: list[str], parser: argparse.ArgumentParser) -> int:
    """Parse the arguments, those of the scorer among them; score every record, then put the output in its place."""
    from meristem.errors import ConfigError

    # which options there are depends on the scorer
    first = Parser(prog=parser.prog, add_help=False)
    first.add_argument("--scorer", default="likelihood")
    first.add_argument("--domain", default="")
    asked, _ = first.parse_known_args(argv)
    needs_list = asked.scorer != "likelihood" or "-h" in argv or "--help" in argv
    from meristem.inference.score_run import LIKELIHOOD, find_scorers, score_files

    scorers = find_scorers(asked.domain) if needs_list else {"likelihood": LIKELIHOOD}
    if asked.scorer not in scorers:
        raise ConfigError(f"--scorer must be one of {', '.join(scorers)}; got {asked.scorer!r}")
    scorer = scorers[asked.scorer]
    add_arguments(parser)
    add_options(parser, scorer.options, f"options of the scorer {asked.scorer}")
    listed = "\n".join(f"  {name:<14}{one.help}" for name, one in scorers.items())
    parser.epilog = f"scorers (--scorer NAME --help shows the options of one):\n{listed}\n\n{parser.epilog}"
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        options = ", ".join(flags_of(scorer.options)) or "none"
        raise ConfigError(
            f"unrecognized arguments: {' '.join(unknown)}; options of the scorer {asked.scorer}: {options} "
            f"(see {parser.prog} --scorer {asked.scorer} --help)"
        )
    from meristem.data.records import ReadOptions

    with ProgressReport("score") as report:
        done = score_files(
            args.model,
            args.inputs,
            args.output,
            scorer,
            options_of(args, scorer.options),
            plots=args.plots,
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
    if done.num_renamed:
        print(f"arrays of repeated ids, whose names end in #2, #3 ...: {done.num_renamed:,}")
    print(done.summary)
    print(f"{done.num_records:,} records in {args.output}" + (f", plots in {args.plots}" if args.plots else ""))
    return 0
