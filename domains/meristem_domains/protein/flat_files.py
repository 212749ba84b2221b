"""Proteins in GenBank, EMBL, UniProt and FASTQ files, which Biopython reads."""

import io
import re
import warnings
from collections.abc import Iterator

from meristem.data.reading.open import BLOCK_BYTES, BOM
from meristem.data.records import ReadOptions, Refusal, Source
from meristem.errors import ConfigError, DataError

KINDS = {
    "GenBank": re.compile(rb"LOCUS\s+\S"),
    "UniProt": re.compile(rb"ID   \S+\s+(Reviewed|Unreviewed|STANDARD|PRELIMINARY);"),
    "EMBL": re.compile(rb"ID   \S"),
    "FASTQ": re.compile(rb"@[^\n]*\n[A-Za-z*.\r-]*\n([A-Za-z*.\r-]*\n)*\+"),
}
"""The start of a file of each format. The first pattern that matches is taken."""

FORMATS = {"GenBank": "genbank", "UniProt": "swiss", "EMBL": "embl"}
"""Biopython's names for the formats in which a record ends with the line `//`."""

NUCLEOTIDES = re.compile(r"[ACGTUN]+", re.IGNORECASE)
"""Nucleotides, which most FASTQ files hold without saying so. Hardly any protein has these letters only."""

Row = tuple[str, str, int]
"""Id, sequence, and the line of the file that the record begins at."""


def flat_kind(head: bytes) -> str:
    """The format of a file that begins with `head`, one of `KINDS`; empty for any other."""
    return next((kind for kind, pattern in KINDS.items() if pattern.match(head.lstrip())), "")


def read_flat(stream: io.BufferedReader, kind: str, source: Source, options: ReadOptions) -> Iterator[Row]:
    """The records of a file of one of `KINDS`, without those that are refused.

    Raises:
        ConfigError: Biopython is not installed.
        DataError: a FASTQ file is truncated or damaged.
    """
    try:
        from Bio import SeqIO
        from Bio.Seq import UndefinedSequenceError
        from Bio.SeqIO.QualityIO import FastqGeneralIterator
    except ImportError as error:
        raise ConfigError(
            f"{source.name}: {kind} files are read by Biopython; install it: pip install 'meristem[protein]'"
        ) from error

    def refuse(line: int, id: str, reason: str) -> None:
        options.refuse(Refusal(source.name, line, id, reason))

    lines = _Lines(stream)
    if kind == "FASTQ":
        line = 1 + lines.count
        try:
            for title, text, _ in FastqGeneralIterator(lines):
                id = (title.split() or [f"line{line}"])[0]
                if NUCLEOTIDES.fullmatch(text):
                    refuse(line, id, "nucleotides (A, C, G, T, U and N alone), where a protein is expected")
                else:
                    yield id, text, line
                line = lines.count  # the title of the next record has been read
        except ValueError as error:
            raise DataError(f"{source.name}:{lines.count}: damaged FASTQ record: {error}") from error
        return
    for line, text in _entries(lines):
        id = text.split(maxsplit=2)[1]
        if not text.endswith("//\n"):
            refuse(line, id, f"{kind} record is cut off: it must end with a line //")
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of lengths, which are compared below, and of odd headers
                record = SeqIO.read(io.StringIO(text), FORMATS[kind])
            id, sequence = record.id or id, str(record.seq)
        except UndefinedSequenceError:
            refuse(line, id, f"{kind} record without a sequence")
            continue
        except Exception as error:  # of a damaged record, Biopython may raise anything
            refuse(line, id, f"{kind} record that Biopython cannot read: {' '.join(str(error).split())}")
            continue
        declared = re.search(r"(\d+) (aa|bp|rc)\b", " ".join(text.partition("\n")[0].split()), re.IGNORECASE)
        if declared and declared[2].lower() != "aa":
            refuse(line, id, f"{kind} record of nucleotides ({declared[0]}), where a protein (aa) is expected")
        elif declared and int(declared[1]) != len(sequence):
            refuse(line, id, f"sequence must have {declared[0]}, as its first line says; got {len(sequence)}")
        else:
            yield id, sequence, line


def _entries(lines: "_Lines") -> Iterator[tuple[int, str]]:
    """First line and text of each record; blank lines between records are left out."""
    held: list[str] = []
    first = 0
    for text in lines:
        if held or text.strip():
            first = first if held else lines.count
            held.append(text)
        if text.rstrip() == "//":
            yield first, "".join([*held[:-1], "//\n"])
            held = []
    if held:
        yield first, "".join(held)


class _Lines(io.TextIOWrapper):
    """The lines of a stream of bytes, counted as they are read."""

    def __init__(self, stream: io.BufferedReader):
        head = stream.peek(BLOCK_BYTES)
        # blank lines before the first record, which readers of FASTQ do not expect
        blank = stream.read(len(head) - len(head.removeprefix(BOM).lstrip()))
        super().__init__(stream, "utf-8", "replace")
        self.count = len((blank + b".").splitlines()) - 1

    def readline(self, size: int = -1, /) -> str:  # type: ignore[override]
        line = super().readline(size)
        self.count += bool(line)
        return line
