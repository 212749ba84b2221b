"""The parity report that `import` and `export` print."""

from pathlib import Path

import numpy as np

from meristem.data.tokenizer import Tokenizer
from meristem.interop.parity import LENGTHS, compare, is_reference_installed, load_reference
from meristem.model.model import Model


def print_parity(model: Model, tokenizer: Tokenizer, folder: Path) -> None:
    """Compare with `transformers` on random input, where it is installed and loads the directory."""
    if not is_reference_installed():
        print("no parity report: transformers is not installed")
        return
    try:
        reference = load_reference(folder)
    except (OSError, ValueError, RuntimeError, ImportError, AttributeError) as error:
        print(f"no parity report: transformers does not load {folder}: {str(error).splitlines()[0]}")
        return
    parity = compare(model, tokenizer, reference, np.random.default_rng(0))
    print(f"parity with transformers (fp32, CPU, {len(LENGTHS)} random sequences with masks), largest difference:")
    worst = max(range(len(parity.layers)), key=parity.layers.__getitem__)
    print(f"  layers    {parity.layers[worst]:.1e}   of {len(parity.layers)} hidden states; layer {worst}")
    for name, value in (("logits", parity.logits), ("contacts", parity.contacts)):
        print(f"  {name:<10}{'not compared: no such head' if value is None else f'{value:.1e}'}")
