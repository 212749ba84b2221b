"""`meristem export MODEL OUT --to hf`: a model becomes a directory that another library loads."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What, where to, and for whom."""
    parser.add_argument("model", metavar="MODEL", help="a run directory or a model directory")
    parser.add_argument("out", metavar="OUT", help="the directory to write; must be new or empty")
    parser.add_argument(
        "--to", choices=["hf", "timm"], default="hf", help="a directory that transformers loads, or timm"
    )
    parser.add_argument(
        "--skip-parity", action="store_true", help="do not compare with the other library, which loads the model twice"
    )


def run(args: argparse.Namespace) -> int:
    """Read, write, compare."""
    from meristem.cli.parity_report import print_parity
    from meristem.interop.directory import write_directory
    from meristem.model_directory import load_any

    out = Path(args.out)
    card, model = load_any(args.model)
    for note in write_directory(out, card.architecture, card.tokenizer, model, args.to):
        print(f"note: {note}")
    if not args.skip_parity:
        print_parity(model, card.tokenizer, out)
    print(f"wrote {out}; next, in Python:")
    print(f"  {_line_that_loads(out)}")
    return 0


def _line_that_loads(out: Path) -> str:
    from meristem.interop.directory import read_config_file

    named = read_config_file(out).get("architectures")
    if named:
        return f"transformers.{named[0]}.from_pretrained({str(out)!r})"
    return f"timm.create_model({f'local-dir:{out}'!r}, pretrained=True)"
