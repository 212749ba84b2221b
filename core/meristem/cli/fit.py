"""`meristem fit`, `validate`, `test`: from a config to a run directory, and figures of what it left."""

import argparse


def run_argv(argv: list[str], parser: argparse.ArgumentParser) -> int:
    """Parse the arguments of a run, and fit it or measure it, as the verb says that `parser` is named after."""
    from meristem.cli.run_config import read_arguments, spec_of
    from meristem.train.run import fit, test, validate

    read = read_arguments(argv, parser)
    if read is None:
        return 0
    verb = parser.prog.split()[-1]
    with read.placing():
        spec = spec_of(read)
        if verb == "fit":
            fit(spec)
            return 0
        values = {"validate": validate, "test": test}[verb](spec)
    width = max(len(name) for name in values)
    print(f"{verb}: {spec.folder}")
    for name, value in values.items():
        print(f"  {name:<{width}}  {value:.5g}")
    return 0
