"""FASTA and A3M are read as a slow, obvious parser reads them, wherever blocks are cut; bad input is named."""

import bz2
import gzip
import io
import lzma
import os
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from meristem.data.reading.open import open_source, read_text_blocks
from meristem.data.records import PAYLOAD, SCHEMA, ReadOptions, Refusal, Source, record_at
from meristem.errors import DataError
from meristem_domains.protein import fasta
from meristem_domains.protein.fasta import ProteinReader

read = ProteinReader().read

Row = tuple[str, str, int]


def read_rows(path: Path | str, options: ReadOptions | None = None) -> list[Row]:
    rows = []
    for batch in read(Source(str(path)), options or ReadOptions()):
        assert batch.schema.names == [*SCHEMA.names, PAYLOAD]
        batch.validate(full=True)
        rows += zip(batch.column("id").to_pylist(), batch.column(PAYLOAD).to_pylist(), batch.column("line").to_pylist())
        assert set(batch.column("file").to_pylist()) == {str(path)}
    return rows


def read_skipping(path: Path | str, batch_bytes: int = 4 << 20) -> tuple[list[Row], list[Refusal]]:
    refused: list[Refusal] = []
    rows = read_rows(path, ReadOptions(on_error=refused.append, batch_bytes=batch_bytes))
    return rows, refused


def slow_rows(text: str, is_a3m: bool = False) -> tuple[list[Row], list[int]]:
    """One character after the other; rows that are right, and lines of refused ones."""
    records: list[dict] = []
    for number, line in enumerate(text.replace("\r\n", "\n").replace("\r", "\n").split("\n"), start=1):
        if line.startswith(">"):
            words = line[1:].split()
            records.append({"id": words[0] if words else str(len(records) + 1), "line": number, "text": "", "bad": 0})
            continue
        for character in line:
            record = records[-1] if records else None
            if character in " \t" or (is_a3m and character in "abcdefghijklmnopqrstuvwxyz."):
                continue
            assert record is not None
            if not (character.isascii() and (character.isalpha() or character in "*-.")):
                record["bad"] = record["bad"] or number
            record["text"] += character
    rows = [(r["id"], r["text"], r["line"]) for r in records if r["text"] and not r["bad"]]
    bad = [r["bad"] or r["line"] for r in records if r["bad"] or not r["text"]]
    return rows, bad


def write(path: Path, data: bytes | str) -> Path:
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


line_ends = st.sampled_from(["\n", "\r\n", "\r"])
headers = st.text(alphabet="ab|_.> \té7", max_size=8)
sequence_lines = st.text(alphabet="MKVacd*-. \t", max_size=12)
foreign_lines = st.text(alphabet="MK1>é\x00", min_size=1, max_size=4).filter(lambda line: line[0] != ">")


@st.composite
def fastas(draw: st.DrawFn) -> str:
    """A FASTA of any kind, with faulty records among the others."""
    end = draw(line_ends)
    text = draw(st.sampled_from(["", end, " " + end + end]))
    for _ in range(draw(st.integers(1, 6))):
        text += ">" + draw(headers) + end
        for _ in range(draw(st.integers(0, 4))):
            text += draw(st.one_of(sequence_lines, sequence_lines, foreign_lines)) + end
    return text.removesuffix(end) if draw(st.booleans()) else text


@settings(max_examples=200, deadline=None)
@given(text=fastas(), block_bytes=st.integers(1, 20), is_a3m=st.booleans())
@example(text=">a\r\nMK\r\n>b\r\nV", block_bytes=3, is_a3m=False)
def test_records_do_not_depend_on_where_blocks_are_cut(
    tmp_path_factory: pytest.TempPathFactory, text: str, block_bytes: int, is_a3m: bool
) -> None:
    path = write(tmp_path_factory.getbasetemp() / ("x.a3m" if is_a3m else "x.fa"), text)
    rows, refused = read_skipping(path, block_bytes)
    expected, bad_lines = slow_rows(text, is_a3m)
    assert rows == expected
    assert [refusal.line for refusal in refused] == bad_lines
    if bad_lines:
        with pytest.raises(DataError, match=f":{bad_lines[0]}: "):
            read_rows(path, ReadOptions(batch_bytes=block_bytes))


def test_every_block_size_gives_the_same_records(tmp_path: Path) -> None:
    text = ">a one\nMKV\nLL\n\n>b\r\nmk*-.\r\n> c c\nM K\tV\n>\nMMM\n>\u00e9t\u00e9 x\nVVV"
    path = write(tmp_path / "x.fa", text)
    expected, bad = slow_rows(text)
    assert not bad
    assert len(expected) == 5
    for block_bytes in range(1, len(text) + 4):
        assert read_rows(path, ReadOptions(batch_bytes=block_bytes)) == expected


