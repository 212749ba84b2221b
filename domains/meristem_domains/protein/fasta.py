"""Reading proteins: FASTA, A3M, tables with a column of sequences, and the formats of `flat_files`.

Letters keep their case. A record with a character that is not a residue is refused by file and line.
"""

import io
import os
import re
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from meristem.data.reading.open import BLOCK_BYTES, BOM, open_source, read_text_blocks
from meristem.data.reading.reader import Reader, gather
from meristem.data.reading.tables import keep_rows, read_table, table_format
from meristem.data.records import INPUT_PREFIX, ReadOptions, Refusal, Source, batch_of
from meristem.errors import DataError
from meristem_domains.protein.flat_files import flat_kind, read_flat

PAYLOAD_COLUMNS = (
    "sequence", "seq", "protein_sequence", "protein", "aa_seq", "aa_sequence", "amino_acid_sequence", "primary",
)  # fmt: skip
"""Column names, in lower case, under which a table usually holds sequences."""

COMPRESSION_SUFFIXES = (".gz", ".bgz", ".bz2", ".xz", ".zst")

RESIDUES = "^[A-Za-z*.-]+$"
"""A sequence in which every character is a residue."""

HEADER = re.compile(rb"^[ \t]*>", re.MULTILINE)
HEADER_RULE = "a header must begin with '>' at the beginning of its line"

FOREIGN = re.compile(rb"[^A-Za-z*. \t-]")
"""A byte of a sequence that is neither a residue nor white space."""


class ProteinReader(Reader):
    """Reads FASTA, A3M, tables, and `flat_files`. Two sequences that differ only in case are the same protein."""

    def read(self, source: Source, options: ReadOptions) -> Iterator[pa.RecordBatch]:
        """Read the proteins of a source.

        The format is recognised by the content: FASTA begins with `>`, or with comments (`;`) before it; a table is
        Parquet or begins with a header line (CSV, TSV), a file of `flat_files` begins with a record. Compressed files
        are decompressed. Only A3M is recognised by the name, which must end in `.a3m` before any compression suffix:
        lower case letters and `.` are insertions there, and are dropped; gaps are kept.

        The id of a FASTA record is the first word of its header. Where the header is empty, it is the number of the
        record in the file, counted from 1. Spaces and tabs in sequences are dropped; residues are letters, `*`, `-`
        and `.`.

        Raises:
            DataError: a file that cannot be read or is none of these, or a refused record when there is no
                `options.on_error`.
        """
        with open_source(source) as stream:
            head = stream.peek(BLOCK_BYTES).removeprefix(BOM)
            if begins_fasta(head, source):
                options.require_bare(f"{source.name}:1", "FASTA has none (labels and splits need a table)")
                pieces, column = _pieces(stream, source, options), INPUT_PREFIX + options.main
                for batches in gather(pieces, lambda batch: batch.column(column).nbytes, options.batch_bytes):
                    yield pa.concat_batches(batches)
                return
            if kind := flat_kind(head):
                options.require_bare(f"{source.name}:1", f"{kind} files have none (labels and splits need a table)")
                found = read_flat(stream, kind, source, options)
                for rows in gather(found, lambda row: len(row[1]), options.batch_bytes):
                    ids, sequences, lines = zip(*rows)
                    payloads = {options.main: pa.array(sequences, pa.large_string())}
                    yield from _usable(batch_of(pa.array(ids), payloads, source.name, lines), source, options)
                return
            form = table_format(head, (*PAYLOAD_COLUMNS, *options.columns, *options.named_columns))
            if form is None:
                raise DataError(_not_fasta(head, source))
            for batch in read_table(stream, source, options, form, PAYLOAD_COLUMNS):
                yield from _usable(batch, source, options)

    def canonical(self, payload: str | bytes) -> bytes:
        return super().canonical(payload).upper()


def is_a3m(source: Source) -> bool:
    """Whether the name says that lower case letters are insertions."""
    stem, suffix = os.path.splitext(source.path.lower())
    return (os.path.splitext(stem)[1] if suffix in COMPRESSION_SUFFIXES else suffix) == ".a3m"


def begins_fasta(head: bytes, source: Source) -> bool:
    """Whether a file begins as FASTA or A3M; comments may stand before the first record."""
    mark = head.lstrip()[:1]
    return mark == b">" or (mark == b"#" and is_a3m(source)) or (mark == b";" and HEADER.search(head) is not None)


