"""The parity report that `import` and `export` print."""

from pathlib import Path

import numpy as np

from meristem.data.tokenizer import Tokenizer
from meristem.interop.directory import read_config_file
from meristem.interop.family import find_family
from meristem.interop.runners import compare
from meristem.model.model import Model


def print_parity(model: Model, tokenizer: Tokenizer, folder: Path) -> None:
    """Compare with the library that a directory is for, on random input, where it is installed and loads it."""
    family = find_family(folder, read_config_file(folder))
    runner = family.runner
    if runner is None:
        print(f"no parity report: no library that can be installed has {family.name}")
        return
    if not runner.is_installed:
        print(f"no parity report: {runner.library} is not installed")
        return
    try:
        reference = runner.load(folder)
    except (OSError, ValueError, RuntimeError, ImportError, AttributeError, KeyError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        print(f"no parity report: {runner.library} does not load {folder}: {reason}")
        return
    differences = compare(model, tokenizer, reference, np.random.default_rng(0), runner)
    print(f"parity with {runner.library} (fp32, CPU, random input), largest difference:")
    for name, value in differences.items():
        print(f"  {name:<16}{value:.1e}")
