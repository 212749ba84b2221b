"""Files that Biopython writes are read back as they were; nucleotides and damaged records are named."""

import gzip
import io
from pathlib import Path

import numpy as np
import pytest
from Bio import SeqIO
from Bio.Data import IUPACData
from Bio.Seq import Seq
from Bio.SeqRecord import SeqRecord

from meristem.data.records import PAYLOAD, ReadOptions, Refusal, Source
from meristem.errors import DataError
from meristem_domains.dna import kmers
from meristem_domains.protein import alphabet
from meristem_domains.protein.fasta import ProteinReader

read = ProteinReader().read

LETTERS = IUPACData.extended_protein_letters
FORMATS = ("genbank", "embl", "fastq")
UNIPROT = """ID   {id}_HUMAN              Reviewed;        {length} AA.
AC   {id};
DT   01-JAN-1990, integrated into UniProtKB/Swiss-Prot.
DE   RecName: Full=Made up;
OS   Homo sapiens (Human).
OC   Eukaryota.
SQ   SEQUENCE   {length} AA;  1000 MW;  0000000000000000 CRC64;
     {text}
//
"""


def written(rows: dict[str, str], form: str, kind: str = "protein") -> str:
    if form == "swiss":
        return "".join(UNIPROT.format(id=id, length=len(text), text=text) for id, text in rows.items())
    records = [
        SeqRecord(Seq(text), id=id, name=id.partition(".")[0], annotations={"molecule_type": kind})
        for id, text in rows.items()
    ]
    for record in records:
        record.letter_annotations = {"phred_quality": [31] * len(record)} if form == "fastq" else {}
    stream = io.StringIO()
    SeqIO.write(records, stream, form)
    return stream.getvalue()


def read_back(path: Path, **options: object) -> tuple[dict[str, str], list[int]]:
    batches = list(read(Source(str(path)), ReadOptions(**options)))
    found = [row for batch in batches for row in batch.select(["id", PAYLOAD, "line"]).to_pylist()]
    return {row["id"]: row[PAYLOAD] for row in found}, [row["line"] for row in found]


@pytest.fixture
def rows(rng: np.random.Generator) -> dict[str, str]:
    return {f"P{i:05}": "M" + "".join(rng.choice(list(LETTERS), rng.integers(300))) for i in range(1, 20)}


@pytest.mark.parametrize("form", [*FORMATS, "swiss"])
def test_what_is_written_is_read(form: str, rows: dict[str, str], rng: np.random.Generator, tmp_path: Path) -> None:
    """Compressed, with line ends of Windows, in batches of any size; lines are those that records begin at."""
    text = written(rows, form)
    begins = {"genbank": "LOCUS", "fastq": "@P"}.get(form, "ID  ")
    for data in (text, f"\n{text}".replace("\n", "\r\n")):
        path = tmp_path / "records.txt"
        path.write_bytes(gzip.compress(data.encode()))
        found, lines = read_back(path, batch_bytes=int(rng.integers(1, 4000)))
        assert found == rows
        assert lines == [number for number, line in enumerate(data.split("\n"), 1) if line.startswith(begins)]


@pytest.mark.parametrize("form", FORMATS)
def test_nucleotides_are_refused_by_line(form: str, rng: np.random.Generator, tmp_path: Path) -> None:
    path = tmp_path / "reads.txt"
    path.write_text(written({"D1.1": "".join(rng.choice(list("ACGT"), 60))}, form, "DNA"))
    with pytest.raises(DataError, match=r"reads\.txt:1: .*nucleotides .*where a protein .*is expected"):
        read_back(path)


@pytest.mark.parametrize(
    ("form", "change", "said"),
    [
        ("genbank", lambda text: text.removesuffix("//\n"), "cut off"),
        ("genbank", lambda text: text.replace("ORIGIN", "CONTIG      join(X:1..3)\nORIGIN").rstrip("/\n"), "cut off"),
        (
            "genbank",
            lambda text: "\n".join([*text.split("\n")[:-3], "//\n"]),
            "must have .* aa, .*; got 0|without",
        ),
        ("swiss", lambda text: text.replace("SQ   ", "XQ   "), "Biopython cannot read|must have|without"),
        ("embl", lambda text: text.replace(" AA.\n", "9 AA.\n"), r"must have \d+ AA, as its first line says; got"),
    ],
)
def test_a_damaged_record_is_refused_and_the_others_are_read(
    form: str, change: object, said: str, rows: dict[str, str], tmp_path: Path
) -> None:
    (last, text), path = rows.popitem(), tmp_path / "records"
    damaged = change(written({last: text[:50]}, form))  # type: ignore[operator]
    path.write_text(written(rows, form) + damaged)
    refused: list[Refusal] = []
    assert read_back(path, on_error=refused.append)[0] == rows
    [refusal] = refused
    assert refusal.line == written(rows, form).count("\n") + 1
    with pytest.raises(DataError, match=said):
        read_back(path)


def test_a_damaged_fastq_file_is_named_by_line(rows: dict[str, str], tmp_path: Path) -> None:
    path, text = tmp_path / "reads.fq", written(rows, "fastq")
    for damaged in (text[:-3], text.rstrip("\n").rpartition("\n+")[0], text.replace("\n+\n", "\n+other\n")):
        path.write_text(damaged)
        with pytest.raises(DataError, match=r"reads\.fq:\d+: damaged FASTQ record: "):
            read_back(path)
    with pytest.raises(DataError, match=r"no column 'kind': .* files have none"):
        read_back(path, label_columns=("kind",))


def test_alphabets_are_those_of_biopython() -> None:
    assert set(alphabet.STANDARD) == set(IUPACData.protein_letters)
    assert set(alphabet.STANDARD + alphabet.NONSTANDARD) == {*IUPACData.extended_protein_letters, *"*-."}
    assert set(kmers.BASES) == set(IUPACData.unambiguous_dna_letters)
    assert {*kmers.BASES, *kmers.GAP, *kmers.AMBIGUOUS} == {*IUPACData.ambiguous_dna_letters, "U"}
