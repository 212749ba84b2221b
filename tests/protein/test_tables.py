"""Tables give the columns asked for, by their content's format, with the lines of the user's file."""

import gzip
import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from meristem.data.reading.tables import table_format
from meristem.data.records import PAYLOAD, SCHEMA, ReadOptions, Refusal, Source
from meristem.errors import DataError, DataWarning
from meristem.types import INPUT
from meristem_domains.protein.fasta import PAYLOAD_COLUMNS, ProteinReader

read = ProteinReader().read


def table_of(path: Path | str, **options: object) -> pa.Table:
    return pa.Table.from_batches(list(read(Source(str(path)), ReadOptions(**options))))  # type: ignore[arg-type]


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


CSV = "id,sequence,score,n,kind,part\na,MKV,0.5,1,x,train\nb,mkl*,,2,NA,test\nc,NA,-1e3,,y,\n"


def parquet_of(text: str) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pyarrow.csv.read_csv(io.BytesIO(text.encode()), convert_options=AS_WRITTEN), sink)
    return sink.getvalue()


AS_WRITTEN = pyarrow.csv.ConvertOptions(
    column_types={"sequence": pa.string(), "kind": pa.string(), "part": pa.string()}, null_values=["", "-"]
)


@pytest.mark.parametrize(
    "data",
    [
        CSV.encode(),
        CSV.replace(",", "\t").encode(),
        CSV.replace(",", ";").encode(),
        CSV.replace("\n", "\r\n").encode(),
        b"\xef\xbb\xbf" + CSV.encode(),
        gzip.compress(CSV.encode()),
        parquet_of(CSV),
        gzip.compress(parquet_of(CSV)),
    ],
    ids=["csv", "tsv", "semicolons", "crlf", "bom", "gzip", "parquet", "gzipped parquet"],
)
def test_each_format_gives_the_same_columns_with_labels_as_text(tmp_path: Path, data: bytes) -> None:
    path = write(tmp_path / "data.bin", data)
    table = table_of(path, label_columns=("score", "n", "kind"), split_column="part")
    assert table.schema.names == [*SCHEMA.names, PAYLOAD, "split", "label:score", "label:n", "label:kind"]
    assert table.schema.field(PAYLOAD).type == pa.large_string()
    assert {str(table.schema.field(f"label:{name}").type) for name in ("score", "n", "kind")} == {"string"}
    columns = table.to_pydict()
    assert columns["id"] == ["a", "b", "c"]
    assert columns[PAYLOAD] == ["MKV", "mkl*", "NA"]  # asparagine and alanine, no missing value
    is_parquet = b"PAR1" in (data, gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data)[1]
    assert columns["label:score"] == ["0.5", None, "-1000" if is_parquet else "-1e3"]  # Parquet has a number
    assert columns["label:n"] == ["1", "2", None]
    assert columns["label:kind"] == ["x", "NA", "y"]
    assert columns["split"][:2] == ["train", "test"]
    assert columns["line"] == ([1, 2, 3] if is_parquet else [2, 3, 4])


def test_lines_are_those_of_the_file_whatever_stands_between(tmp_path: Path, rng: np.random.Generator) -> None:
    lines = ["", "id,note,seq"]
    expected = []
    for i in range(3000):
        lines += [""] * int(rng.integers(0, 2))
        expected.append(len(lines) + 1)
        note = rng.choice(["plain", '"quoted, comma"', '"two\nlines"', '"a ""word"" ,\n\n"', '""'])
        lines += f"r{i},{note},{'MKV' * int(rng.integers(1, 300))}".split("\n")
    path = write(tmp_path / "x.csv", "\n".join(lines))
    table = table_of(path, batch_bytes=1000)
    assert table.column("line").to_pylist() == expected
    assert table.column("id").to_pylist() == [f"r{i}" for i in range(3000)]
    assert len(table.column("line").chunks) > 1


def test_bad_rows_are_refused_by_file_and_line_and_the_rest_comes(tmp_path: Path) -> None:
    text = b'id,seq,x\na,MKV,1\n\nb,MK7,2\nc,,3\nd,MKV\ne,"M\nK",4\nf,M\xffK,5\n\xfe,MKV,6\n'
    text += b"g,MKV,7,8\n,MKL,9\nh,M-.*,10\n"
    path = write(tmp_path / "x.csv", text)
    refused: list[Refusal] = []
    table = table_of(path, on_error=refused.append)
    assert table.column("id").to_pylist() == ["a", "e", "9", "h"]
    assert table.column(PAYLOAD).to_pylist() == ["MKV", "MK", "MKL", "M-.*"]
    assert table.column("line").to_pylist() == [2, 7, 12, 13]
    reasons = {
        4: "'7' is no residue",
        5: "empty record",
        6: "the row has 2 values and the header 3",
        9: "not UTF-8: byte 0xff in column 'seq'",
        10: "not UTF-8: byte 0xfe in column 'id'",
        11: "the row has 4 values and the header 3",
    }
    assert sorted(refusal.line for refusal in refused) == sorted(reasons)
    assert all(reasons[refusal.line] in refusal.reason for refusal in refused)


