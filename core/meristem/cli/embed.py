"""`meristem embed MODEL INPUT... --output OUT`: one vector a record, or one a token, in input order."""

import argparse

from meristem.cli.jobs import add_engine_arguments, add_model_arguments, run_shown


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument(
        "--output", required=True, help="directory; a run that was stopped there goes on where it was stopped"
    )
    parser.add_argument(
        "--format",
        default="parquet",
        choices=["parquet", "h5", "npz"],
        help="part-*.parquet alone, or embeddings.h5 (as biotrainer reads it) or embeddings.npz beside them",
    )
    add_vector_arguments(parser, ["mean", "cls", "max", "own", "none"], "; none keeps one a token")
    add_engine_arguments(parser)


def add_vector_arguments(parser: argparse.ArgumentParser, pools: list[str], more: str = "") -> None:
    """Which vectors are wanted, for every verb that embeds; the help text of the pools says `more` as well."""
    own = "own is the pool that the model was trained with, and the default; without one the default is mean"
    parser.add_argument("--pool", choices=pools, help=f"how the vectors of tokens become one: {own}{more}")
    parser.add_argument(
        "--layer", type=int, default=-1, help="layer whose vectors are wanted: 0 is the embedding, -1 the last"
    )


def run(args: argparse.Namespace) -> int:
    from meristem.inference.embed import Embed

    manifest = run_shown(Embed, args)
    file = f"/{manifest['file']}" if "file" in manifest else ""
    per = "one a token" if manifest["options"]["pool"] == "none" else "one a record"
    print(f"{manifest['rows']:,} vectors of {manifest['width']} ({per}) in {args.output}{file}")
    return 0
