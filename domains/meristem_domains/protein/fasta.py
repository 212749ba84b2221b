"""Reading proteins: FASTA, A3M, tables with a column of sequences, and what Biopython reads (`flat_files`).

Parsing works on blocks of bytes: a few numpy passes find headers, line ends and residues, whatever the number
of records. Letters keep their case. What is no residue is refused by file and line.
"""

import io
import os
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from meristem.data.reading.open import BLOCK_BYTES, BOM, open_source, read_text_blocks
from meristem.data.reading.reader import Reader
from meristem.data.reading.tables import TableFormat, keep_rows, read_table, table_format
from meristem.data.records import INPUT_PREFIX, ReadOptions, Refusal, Source, batch_of
from meristem.data.tokenizer import column_bytes
from meristem.errors import DataError
from meristem_domains.protein.flat_files import Row, flat_kind, read_flat

PAYLOAD_COLUMNS = (
    "sequence", "seq", "protein_sequence", "protein", "aa_seq", "aa_sequence", "amino_acid_sequence", "primary",
)  # fmt: skip
"""Usual names of the sequence column of a table, lower case."""

COMPRESSION_SUFFIXES = (".gz", ".bgz", ".bz2", ".xz", ".zst")

PIECE_BYTES = BLOCK_BYTES
"""Bytes that are parsed at once: few enough for the cache, and as many as a stream gives without a copy."""

LETTERS = b"ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_DROPPED, _RESIDUE, _FOREIGN = 0, 1, 2
_NEWLINE, _SPACE, _HEADER, _FIRST = b"\n >A"


def _classes(residues: bytes, dropped: bytes) -> bytes:
    table = bytearray([_FOREIGN]) * 256
    for byte in residues:
        table[byte] = _RESIDUE
    for byte in dropped:
        table[byte] = _DROPPED
    return bytes(table)


FASTA_CLASSES = _classes(LETTERS + LETTERS.lower() + b"*-.", b" \t\n")
A3M_CLASSES = _classes(LETTERS + b"*-", LETTERS.lower() + b". \t\n")
"""What each byte of a sequence is. In A3M lower case and `.` are insertions against the first sequence."""


class ProteinReader(Reader):
    """Reads FASTA, A3M, tables, and `flat_files`. A protein is the same in either case of letters."""

    def read(self, source: Source, options: ReadOptions) -> Iterator[pa.RecordBatch]:
        return read(source, options)

    def canonical(self, payload: str | bytes) -> bytes:
        return super().canonical(payload).upper()


def read(source: Source, options: ReadOptions) -> Iterator[pa.RecordBatch]:
    """Read the proteins of a source.

    What a source is, is seen by its content: FASTA begins with `>`, a table with a header line (CSV, TSV) or
    as Parquet, the formats of `flat_files` with a record. Compression is undone. A3M looks like FASTA and is
    known by its name alone: `.a3m`, also before a compression suffix; its insertions are dropped, its gaps stay.

    The id of a FASTA record is the first word of its header, or its number in the file, from 1, where the
    header is empty. Spaces and tabs in sequences are dropped; residues are letters, `*`, `-` and `.`.

    Raises:
        DataError: a file that cannot be read or is none of these, or a refused record when there is no
            `options.on_error`.
    """
    with open_source(source) as stream:
        head = stream.peek(BLOCK_BYTES).removeprefix(BOM)
        if head.lstrip()[:1] == b">" or (is_a3m(source) and head.lstrip()[:1] == b"#"):
            options.require_bare(f"{source.name}:1", "FASTA has none (labels and splits need a table)")
            yield from read_fasta(stream, source, options)
            return
        if kind := flat_kind(head):
            options.require_bare(f"{source.name}:1", f"{kind} files have none (labels and splits need a table)")
            yield from _read_flat(stream, source, options, kind)
            return
        form = table_format(head, (*PAYLOAD_COLUMNS, *options.columns, *options.named_columns))
        if form is None:
            raise DataError(_not_fasta(head, source))
        yield from read_sequence_table(stream, source, options, form)