@pytest.mark.parametrize("row", ["b,MK7", "b,", "b,MKV,1", "b"])
def test_a_bad_row_is_an_error_with_its_line(tmp_path: Path, row: str) -> None:
    path = write(tmp_path / "x.csv", f"id,seq\na,MKV\n\n{row}\nc,MKV\n")
    with pytest.raises(DataError, match=r"^[^\n]*x\.csv:4: [^\n]*$"):
        table_of(path)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"label_columns": ("score",)}, "'score'"),
        ({"columns": {INPUT: "Sequence"}}, "'Sequence'"),
        ({"id_column": "acc"}, "'acc'"),
        ({"split_column": "fold"}, "'fold'"),
        ({"label_columns": ("twice",)}, "more than one column 'twice'"),
    ],
)
@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_missing_column_is_named_with_those_there_are(tmp_path: Path, options: dict, name: str, kind: str) -> None:
    header = "name,seq,twice,twice"
    if kind == "csv":
        path = write(tmp_path / "x.csv", header + "\na,MKV,1,2\n")
    else:
        path = tmp_path / "x.parquet"
        pq.write_table(pa.table([["a"], ["MKV"], [1], [2]], names=header.split(",")), path)
    with pytest.raises(DataError, match=name) as caught:
        table_of(path, **options)
    assert "columns: name, seq, twice, twice" in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_table_without_sequences_lists_its_columns(tmp_path: Path) -> None:
    path = write(tmp_path / "x.csv", "name,residues\na,MKV\n")
    with pytest.raises(DataError, match=r"x\.csv:1: .* the input 'input', named seq.*columns: name, residues"):
        table_of(path)
    assert table_of(path, columns={INPUT: "residues"}).column("id").to_pylist() == ["1"]


def test_the_usual_names_are_found_in_any_case_and_order(tmp_path: Path) -> None:
    path = write(tmp_path / "x.csv", "Seq,Protein_Sequence,SEQUENCE\nA,C,M\n")
    assert table_of(path).column(PAYLOAD).to_pylist() == ["M"]
    assert table_of(write(path, "sequence\nMKV\nMKL\n")).column("id").to_pylist() == ["1", "2"]


