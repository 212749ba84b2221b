"""`meristem domains list | new NAME | check NAME`."""

import argparse
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="list | new NAME | check NAME")
    actions.add_parser("list", help="name every installed domain and where it comes from")
    new = actions.add_parser("new", help="write a working domain as a package of its own, in ./NAME")
    new.add_argument("name", metavar="NAME", help="a Python identifier in lower case, such as lab_rna")
    check = actions.add_parser("check", help="run a domain through the contract that all domains keep")
    check.add_argument("name", metavar="NAME", help="an installed domain, or a dotted path such as my_lab.rna")


def run(args: argparse.Namespace) -> int:
    if args.action == "list":
        from meristem.domain import GROUP
        from meristem.registry import installed, package_of

        points = [point for same in installed(GROUP).values() for point in same]
        for point in points:
            print(f"{point.name:<16}{point.value:<36}{package_of(point)}")
        if not points:
            print("no domain is installed; write one with: meristem domains new NAME", file=sys.stderr)
    elif args.action == "new":
        from meristem.scaffold import write_domain

        print(f"wrote {write_domain(args.name, Path.cwd()).name}/; next:")
        print(f"  pip install -e {args.name}")
        print(f"  meristem domains check {args.name}")
    else:
        from meristem.contract import run_contract

        tick = "\u2713" if "utf" in (sys.stdout.encoding or "").lower() else "ok"
        for stage in run_contract(args.name):
            print(f"{tick} {stage.name:<9}{stage.detail:<64}{stage.seconds:7.2f} s", flush=True)
        print(f"{args.name} keeps the contract")
    return 0