def _pieces(stream: io.BufferedReader, source: Source, options: ReadOptions) -> Iterator[pa.RecordBatch]:
    line, number = 1, 1
    for text in _whole_records(stream, min(options.batch_bytes, BLOCK_BYTES)):
        is_refused = False
        while text and text[:1] != b">":
            # only before the first record: blank lines and comments; anything else is a record without a header
            words, _, text = text.partition(b"\n")
            if words.strip() and words.lstrip()[:1] not in b"#;" and not is_refused:
                start = words[:20].decode("utf-8", "backslashreplace")
                options.refuse(Refusal(source.name, line, "", f"{HEADER_RULE}; got {start!r}"))
                is_refused = True
            line += 1
        if text:
            batch, num_records = _parse(text, source, options, line, number)
            line, number = line + text.count(b"\n"), number + num_records
            if batch.num_rows:
                yield batch


def _parse(
    text: bytes, source: Source, options: ReadOptions, first_line: int, first_number: int
) -> tuple[pa.RecordBatch, int]:
    """Whole records as a batch without those that are refused, and how many they were with them."""
    lines = pc.split_pattern(pa.array([text[:-1]], pa.large_binary()), "\n").flatten()
    is_header = pc.starts_with(lines, ">")
    header_lines = np.flatnonzero(is_header)
    headers, bodies = lines.filter(is_header), lines.filter(pc.invert(is_header))
    # lines of residues before each header, so where each record begins in them
    offsets = np.append(header_lines - np.arange(len(headers)), len(bodies))
    parts = pa.LargeListArray.from_arrays(offsets, bodies)
    sequences = pc.binary_join(parts, pa.scalar(b"", bodies.type))
    if is_a3m(source):
        sequences = pc.replace_substring_regex(sequences, "[a-z.]+", "")  # insertions against the first sequence
    sequences, faults = _cleaned(sequences)
    ids, header_faults = _ids(headers, first_number)
    for row, fault in sorted((faults | header_faults).items()):
        line = first_line + int(header_lines[row])
        if row not in header_faults:
            line += next((at for at, body in enumerate(parts[row], 1) if FOREIGN.search(body.as_py())), 0)
        options.refuse(Refusal(source.name, line, ids[row].as_py(), fault))
    batch = batch_of(ids, {options.main: sequences.view(pa.large_string())}, source.name, first_line + header_lines)
    return keep_rows(batch, np.array([*faults, *header_faults], np.int64)), len(headers)


def _ids(headers: pa.Array, first_number: int) -> tuple[pa.Array, dict[int, str]]:
    """The first word of every header, or its number; and what is wrong with headers that are not UTF-8, by row."""
    faults = {}
    ids = pc.extract_regex(headers, rb"^>[\x00-\x20]*(?P<id>[^\x00-\x20]*)").field("id")
    try:
        headers.cast(pa.large_string())
    except pa.ArrowInvalid:
        for row, header in enumerate(headers.to_pylist()):
            try:
                header.decode()
            except UnicodeDecodeError as error:
                faults[row] = f"not UTF-8: byte 0x{header[error.start]:02x} in the header"
        ids = pa.array([id.decode("utf-8", "replace") for id in ids.to_pylist()])
    ids = ids.cast(pa.string())
    numbers = pa.array(np.arange(first_number, first_number + len(ids))).cast(pa.string())
    return pc.if_else(pc.equal(ids, ""), numbers, ids), faults


def _cleaned(sequences: pa.Array) -> tuple[pa.Array, dict[int, str]]:
    """Sequences without white space, and what is wrong with some of them, by row."""
    if pc.all(pc.match_substring_regex(sequences, RESIDUES)).as_py():
        return sequences, {}
    sequences = pc.replace_substring_regex(sequences, r"[ \t\r\n]+", "")
    faults = {}
    for row in np.flatnonzero(pc.invert(pc.match_substring_regex(sequences, RESIDUES))).tolist():
        text = sequences[row].cast(pa.large_binary()).as_py()
        faults[row] = "empty record: there are no residues"
        if found := FOREIGN.search(text):
            character = text[found.start() : found.start() + 4].decode("utf-8", "replace")[0]
            faults[row] = f"{character!r} is no residue (letters, '*', '-' and '.' are)"
            if character == ">":
                faults[row] += f"; {HEADER_RULE}"
    return sequences, faults


def _usable(batch: pa.RecordBatch, source: Source, options: ReadOptions) -> Iterator[pa.RecordBatch]:
    """The rows whose sequences are proteins, without white space, if there is one; the others are refused."""
    faults: dict[int, str] = {}
    for name in options.columns:
        if name not in options.foreign:
            at = batch.schema.get_field_index(INPUT_PREFIX + name)
            payloads, found = _cleaned(batch.column(at))
            batch = batch.set_column(at, batch.schema.field(at), payloads)
            faults = found | faults
    lines, ids = batch.column("line"), batch.column("id")
    for row in sorted(faults):
        options.refuse(Refusal(source.name, lines[row].as_py(), ids[row].as_py(), faults[row]))
    batch = keep_rows(batch, np.array(sorted(faults), np.int64))
    if batch.num_rows:
        yield batch


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
