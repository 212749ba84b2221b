"""No module of the core holds a word of one domain: in names, text, docstrings or comments."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

WORDS = {
    *("residue", "protein", "contact", "nucleotide", "codon", "fasta"),
    *("picture", "image", "pixel", "timm"),
    "syntax",
}

OTHER_PEOPLES = ("matplotlib.image",)
"""Names of other libraries that hold such a word."""

EXEMPT = ("core/meristem/interop/families/", "core/meristem/scaffold/")
"""Families that several domains share, and the sample domain of `domains new`."""

OWED: set[str] = set()
"""Modules that still hold one. The list may only become shorter."""


def words_in(text: str) -> set[str]:
    """Words of domains that a text holds, also within names (`image_px`, `CodonTokenizer`), in any case and number."""
    for name in OTHER_PEOPLES:
        text = text.replace(name, "")
    pieces = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", text)
    plain = {re.sub(r"(?<=x)es$|s$", "", piece.lower()) for piece in pieces}
    # two capitals in a row may be an abbreviation before a word: FASTAReader
    return (plain | {word for word in WORDS if word.upper() in text}) & WORDS


def modules() -> list[str]:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", "core/*.py", "core/*.in"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a checkout")
    return [name for name in listed.stdout.splitlines() if (ROOT / name).is_file() and not name.startswith(EXEMPT)]


def test_the_core_holds_no_word_of_a_domain():
    """A module that is owed and holds none any more fails as well, so the list shrinks."""
    found = {name: words_in(f"{name} {(ROOT / name).read_text('utf-8')}") for name in modules()}
    assert len(found) > 100
    assert {name: words for name, words in found.items() if words and name not in OWED} == {}
    assert {name for name, words in found.items() if words} >= OWED


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("# one token a residue", {"residue"}),
        ('"""Contact maps of Proteins."""', {"contact", "protein"}),
        ("image_px = num_pixels", {"image", "pixel"}),
        ("class CodonTokenizer: ...", {"codon"}),
        ("def read_fasta(): pass", {"fasta"}),
        ("FASTA_LINES = 3", {"fasta"}),
        ("class FASTAReader: ...", {"fasta"}),
        ("from timm.data import x", {"timm"}),
        ("from matplotlib.image import imsave", set()),
        ("syntaxes of NUCLEOTIDES", {"syntax", "nucleotide"}),
        ("residual imagery of proteomes, a pictorial contactless imshow", set()),
    ],
)
def test_words_are_found_in_code_and_prose(text: str, words: set[str]):
    assert words_in(text) == words


def test_a_word_in_any_module_would_be_found(rng):
    """The mutants: a module of the core, each word, as a name, as prose, in a comment."""
    name = modules()[int(rng.integers(len(modules())))]
    text = (ROOT / name).read_text("utf-8")
    held = words_in(text)
    lines = ("{0}_px = 1", '"""Many {0}s."""', "# {1}", "class Of{2}: ...")
    for word in WORDS:
        for line in lines:
            mutant = f"{text}\n{line.format(word, word.upper(), word.title())}\n"
            assert words_in(mutant) == held | {word}