@pytest.mark.parametrize("is_a3m", [False, True])
@pytest.mark.parametrize("byte", sorted({*range(256)} - {*b"\r\n"}))
def test_every_byte_among_residues_is_kept_dropped_or_refused(tmp_path: Path, byte: int, is_a3m: bool) -> None:
    path = write(tmp_path / ("x.a3m" if is_a3m else "x.fa"), b">a\nMK\nM" + bytes([byte]) + b"V\n>b\nLL\n")
    rows, refused = read_skipping(path)
    symbol = chr(byte)
    is_letter = symbol.isascii() and symbol.isalpha()
    if symbol in " \t" or (is_a3m and (symbol == "." or (is_letter and symbol.islower()))):
        symbol = ""
    elif not is_letter and symbol not in "*-.":
        assert [(one.id, one.line) for one in refused] == [("a", 3)]
        assert rows == [("b", "LL", 4)]
        return
    assert rows == [("a", f"MKM{symbol}V", 1), ("b", "LL", 4)]
    assert not refused


def test_a_parser_that_takes_all_bytes_for_residues_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "x.fa", ">a\nM7V\n")
    with pytest.raises(DataError, match="'7' is no residue"):
        read_rows(path)
    monkeypatch.setattr(fasta, "RESIDUES", ".")
    assert read_rows(path) == [("a", "M7V", 1)]


def test_headers_in_other_alphabets_and_damaged_ones_do_no_harm_to_their_neighbours(tmp_path: Path) -> None:
    text = b">a\nMK\n>\xc3\xa9t\xc3\xa9 x\nMV\n>\n ML\n>  c \xff d\nMA\n>\xe6\x97\xa5 \nMC\n>\xff\nMD\n>z\nME\n"
    path = write(tmp_path / "x.fa", text)
    rows, refused = read_skipping(path)
    assert [row[0] for row in rows] == ["a", "\u00e9t\u00e9", "3", "\u65e5", "z"]
    assert [(one.line, one.id) for one in refused] == [(7, "c"), (11, "\ufffd")]
    kept = write(tmp_path / "y.fa", text.replace(b">  c \xff d\nMA\n", b"").replace(b">\xff\nMD\n", b""))
    assert [row[0] for row in read_rows(kept)] == [row[0] for row in rows]


def test_a_parser_that_loses_the_record_at_a_cut_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "".join(f">r{i}\nMKV\nLLA\n" for i in range(20))
    path = write(tmp_path / "x.fa", text)
    whole = fasta._whole_records

    def truncating(stream: io.BufferedReader, block_bytes: int):  # the mutant: what is held at the end is lost
        yield from list(whole(stream, block_bytes))[:-1]

    monkeypatch.setattr(fasta, "_whole_records", truncating)
    assert read_rows(path, ReadOptions(batch_bytes=30)) != slow_rows(text)[0]


@pytest.mark.shared
@pytest.mark.parametrize("name", ["uniref90_sample.fasta", "some_proteins.fasta", "proteomes"])
def test_real_files_are_read_as_biopython_reads_them(shared_data: Path, name: str) -> None:
    from Bio import SeqIO

    path = shared_data / "protein" / name
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    assert files
    for file in files:
        with file.open() as handle:
            expected = [(record.id, str(record.seq)) for record in SeqIO.parse(handle, "fasta")]
        assert [row[:2] for row in read_rows(file)] == expected
        assert [row[:2] for row in read_rows(file, ReadOptions(batch_bytes=10_000))] == expected


@pytest.mark.shared
def test_rows_of_an_alignment_keep_one_length_when_insertions_are_dropped(shared_data: Path) -> None:
    for file in sorted((shared_data / "protein").glob("*.a3m")):
        rows = read_rows(file)
        assert len(rows) > 100
        assert len({len(payload) for _, payload, _ in rows}) == 1


@pytest.mark.parametrize("name", ["x.a3m", "x.A3M.gz", "x.a3m.zst"])
def test_insertions_are_dropped_by_the_name_alone(tmp_path: Path, name: str) -> None:
    text = "#A3M#\n>q\nMKV-L\n>h\nMaaK..V-L\n"
    assert read_rows(write(tmp_path / name, text)) == [("q", "MKV-L", 2), ("h", "MKV-L", 4)]
    text = text.removeprefix("#A3M#\n")
    assert read_rows(write(tmp_path / "x.fasta", text)) == [("q", "MKV-L", 1), ("h", "MaaK..V-L", 3)]


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as out:
        out.write(data)
    return sink.getvalue().to_pybytes()