@pytest.mark.parametrize("late", ["0.5", "high", "03", "99999999999999999999"])
def test_a_late_word_changes_no_label_before_it_from_a_file_or_a_pipe(
    tmp_path: Path, late: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = "".join(f"{'MKVLLAARNDCQEGHILKMF' * 20},{i % 2}\n" for i in range(6000))
    text = f"seq,y\n{rows}MKV,{late}\n"
    path = write(tmp_path / "x.csv", text)

    class Stdin:
        closed = False
        buffer = io.BufferedReader(io.BytesIO(text.encode()))  # type: ignore[arg-type]

    monkeypatch.setattr("sys.stdin", Stdin)
    for source in (str(path), "-"):
        batches = list(read(Source(source), ReadOptions(label_columns=("y",), batch_bytes=1 << 20)))
        assert len(batches) > 1
        found = [label for batch in batches for label in batch.column("label:y").to_pylist()]
        assert found == [*(str(i % 2) for i in range(6000)), late]


def test_a_column_without_any_label_is_all_missing(tmp_path: Path) -> None:
    table = table_of(write(tmp_path / "x.csv", "seq,y\nMKV,\nMKL,\n"), label_columns=("y",))
    assert table.column("label:y").to_pylist() == [None, None]
    assert table.schema.field("label:y").type == pa.string()


def test_truncated_tables_are_refused(tmp_path: Path) -> None:
    rows = "".join(f"r{i},MKV{'L' * (i % 91)}\n" for i in range(20_000))
    packed = gzip.compress(f"id,seq\n{rows}".encode())
    with pytest.raises(DataError, match=r"x\.csv\.gz: gzip data ends too early"):
        table_of(write(tmp_path / "x.csv.gz", packed[: len(packed) // 2]), on_error=lambda _: None)
    with pytest.raises(DataError, match=r"x\.parquet: damaged Parquet file"):
        table_of(write(tmp_path / "x.parquet", parquet_of(CSV)[:-20]), on_error=lambda _: None)


def test_a_parquet_column_of_numbers_is_no_payload(tmp_path: Path) -> None:
    pq.write_table(pa.table({"sequence": pa.array([[1, 2]])}), tmp_path / "x.parquet")
    with pytest.raises(DataError, match=r"x\.parquet: column 'sequence' must hold text"):
        table_of(tmp_path / "x.parquet")


@pytest.mark.parametrize(
    "head",
    [b'{"a": 1, "b": [2, 3]}\n', b"MKVLLA\n", b"\x00,\x01\n", b"<html>,<body>\n", b"@r,1\n", b"", b"\xff,\xfe\n"],
)
def test_what_is_no_table_is_not_taken_for_one(head: bytes) -> None:
    assert table_format(head, PAYLOAD_COLUMNS) is None


@pytest.mark.shared
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("dms_beta_lactamase_P62593.csv", {"id_column": "mutant", "label_columns": ("score",)}),
        ("antimicrobial_amp_train.csv", {"label_columns": ("label",)}),
        ("secondary_structure_ss8_train.csv", {"label_columns": ("ss8",)}),
        (
            "localization_deeploc_train.csv",
            {"id_column": "accession", "label_columns": ("location", "membrane")},
        ),
        ("enzyme_class_archaea_swissprot.csv", {"id_column": "accession", "label_columns": ("ec_top",)}),
    ],
)
def test_real_tables_are_read_as_the_csv_module_reads_them(shared_data: Path, name: str, options: dict) -> None:
    import csv

    path = shared_data / "protein" / name
    table = table_of(path, **options)
    with path.open(newline="") as handle:
        rows = list(csv.DictReader(handle))
    assert table.column(PAYLOAD).to_pylist() == [row["sequence"] for row in rows]
    assert table.column("line").to_pylist() == list(range(2, len(rows) + 2))
    for label in options["label_columns"]:
        assert table.column(f"label:{label}").to_pylist() == [row[label] or None for row in rows]


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="open files are listed on Linux only")
@pytest.mark.parametrize("name", ["x.csv", "x.csv.gz", "x.fa"])
def test_a_reader_that_is_left_early_closes_its_file(tmp_path: Path, name: str) -> None:
    rows = "".join(f">r{i}\n{'MKV' * 40}\n" if name == "x.fa" else f"r{i},{'MKV' * 40}\n" for i in range(40_000))
    data = (rows if name == "x.fa" else f"id,seq\n{rows}").encode()
    path = write(tmp_path / name, gzip.compress(data, 1) if name.endswith("gz") else data)
    for _ in range(5):
        batches = read(Source(str(path)), ReadOptions(batch_bytes=1 << 20))
        assert next(batches).num_rows > 1000
        batches.close()  # type: ignore[attr-defined]
    open_files = [link.readlink() for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    assert path not in open_files


@pytest.mark.parametrize("name", ["ID", "Entry", "accession", "mutant", "Id", "ACCESSION"])
@pytest.mark.parametrize("kind", ["csv", "tsv", "parquet"])
def test_a_column_with_a_usual_name_gives_the_ids_and_a_note_says_so(tmp_path: Path, name: str, kind: str) -> None:
    text = f"note,{name},sequence\nn,a,MKV\nn,b,MKL\n"
    path = write(
        tmp_path / "x", parquet_of(text) if kind == "parquet" else text.replace(",", "\t" if kind == "tsv" else ",")
    )
    with pytest.warns(DataWarning, match=f"x.*ids are those of column '{name}'"):
        assert table_of(path).column("id").to_pylist() == ["a", "b"]
    assert table_of(path, id_column="note").column("id").to_pylist() == ["n", "n"]
    # what serves for something else is no id
    assert table_of(path, label_columns=(name,)).column("id").to_pylist() == ["1", "2"]
    assert table_of(path, columns={INPUT: name}).column("id").to_pylist() == ["1", "2"]


def test_of_several_usual_names_id_comes_first_without_a_note(tmp_path: Path) -> None:
    path = write(tmp_path / "x", "mutant,Entry,id,sequence\nm,e,i,MKV\n")
    assert table_of(path).column("id").to_pylist() == ["i"]
    path = write(tmp_path / "x", "mutant,Entry,sequence\nm,e,MKV\n")
    with pytest.warns(DataWarning, match="'Entry'"):
        assert table_of(path).column("id").to_pylist() == ["e"]
