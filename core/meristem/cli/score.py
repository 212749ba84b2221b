"""`meristem score MODEL INPUT... --output FILE`: how likely records are, or what a domain's scorer says of them."""

import argparse

from meristem.cli.jobs import add_engine_arguments, add_model_arguments, run_shown
from meristem.cli.main import Parser
from meristem.cli.options import add_options, flags_of, options_of
from meristem.cli.tokenizer_options import take_tokenizer_options
from meristem.errors import ConfigError
from meristem.scoring.likelihood_options import LikelihoodOptions


def run_argv(argv: list[str], parser: argparse.ArgumentParser) -> int:
    """Parse the arguments, those of the scorer among them, score every record, and say what came of it."""
    # which arguments there are depends on the scorer
    first = Parser(prog=parser.prog, add_help=False)
    first.add_argument("--scorer", default="likelihood")
    first.add_argument("--domain", default="")
    asked, _ = first.parse_known_args(argv)
    options, listed = _options_of(asked.scorer, asked.domain)
    add_model_arguments(parser)
    parser.add_argument(
        "--output",
        required=True,
        help="a .csv, .tsv or .parquet of one row a record; an .npz of arrays by id where the scorer gives arrays",
    )
    parser.add_argument("--scorer", default="likelihood", metavar="NAME", help="what is scored, likelihood by default")
    parser.add_argument("--plots", default="", metavar="FOLDER", help="folder for a PNG of each array")
    add_engine_arguments(parser, writes_file=True)
    add_options(parser, options, f"options of the scorer {asked.scorer}")
    parser.epilog = f"{listed}\n\n{parser.epilog}"
    try:
        rest, tokenizer = take_tokenizer_options(parser, argv)
    except ConfigError as error:
        there = ", ".join(flags_of(options)) or "none"
        raise ConfigError(f"{error}; options of the scorer {asked.scorer}: {there}") from error
    args = parser.parse_args(rest, argparse.Namespace(tokenizer=tokenizer))
    from meristem.inference.score import Score

    manifest = run_shown(Score, args, scorer_options=options_of(args, options))
    print(manifest["summary"])
    plots = f", plots in {args.plots}" if args.plots else ""
    print(f"{manifest['records']:,} records in {args.output}{plots}")
    return 0


def _options_of(scorer: str, domain: str) -> tuple[type, str]:
    """The options of a scorer, and a text about others; the likelihood needs no domain, and none is imported for it."""
    if scorer == "likelihood" and not domain:
        text = "scorers of a domain: meristem score --domain NAME --help; options of one: --scorer NAME --help"
        return LikelihoodOptions, text
    from meristem.inference.score import Score, find_scorers

    listed = "\n".join(f"  {name:<14}{one.help}" for name, one in find_scorers(domain).items())
    text = f"scorers (--scorer NAME --help shows the options of one):\n{listed}"
    return Score(scorer=scorer, domain=domain).find().options, text
