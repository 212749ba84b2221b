"""Time Meristem against its peers: `python benchmarks/run.py NAME...`, or `all`; results go to benchmarks/results.

Each name is a file beside this one with a function `findings(options)`. Without real data beside the checkout
(`--shared`), inputs are those that ship with Meristem.
"""

import argparse
import importlib
import sys
from pathlib import Path

import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from harness import Options, write  # noqa: E402

NAMES = ("embedding", "vision", "training", "generation", "reading", "patterns", "memory")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=[*NAMES, "all"], metavar="NAME", help=", ".join([*NAMES, "all"]))
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds (5)")
    parser.add_argument("--threads", type=int, help="CPU threads; torch's own choice where none is named")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="little work, nothing written: does it run?")
    parser.add_argument(
        "--shared", type=Path, default=HERE.parent.parent / "shared" / "data", help="real data by domain"
    )
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    options = Options(args.rounds, args.device, args.quick, args.shared if args.shared.exists() else None)
    for name in NAMES if "all" in args.names else args.names:
        torch.manual_seed(0)
        write(name, importlib.import_module(name).findings(options), options)


if __name__ == "__main__":
    main()
