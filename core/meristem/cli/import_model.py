"""`meristem import SOURCE OUT`: a foreign checkpoint becomes a model directory, with a parity report."""

import argparse
from shlex import quote
from typing import TYPE_CHECKING

from meristem.registry import installed

if TYPE_CHECKING:
    from pathlib import Path

    from meristem.api import LoadedModel


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", metavar="SOURCE", help="a directory of another library (safetensors or .bin), or LIBRARY:MODEL"
    )
    parser.add_argument("out", metavar="OUT", help="the model directory to write; must be new or empty")
    parser.add_argument("--domain", default="", help="domain that reads its inputs; the family's own by default")
    parser.add_argument(
        "--random-weights",
        action="store_true",
        help="with LIBRARY:MODEL: draw the weights; otherwise they must be on this machine, as nothing is downloaded",
    )
    parser.add_argument("--seed", type=int, help="random seed of --random-weights (0)")
    parser.add_argument(
        "--skip-parity", action="store_true", help="do not compare with the other library, which loads the model twice"
    )


def run(args: argparse.Namespace) -> int:
    from meristem.api import import_model
    from meristem.cli.parity_report import print_parity

    def show(read: "LoadedModel", source: "Path", notes: list[str]) -> None:
        config = read.card.architecture
        count = sum(parameter.numel() for parameter in read.model.parameters())
        print(read.card.facts["imported_from"])
        print(f"{count:,} parameters, {config.num_layers} layers of width {config.width}")
        print(f"heads: {', '.join(read.card.heads) or 'none: a trunk alone'}")
        for note in notes:
            print(f"note: {note}")
        if not args.skip_parity:
            print_parity(read.model, read.card.tokenizer, source)

    made = import_model(
        args.source,
        args.out,
        domain=args.domain,
        random_weights=args.random_weights,
        seed=args.seed,
        tokenizer=args.tokenizer,
        inspect=show,
    )
    print(f"wrote {args.out}; next:")
    print(f"  meristem inspect {quote(args.out)}")
    if args.domain or made.card.domain in installed("meristem.domains"):
        print(f"  meristem embed {quote(args.out)} INPUT --output vectors")
    else:
        known = ", ".join(installed("meristem.domains"))
        print(
            f"inputs are read by the domain {made.card.domain}, which is not installed; --domain names another: {known}"
        )
    return 0
