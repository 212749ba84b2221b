"""What stands before the first record of a FASTA file, or before the mark of a header, is never taken for nothing."""

from pathlib import Path

import pytest

from meristem.data.records import PAYLOAD, ReadOptions, Refusal, Source
from meristem.errors import DataError
from meristem_domains.protein.fasta import ProteinReader

Row = tuple[str, str, int]


def read_rows(path: Path, options: ReadOptions) -> list[Row]:
    rows: list[Row] = []
    for batch in ProteinReader().read(Source(str(path)), options):
        rows += zip(*(batch.column(name).to_pylist() for name in ("id", PAYLOAD, "line")))
    return rows


def read_skipping(path: Path) -> tuple[list[Row], list[Refusal]]:
    refused: list[Refusal] = []
    return read_rows(path, ReadOptions(on_error=refused.append)), refused


def write(path: Path, text: str) -> Path:
    path.write_bytes(text.encode())
    return path


@pytest.mark.parametrize("space", [" ", "\t", " \t"])
@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("lead", ["", "\n", "\r\n\n", "; a comment\n", "\ufeff"])
def test_an_indented_header_is_refused_wherever_it_stands(tmp_path: Path, space: str, place: int, lead: str) -> None:
    """That of the first record vanished without a word, and the record with it."""
    records = [f">{name}\nMKT\nAYI\n" for name in "abc"]
    records[place] = space + records[place]
    path = write(tmp_path / "a.fa", lead + "".join(records))
    line = 1 + lead.count("\n") + 3 * place
    with pytest.raises(DataError, match=rf"a\.fa:{line}: .*a header must begin with '>' at the beginning of its line"):
        read_rows(path, ReadOptions())
    rows, refused = read_skipping(path)
    # within a file it stands among the residues of the record before it
    assert [row[0] for row in rows] == [name for name in "abc" if name not in {0: "a", 1: "ab", 2: "bc"}[place]]
    assert len(refused) == 1


@pytest.mark.parametrize("comments", ["; one\n", "; one\n;two >x\n\n", ";\n\n; a, b, c\n"])
def test_comments_before_the_first_header_are_left_out(tmp_path: Path, comments: str) -> None:
    """As the files of the first FASTA programs have them."""
    path = write(tmp_path / "a.fa", f"{comments}>a one\nMKT\n>b\nAYI\n")
    line = 1 + comments.count("\n")
    assert read_rows(path, ReadOptions()) == [("a", "MKT", line), ("b", "AYI", line + 2)]


def test_residues_before_the_first_header_are_refused_once(tmp_path: Path) -> None:
    rows, refused = read_skipping(write(tmp_path / "a.fa", "; old\nMKT\nAYI\n>b\nGSH\n"))
    assert rows == [("b", "GSH", 4)]
    assert [(one.line, one.reason) for one in refused] == [
        (2, "a header must begin with '>' at the beginning of its line; got 'MKT'")
    ]