PACKERS = {"gzip": gzip.compress, "bzip2": bz2.compress, "xz": partial(lzma.compress, preset=0), "zstd": zstd}


@pytest.fixture
def some_fasta(rng: np.random.Generator) -> bytes:
    """Long enough that each compression cuts it in several blocks."""
    residues = np.frombuffer(b"ACDEFGHIKLMNPQRSTVWY", np.uint8)
    records = [b">r%d\n%s\n" % (i, residues[rng.integers(0, 20, 3000)].tobytes()) for i in range(700)]
    return b"".join(records)


@pytest.mark.parametrize("kind", PACKERS)
def test_compression_is_known_by_content(tmp_path: Path, some_fasta: bytes, kind: str) -> None:
    expected = slow_rows(some_fasta.decode()[:100_000].rpartition(">")[0])[0]
    packed = PACKERS[kind](some_fasta)
    assert read_rows(write(tmp_path / "reads", packed))[: len(expected)] == expected
    assert len(read_rows(write(tmp_path / "reads.txt", packed + PACKERS[kind](some_fasta)))) == 1400


@pytest.mark.parametrize("kind", PACKERS)
def test_truncated_compression_is_refused_even_when_records_are_skipped(
    tmp_path: Path, some_fasta: bytes, kind: str
) -> None:
    packed = PACKERS[kind](some_fasta)
    for keep in (11, len(packed) // 2, len(packed) - 3):
        path = write(tmp_path / "reads.fa.gz", packed[:keep])
        with pytest.raises(DataError, match=r"^[^\n]*reads\.fa\.gz: [^\n]*$"):
            read_skipping(path)


@pytest.mark.parametrize("kind", ["gzip", "bzip2", "xz"])
def test_damaged_compression_is_refused(tmp_path: Path, some_fasta: bytes, kind: str) -> None:
    packed = bytearray(PACKERS[kind](some_fasta))
    packed[len(packed) // 2] ^= 0xFF
    with pytest.raises(DataError, match=r"reads\.fa: "):
        read_skipping(write(tmp_path / "reads.fa", bytes(packed)))


class Trickle(io.RawIOBase):
    """A pipe that gives one byte, then a few at a time."""

    def __init__(self, data: bytes):
        self.rest, self.size = data, 1

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        block = self.rest[: min(len(buffer), self.size)]
        buffer[: len(block)] = block
        self.rest, self.size = self.rest[len(block) :], self.size % 50 + 1
        return len(block)


def test_standard_input_is_read(monkeypatch: pytest.MonkeyPatch, some_fasta: bytes) -> None:
    class Stdin:
        closed = False
        buffer: io.BufferedReader

    for data in (some_fasta[:120_000] + b"\n", gzip.compress(some_fasta[:120_000] + b"\n")):
        stdin = Stdin()
        stdin.buffer = io.BufferedReader(Trickle(data), 997)
        monkeypatch.setattr("sys.stdin", stdin)
        rows = [
            row
            for batch in read(Source("-"), ReadOptions())
            for row in zip(batch.column("id").to_pylist(), batch.column(PAYLOAD).to_pylist())
        ]
        assert rows == [row[:2] for row in slow_rows(some_fasta[:120_000].decode())[0]]


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        (">a\nMKV\n>b\nMK\nM7V\n", 5, "'7' is no residue"),
        (">a\nMKV\n>b\nMK_V\n", 4, "'_' is no residue"),
        (">a\nMKV\n>b\nMKéV\n", 4, "'é' is no residue"),
        (">a\nMKV\n>b desc\n>c\nMK\n", 3, "empty record"),
        (">a\nMKV\n>b\n", 3, "empty record"),
        (">a\nMKV\n>b\n \n\n", 3, "empty record"),
        (b">a\nMKV\n>b \xff\xfe\nMKV\n", 3, "not UTF-8: byte 0xff"),
        (b">a\nMKV\n>\xe9t\xe9\nMKV\n", 3, "not UTF-8: byte 0xe9"),
        (b">a\nMKV\n>b\nMK\xffV\n", 4, "is no residue"),
        (">a\nMKV\n>b\nMKV>c\nMKV\n", 4, "'>' is no residue"),
        (">a\nMKV\n;b\nMKV\n", 3, "';' is no residue"),
    ],
)
def test_a_bad_record_is_refused_by_file_and_line_and_the_rest_comes(
    tmp_path: Path, text: bytes | str, line: int, reason: str
) -> None:
    path = write(tmp_path / "x.fa", text)
    with pytest.raises(DataError) as caught:
        read_rows(path)
    message = str(caught.value)
    assert message.startswith(f"{path}:{line}: ")
    assert reason in message
    assert "\n" not in message
    rows, refused = read_skipping(path)
    assert [str(refusal) for refusal in refused] == [message]
    headers = (text if isinstance(text, bytes) else text.encode()).count(b"\n>") + 1
    assert len(rows) == headers - 1


