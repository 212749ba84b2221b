"""`meristem export MODEL OUT --to hf`: a model becomes a directory that another library loads."""

import argparse
from pathlib import Path

from meristem.registry import find, installed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a run directory or a model directory")
    parser.add_argument("out", metavar="OUT", help="the directory to write; must be new or empty")
    parser.add_argument(
        "--to",
        choices=sorted(installed("meristem.libraries")),
        default="hf",
        help="library that loads the directory (hf: Hugging Face transformers)",
    )
    parser.add_argument(
        "--skip-parity", action="store_true", help="do not compare with the other library, which loads the model twice"
    )


def run(args: argparse.Namespace) -> int:
    from meristem.api import load
    from meristem.cli.parity_report import print_parity
    from meristem.interop.directory import read_config_file

    out, loaded = Path(args.out), load(args.model)
    for note in loaded.export(out, args.to):
        print(f"note: {note}")
    if not args.skip_parity:
        print_parity(loaded.model, loaded.card.tokenizer, out)
    print(f"wrote {out}; next, in Python:")
    print(f"  {find('meristem.libraries', args.to).line_that_loads(out, read_config_file(out))}")
    return 0