def is_a3m(source: Source) -> bool:
    """Whether the name says that lower case letters are insertions."""
    stem, suffix = os.path.splitext(source.path.lower())
    return (os.path.splitext(stem)[1] if suffix in COMPRESSION_SUFFIXES else suffix) == ".a3m"


def read_fasta(stream: io.BufferedReader, source: Source, options: ReadOptions) -> Iterator[pa.RecordBatch]:
    """Read the records of a FASTA or A3M file in blocks of about `options.batch_bytes`."""
    held: list[pa.RecordBatch] = []
    num_bytes = 0
    for batch in _pieces(stream, source, options):
        held.append(batch)
        num_bytes += batch.column(INPUT_PREFIX + options.main).nbytes
        if num_bytes >= options.batch_bytes:
            yield pa.concat_batches(held) if len(held) > 1 else batch
            held, num_bytes = [], 0
    if held:
        yield pa.concat_batches(held)


def _pieces(stream: io.BufferedReader, source: Source, options: ReadOptions) -> Iterator[pa.RecordBatch]:
    classes = A3M_CLASSES if is_a3m(source) else FASTA_CLASSES
    line, number = 1, 1
    for text in _whole_records(stream, min(options.batch_bytes, PIECE_BYTES)):
        if text[:1] != b">":
            # only before the first record: blank lines, and the comment that some A3M files begin with
            body = _after_preamble(text)
            line += text[: len(text) - len(body)].count(b"\n")
            if not body:
                continue
            text = body
        batch, num_lines, num_records = _parse(text, classes, source, options, line, number)
        line, number = line + num_lines, number + num_records
        if batch.num_rows:
            yield batch


def _read_flat(stream: io.BufferedReader, source: Source, options: ReadOptions, kind: str) -> Iterator[pa.RecordBatch]:
    """Read a file of one of `flat_files.KINDS` in batches of about `options.batch_bytes`."""
    refuse = lambda line, id, reason: options.refuse(Refusal(source.name, line, id, reason))  # noqa: E731
    held: list[Row] = []
    num_bytes = 0

    def batch() -> Iterator[pa.RecordBatch]:
        ids, sequences, lines = zip(*held)
        payloads = {options.main: pa.array(sequences, pa.large_string())}
        return _usable(batch_of(pa.array(ids), payloads, source.name, lines), source, options)

    for row in read_flat(stream, kind, source.name, min(options.batch_bytes, PIECE_BYTES), refuse):
        held.append(row)
        num_bytes += len(row[1])
        if num_bytes >= options.batch_bytes:
            yield from batch()
            held, num_bytes = [], 0
    if held:
        yield from batch()


def read_sequence_table(
    stream: io.BufferedReader, source: Source, options: ReadOptions, form: TableFormat
) -> Iterator[pa.RecordBatch]:
    """Read the records of a table; sequences are checked as those of a FASTA file are."""
    for batch in read_table(stream, source, options, form, PAYLOAD_COLUMNS):
        yield from _usable(batch, source, options)


def _usable(batch: pa.RecordBatch, source: Source, options: ReadOptions) -> Iterator[pa.RecordBatch]:
    """The rows whose sequences are proteins, if there is one; the others are refused."""
    reasons: dict[int, str] = {}
    for name in options.columns:
        if name not in options.foreign:
            batch = _checked(batch, INPUT_PREFIX + name, reasons)
    lines, ids = batch.column("line"), batch.column("id")
    for row in sorted(reasons):
        options.refuse(Refusal(source.name, lines[row].as_py(), ids[row].as_py(), reasons[row]))
    batch = keep_rows(batch, np.array(sorted(reasons), np.int64))
    if batch.num_rows:
        yield batch