@pytest.mark.parametrize(
    ("data", "line"),
    [
        (b"MKVLLA\n>b\nMKV\n", 1),
        (b"\n\nMKVLLA\n", 3),
        (b'{"id": "a", "sequence": "MKV"}\n', 1),
        (b"[1, 2, 3]\n", 1),
        (b"\x89PNG\r\n\x1a\n\x00\x00\x00", 1),
        (b"\x00\x01\x02" * 100, 1),
        (b"@read\nMKV\n+\nI\n", 4),
        (b"\xff\xfe>\x00a\x00\n\x00", 1),
        (b"  \n \n", 1),
    ],
)
def test_what_is_no_fasta_is_refused_as_a_whole(tmp_path: Path, data: bytes, line: int) -> None:
    path = write(tmp_path / "x.fa", data)
    with pytest.raises(DataError, match=f"^[^\n]*x\\.fa:{line}: [^\n]*$"):
        read_skipping(path)


def test_files_that_cannot_be_opened_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"missing\.fa: no such file$"):
        read_skipping(tmp_path / "missing.fa")
    with pytest.raises(DataError, match=r"is a directory"):
        read_skipping(tmp_path)
    with pytest.raises(DataError, match=r"empty\.fa: the file is empty$"):
        read_skipping(write(tmp_path / "empty.fa", b""))
    with pytest.raises(DataError, match=r"empty\.gz: the file is empty$"):
        read_skipping(write(tmp_path / "empty.gz", gzip.compress(b"")))


def test_a_file_without_permission_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "x.fa", b">a\nMKV\n")
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("permissions do not bind this user")
    with pytest.raises(DataError, match=r"x\.fa: cannot be read: permission denied$"):
        read_skipping(path)


def test_a_permission_error_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "x.fa", b">a\nMKV\n")

    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(DataError, match=r"x\.fa: cannot be read: permission denied$"):
        read_skipping(path)


def test_labels_are_not_to_be_had_from_fasta(tmp_path: Path) -> None:
    path = write(tmp_path / "x.fa", b">a\nMKV\n")
    with pytest.raises(DataError, match=r"x\.fa:1: no column 'score'"):
        read_rows(path, ReadOptions(label_columns=("score",)))


def test_a_byte_order_mark_and_duplicate_ids_do_no_harm(tmp_path: Path) -> None:
    path = write(tmp_path / "x.fa", b"\xef\xbb\xbf>a\nMKV\n>a\nMKV\n")
    assert read_rows(path) == [("a", "MKV", 1), ("a", "MKV", 3)]


def test_batches_hold_about_what_is_asked_for(tmp_path: Path, some_fasta: bytes) -> None:
    path = write(tmp_path / "x.fa", some_fasta)
    sizes = [batch.column(PAYLOAD).nbytes for batch in read(Source(str(path)), ReadOptions(batch_bytes=1_200_000))]
    assert len(sizes) == 2
    assert sizes[0] >= 1_200_000
    first = next(read(Source(str(path)), ReadOptions(batch_bytes=100_000)))
    record = record_at(first, 1)
    assert (record.id, record.source) == ("r1", f"{path}:3")


def test_line_ends_survive_any_block_size() -> None:
    text = b"\xef\xbb\xbfa\r\nb\rc\n\r\n\r\rd\r"
    for block_bytes in range(1, 20):
        assert b"".join(read_text_blocks(io.BytesIO(text), block_bytes)) == b"a\nb\nc\n\n\n\nd\n"


def test_a_stream_can_be_looked_into(tmp_path: Path, some_fasta: bytes) -> None:
    path = write(tmp_path / "x", gzip.compress(some_fasta))
    with open_source(Source(str(path))) as stream:
        assert stream.peek(1 << 19)[: 1 << 19] == some_fasta[: 1 << 19]
        assert stream.read() == some_fasta
