"""The alphabet of ESM-1b and ESM-2: one token for each residue."""

from meristem.data.tokenizer import AlphabetTokenizer
from meristem.errors import require
from meristem.interop.families.esm import RESIDUES as STANDARD
from meristem.interop.families.esm import SYMBOLS as VOCAB

NONSTANDARD = "UZOBJX*-."
"""Selenocysteine, pyrrolysine, ambiguous and unknown residues, stops and gaps."""


def tokenizer(nonstandard: str = "keep") -> AlphabetTokenizer:
    """The residue tokenizer: `<cls>`, one token for each residue, `<eos>`. Case does not matter.

    Args:
        nonstandard: what to do with `U Z O B J X * - .`:
            `keep` reads each as its own symbol, but J (leucine or isoleucine) and `*` (stop), which the
            vocabulary lacks, as X, and counts these two;
            `x` reads all of them as X and counts them;
            `refuse` accepts the 20 standard residues only, so X is refused as well.

    Raises:
        ConfigError: `nonstandard` is none of these.
    """
    # by policy: what is replaced, and what is refused
    policies: dict[str, tuple[dict[str, str], str]] = {
        "keep": (dict.fromkeys("J*", "X"), ""),
        "x": ({symbol: "X" for symbol in NONSTANDARD if symbol != "X"}, ""),
        "refuse": ({}, NONSTANDARD),
    }
    require(nonstandard in policies, f"nonstandard must be one of {', '.join(policies)}", repr(nonstandard))
    replace, refuse = policies[nonstandard]
    return AlphabetTokenizer(
        vocab=VOCAB,
        prefix=("<cls>",),
        suffix=("<eos>",),
        mask="<mask>",
        replace=replace,
        refuse=refuse,
        random=STANDARD,
    )