def _checked(batch: pa.RecordBatch, column: str, reasons: dict[int, str]) -> pa.RecordBatch:
    """The batch without white space in a column of sequences; rows that have something else go to `reasons`."""
    payloads = batch.column(column)
    text, bounds = column_bytes(payloads)
    bad = np.zeros(0, np.int64)
    if not _is_plain(text):
        if np.isin(text, (_SPACE, 9, 10, 13)).any():
            payloads = pc.replace_substring_regex(payloads, r"[ \t\r\n]+", "")
            batch = batch.set_column(batch.schema.get_field_index(column), batch.schema.field(column), payloads)
            text, bounds = column_bytes(payloads)
        bad = np.flatnonzero(_kinds(text, FASTA_CLASSES) == _FOREIGN)
    for row in np.flatnonzero(np.diff(bounds) == 0).tolist():
        reasons.setdefault(row, _EMPTY)
    rows, first = np.unique(np.searchsorted(bounds, bad, side="right") - 1, return_index=True)
    for row, at in zip(rows.tolist(), bad[first].tolist()):
        reasons.setdefault(row, _foreign(text[at : at + 4].tobytes()))
    return batch


def _is_plain(text: np.ndarray) -> bool:
    """Whether there are upper case letters alone, which are residues everywhere; three times as fast as a table."""
    return bool((text - _FIRST < len(LETTERS)).all())


def _kinds(text: np.ndarray, classes: bytes) -> np.ndarray:
    return np.frombuffer(bytearray(text).translate(classes), np.uint8)


_EMPTY = "empty record: there are no residues"


def _foreign(at: bytes) -> str:
    character = at.decode("utf-8", "replace")[0]
    return f"{character!r} is no residue (letters, '*', '-' and '.' are)"


def _not_fasta(head: bytes, source: Source) -> str:
    text = head.lstrip()
    line = 1 + head[: len(head) - len(text)].count(b"\n")
    if not text:
        return f"{source.name}:1: there is no record in the file"
    start = text[:20].split(b"\n")[0].rstrip().decode("utf-8", "backslashreplace")
    return (
        f"{source.name}:{line}: not a FASTA file: it must begin with '>', and begins with {start!r} "
        "(nor is it a CSV, TSV or Parquet table, nor GenBank, EMBL, UniProt or FASTQ)"
    )


def _after_preamble(text: bytes) -> bytes:
    while text and text[:1] != b">":
        _, _, text = text.partition(b"\n")
    return text


def _whole_records(stream: io.BufferedReader, block_bytes: int) -> Iterator[bytes]:
    """The text in pieces that end where a record ends; every line of it ends in a newline."""
    held: list[bytes] = []
    for block in read_text_blocks(stream, block_bytes):
        is_boundary = bool(held) and held[-1].endswith(b"\n") and block.startswith(b">")
        cut = block.rfind(b"\n>") + 1
        if cut or is_boundary:
            yield b"".join([*held, memoryview(block)[:cut]])
            held = [block[cut:]]
        else:
            held.append(block)
    last = b"".join(held)
    if last:
        yield last if last.endswith(b"\n") else last + b"\n"


