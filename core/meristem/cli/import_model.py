"""`meristem import SOURCE OUT`: a foreign checkpoint becomes a model directory, with a parity report."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where from, where to."""
    parser.add_argument("source", metavar="SOURCE", help="a Hugging Face or timm directory (safetensors or .bin)")
    parser.add_argument("out", metavar="OUT", help="the model directory to write; must be new or empty")
    parser.add_argument("--domain", default="", help="domain that reads its inputs; the family's own by default")
    parser.add_argument(
        "--image-px",
        type=int,
        nargs=2,
        metavar=("HEIGHT", "WIDTH"),
        help="size of pictures that the model is to read, another than its own: its table of positions is resampled",
    )
    parser.add_argument(
        "--skip-parity", action="store_true", help="do not compare with the other library, which loads the model twice"
    )


def run(args: argparse.Namespace) -> int:
    """Read, write, compare."""
    from pathlib import Path

    from meristem.cli.parity_report import print_parity
    from meristem.errors import CheckpointError
    from meristem.model_directory import find_model, import_model, is_own, save_model, with_tokenizer_options

    out = Path(args.out)
    source = find_model(args.source)
    if is_own(source):
        raise CheckpointError(f"{source} is a model directory already; SOURCE must be a foreign one")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out} must be new or an empty folder; it holds something else")
    card, model, imported = import_model(source, args.domain)
    own = card, model
    if args.image_px:
        card, model = with_tokenizer_options(card, model, {"image_px": args.image_px})
    save_model(out, card, model)

    config = card.architecture
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{imported.family.name}: {num_parameters:,} parameters, {config.num_layers} layers of width {config.width}")
    heads = (*card.heads, *(readout.name for readout in card.readouts))
    print(f"heads: {', '.join(heads) or 'none: a trunk alone'}")
    for note in imported.notes:
        print(f"note: {note}")
    if not args.skip_parity:
        print_parity(own[1], own[0].tokenizer, source)  # at the size that the source is for
    print(f"wrote {out}; next:")
    print(f"  meristem inspect {out}")
    print(f"  meristem embed {out} INPUT --output vectors")
    return 0
