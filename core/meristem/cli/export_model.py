"""`meristem export MODEL OUT --to hf`: a model becomes a directory that another library loads."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What, where to, and for whom."""
    parser.add_argument("model", metavar="MODEL", help="a run directory or a model directory")
    parser.add_argument("out", metavar="OUT", help="the directory to write; must be new or empty")
    parser.add_argument("--to", choices=["hf"], default="hf", help="hf: a directory that transformers loads")
    parser.add_argument(
        "--skip-parity", action="store_true", help="do not compare with transformers, which loads the model twice"
    )


def run(args: argparse.Namespace) -> int:
    """Read, write, compare."""
    from pathlib import Path

    from meristem.cli.parity_report import print_parity
    from meristem.interop.directory import write_directory
    from meristem.model_directory import load_any

    out = Path(args.out)
    card, model = load_any(args.model)
    for note in write_directory(out, card.architecture, card.tokenizer, model):
        print(f"note: {note}")
    if not args.skip_parity:
        print_parity(model, card.tokenizer, out)
    print(f"wrote {out}; next, in Python:")
    print(f"  transformers.AutoModelForMaskedLM.from_pretrained({str(out)!r})")
    return 0