def _parse(
    text: bytes, classes: bytes, source: Source, options: ReadOptions, first_line: int, first_number: int
) -> tuple[pa.RecordBatch, int, int]:
    """Whole records as a batch, with the number of lines and records that they were."""
    raw = np.frombuffer(text, np.uint8)
    newlines = np.flatnonzero(raw == _NEWLINE)
    edges = np.zeros(2 * len(newlines) + 1, np.int64)  # where a line begins, where it ends, where the next begins ...
    edges[1::2] = newlines
    edges[2::2] = newlines + 1
    is_header = raw[edges[:-1:2]] == _HEADER
    header_lines = np.flatnonzero(is_header)
    is_body = np.zeros(len(edges) - 1, bool)
    is_body[::2] = ~is_header
    residues, line_bounds = column_bytes(_kept(text, edges, is_body))
    # lines of residues before each header, so where each record begins in them
    offsets = line_bounds[np.append(header_lines - np.arange(len(header_lines)), len(line_bounds) - 1)]

    reasons: dict[int, tuple[int, str]] = {}  # row: line, reason
    if not _is_plain(residues):
        kinds = _kinds(residues, classes)
        bad = np.flatnonzero(kinds == _FOREIGN)
        rows, first = np.unique(np.searchsorted(offsets, bad, side="right") - 1, return_index=True)
        body_lines = np.flatnonzero(~is_header)
        for row, at in zip(rows.tolist(), bad[first].tolist()):
            line = int(np.searchsorted(line_bounds, at, side="right")) - 1
            rest = residues[at : min(at + 4, line_bounds[line + 1])].tobytes()
            reasons[row] = (int(body_lines[line]), _foreign(rest))
        is_kept = kinds == _RESIDUE
        offsets = offsets - np.searchsorted(np.flatnonzero(~is_kept), offsets)
        residues = residues[is_kept]
    for row in np.flatnonzero(np.diff(offsets) == 0).tolist():
        reasons.setdefault(row, (int(header_lines[row]), _EMPTY))
    headers = _kept(text, np.append(0, edges[2::2]), is_header)
    ids = _ids(headers, first_number, header_lines, reasons)

    for row in sorted(reasons):
        line, reason = reasons[row]
        options.refuse(Refusal(source.name, first_line + line, ids[row].as_py(), reason))
    payloads = pa.Array.from_buffers(pa.large_string(), len(ids), [None, pa.py_buffer(offsets), pa.py_buffer(residues)])
    batch = batch_of(ids, {options.main: payloads}, source.name, first_line + header_lines)
    return keep_rows(batch, np.array(sorted(reasons), np.int64)), len(newlines), len(ids)


def _ids(
    headers: pa.Array, first_number: int, header_lines: np.ndarray, reasons: dict[int, tuple[int, str]]
) -> pa.Array:
    """The first word of every header, or its number; headers that are not UTF-8 go to `reasons`."""
    text, bounds = column_bytes(headers)
    starts = bounds[:-1] + 1
    if (text[starts] <= _SPACE).any():
        letters = np.append(np.flatnonzero(text > _SPACE), len(text))
        starts = np.minimum(letters[np.searchsorted(letters, starts)], bounds[1:] - 1)
    blanks = np.flatnonzero(text <= _SPACE)  # the newline that ends each header is one
    ends = blanks[np.searchsorted(blanks, starts)]
    whole = text.tobytes()
    try:
        whole.decode("utf-8")
        edges = np.stack([starts, ends], axis=1).ravel()
        is_word = np.zeros(len(edges) - 1, bool)
        is_word[::2] = True
        ids = _kept(whole, edges, is_word).cast(pa.string())
    except UnicodeDecodeError:
        words = []
        for row, (start, end) in enumerate(zip(starts.tolist(), ends.tolist())):
            header = whole[bounds[row] : bounds[row + 1]]
            try:
                header.decode("utf-8")
            except UnicodeDecodeError as error:
                found = header[error.start]
                reasons[row] = (int(header_lines[row]), f"not UTF-8: byte 0x{found:02x} in the header")
            words.append(whole[start:end].decode("utf-8", "replace"))
        ids = pa.array(words, pa.string())
    is_bare = starts == ends
    if is_bare.any():
        numbers = pa.array(np.arange(first_number, first_number + len(ids))).cast(pa.string())
        ids = pc.if_else(pa.array(is_bare), numbers, ids)
    return ids


def _kept(text: bytes, edges: np.ndarray, is_kept: np.ndarray) -> pa.Array:
    """Of the pieces of a text between neighbouring edges, those that are kept."""
    buffers = [None, pa.py_buffer(edges), pa.py_buffer(text)]
    pieces = pa.Array.from_buffers(pa.large_binary(), len(edges) - 1, buffers)
    return pieces.filter(pa.array(is_kept))
