"""`meristem import SOURCE OUT`: a foreign checkpoint becomes a model directory, with a parity report."""

import argparse
from dataclasses import replace
from shlex import quote
from typing import TYPE_CHECKING

from meristem.registry import installed

if TYPE_CHECKING:
    from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where from, where to."""
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
    """Fetch where the source is a name, read, write, compare."""
    from pathlib import Path
    from tempfile import TemporaryDirectory

    from meristem.errors import CheckpointError, ConfigError
    from meristem.interop.library import FetchOptions, fetch_model, is_named
    from meristem.model_directory import find_model

    out = Path(args.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out} must be new or an empty folder; it holds something else")
    if args.seed is not None and not args.random_weights:
        raise ConfigError("--seed needs --random-weights: nothing else is drawn")
    if is_named(args.source):
        with TemporaryDirectory() as temporary:
            folder = Path(temporary) / args.source.partition(":")[2].replace("/", "_")
            notes = fetch_model(args.source, folder, FetchOptions(args.random_weights, args.seed or 0))
            return _import(args, folder, out, notes)
    if args.random_weights:
        raise ConfigError(f"--random-weights needs LIBRARY:MODEL as SOURCE; got {args.source}")
    return _import(args, find_model(args.source), out, [])


def _import(args: argparse.Namespace, source: "Path", out: "Path", notes: list[str]) -> int:
    """Read a foreign directory, write ours, compare the two.

    Args:
        notes: what the user must know of how the directory came to be.
    """
    from meristem.cli.parity_report import print_parity
    from meristem.domain import load_domain
    from meristem.errors import CheckpointError
    from meristem.model_directory import import_model, is_own, save_model, with_tokenizer_options

    if args.domain:
        load_domain(args.domain)  # a domain that is not there is said before anything is read
    if is_own(source):
        raise CheckpointError(f"{source} is a model directory already; SOURCE must be a foreign one")
    card, model, imported = import_model(source, args.domain)
    if notes:
        card = replace(card, facts={**card.facts, "weights": "; ".join(notes)})
    own = card, model
    card, model = with_tokenizer_options(card, model, args.tokenizer)
    save_model(out, card, model)

    config = card.architecture
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{imported.family.name}: {num_parameters:,} parameters, {config.num_layers} layers of width {config.width}")
    print(f"heads: {', '.join(card.heads) or 'none: a trunk alone'}")
    for note in (*notes, *imported.notes):
        print(f"note: {note}")
    if not args.skip_parity:
        print_parity(own[1], own[0].tokenizer, source)  # at the size that the source is for
    print(f"wrote {out}; next:")
    print(f"  meristem inspect {quote(str(out))}")
    if args.domain or card.domain in installed("meristem.domains"):
        print(f"  meristem embed {quote(str(out))} INPUT --output vectors")
    else:
        known = ", ".join(installed("meristem.domains"))
        print(f"inputs are read by the domain {card.domain}, which is not installed; --domain names another: {known}")
    return 0
