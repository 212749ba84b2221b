"""Reading pictures: every kind of source gives the same records, in order, and what is broken is named."""

import gzip
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pictures import as_json, classes, column, encoded, labels, read_all, write_folder, write_tar

from meristem.data.reading.reader import Reader
from meristem.data.records import PAYLOAD, ReadOptions, Refusal, Source
from meristem.data.store import RecordStore
from meristem.errors import DataError
from meristem_domains.vision import domain


def test_a_folder_of_class_folders_is_read_in_the_order_of_its_paths(rng: np.random.Generator, tmp_path: Path):
    contents = classes(rng)
    shuffled = {name: contents[name] for name in rng.permutation(list(contents))}
    write_folder(tmp_path / "pets", shuffled)
    records = read_all(tmp_path / "pets", label_columns=("label",))
    assert [record.id for record in records] == list(contents)
    assert [record.payload for record in records] == list(contents.values())
    assert labels(records) == ["cat"] * 4 + ["dog"] * 4
    assert records[5].source == f"{tmp_path}/pets/dog/001.png"
    assert read_all(f"{tmp_path}/pets/") == read_all(tmp_path / "pets")


def test_a_flat_folder_needs_no_labels_and_has_none(rng: np.random.Generator, tmp_path: Path):
    contents = {"b.png": encoded(rng), "a.JPG": encoded(rng, "JPEG"), "c.tif": encoded(rng, "TIFF")}
    write_folder(tmp_path, contents)
    records = read_all(tmp_path)
    assert [record.id for record in records] == ["a.JPG", "b.png", "c.tif"]
    with pytest.raises(DataError, match="these lie in none"):
        read_all(tmp_path, label_columns=("label",))
    with pytest.raises(DataError, match="no column 'species': a folder has one label, 'label'"):
        read_all(tmp_path, label_columns=("species",))


def test_folders_of_parts_deal_out_the_records(rng: np.random.Generator, tmp_path: Path):
    contents = {f"{part}/{name}": data for part in ("test", "train") for name, data in classes(rng, 2).items()}
    write_folder(tmp_path, contents)
    records = list(
        domain.reader.read(Source(str(tmp_path)), ReadOptions(label_columns=("label",), split_column="split"))
    )
    assert records[0].column("split").to_pylist() == ["test"] * 4 + ["train"] * 4
    assert records[0].column("label:label").to_pylist() == ["cat", "cat", "dog", "dog"] * 2
    tar = write_tar(tmp_path / "all.tar", contents)
    again = list(domain.reader.read(Source(str(tar)), ReadOptions(label_columns=("label",), split_column="split")))
    for name in ("id", PAYLOAD, "split", "label:label"):
        assert again[0].column(name).equals(records[0].column(name))


def test_what_is_no_picture_by_its_ending_and_what_is_hidden_is_left_alone(rng: np.random.Generator, tmp_path: Path):
    contents = classes(rng)
    others = ("Thumbs.db", ".DS_Store", "README", "cat/notes.txt", "cat/._000.png", ".cache/a.png", "__MACOSX/a.png")
    write_folder(tmp_path / "pets", contents | dict.fromkeys(others, b"no picture"))
    assert [record.id for record in read_all(tmp_path / "pets", label_columns=("label",))] == list(contents)
    tar = write_tar(tmp_path / "pets.tar", contents | dict.fromkeys(others, b"no picture"))
    assert [record.id for record in read_all(tar)] == list(contents)
    write_folder(tmp_path / "texts", {"a.txt": b"", "b.md": b""})
    with pytest.raises(DataError, match=r"texts: no picture in the folder \(\.jpg.*; it has 2 other file"):
        read_all(tmp_path / "texts")


def test_links_that_lead_back_are_followed_once(rng: np.random.Generator, tmp_path: Path):
    write_folder(tmp_path, classes(rng))
    (tmp_path / "cat" / "again").symlink_to(tmp_path)
    assert len(read_all(tmp_path)) == 8


@pytest.mark.parametrize("kind", ["csv", "tsv", "parquet"])
def test_a_table_of_paths_is_read_beside_its_pictures(kind: str, rng: np.random.Generator, tmp_path: Path):
    contents = classes(rng)
    write_folder(tmp_path / "photos", contents)
    order = rng.permutation(list(contents)).tolist()
    table = pa.table({"path": [f"photos/{name}" for name in order], "kind": [name[:3] for name in order]})
    path = tmp_path / f"table.{kind}"
    if kind == "parquet":
        pq.write_table(table, path)
    else:
        delimiter = "," if kind == "csv" else "\t"
        lines = [delimiter.join(row) for row in zip(*table.to_pydict().values())]
        path.write_text("\n".join([delimiter.join(table.column_names), *lines]))
    records = read_all(path, label_columns=("kind",))
    assert [record.payload for record in records] == [contents[name] for name in order]
    assert [record.id for record in records] == [f"photos/{name}" for name in order]
    assert labels(records, "kind") == [name[:3] for name in order]
    assert records[2].source == f"{path}:{3 if kind == 'parquet' else 4}"
    # a small batch holds a picture or two
    assert read_all(path, label_columns=("kind",), batch_bytes=900) == records


@pytest.mark.parametrize("is_structure", [False, True])
def test_a_table_of_bytes_is_read(is_structure: bool, rng: np.random.Generator, tmp_path: Path):
    payloads = list(classes(rng).values())
    images = column(payloads)
    if is_structure:  # as `datasets` writes pictures
        images = pa.StructArray.from_arrays([images, pa.array(["x.png"] * 8)], ["bytes", "path"])
    table = pa.table({"image": images, "age": list(range(8)), "id": [f"n{i}" for i in range(8)]})
    pq.write_table(table, tmp_path / "t.parquet")
    records = read_all(tmp_path / "t.parquet", label_columns=("age",))
    assert [record.payload for record in records] == payloads
    assert [record.id for record in records] == table["id"].to_pylist()
    assert labels(records, "age") == list("01234567")
    without = table.drop_columns("id")
    pq.write_table(without, tmp_path / "t.parquet")
    assert [record.id for record in read_all(tmp_path / "t.parquet")] == [str(i) for i in range(1, 9)]


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:xz"])
def test_a_tar_file_gives_the_records_of_its_folder(mode: str, rng: np.random.Generator, tmp_path: Path):
    contents = classes(rng)
    folder = read_all(write_folder(tmp_path / "pets", contents), label_columns=("label",))
    for prefix in ("", "./"):
        named = {f"{prefix}{name}": data for name, data in contents.items()}
        tar = read_all(write_tar(tmp_path / "pets.tar", named, mode), label_columns=("label",))
        for one, other in zip(folder, tar, strict=True):
            assert (one.id, one.payload, one.labels) == (other.id, other.payload, other.labels)
        assert tar[0].source == f"{tmp_path}/pets.tar/cat/000.png"


def test_a_sample_of_a_tar_file_may_be_a_record_of_several_inputs(rng: np.random.Generator, tmp_path: Path):
    """A picture with a text, which another domain reads, and with a second picture."""
    names, contents = ("a", "b", "c"), {}
    for name in names:
        contents |= {f"{name}.txt": f"caf\u00e9 {name}".encode(), f"{name}.jpg": encoded(rng, "JPEG")}
        contents |= {f"{name}.cls": b"3", f"{name}.left.png": encoded(rng)}
    tar = write_tar(tmp_path / "pairs.tar", contents)
    columns = {"picture": "", "caption": "txt", "left": ""}
    records = read_all(tar, columns=columns, foreign=("caption",), label_columns=("label",))
    assert [record.id for record in records] == [f"{name}.jpg" for name in names]
    assert labels(records) == ["3"] * 3
    for name, record in zip(names, records):
        left = contents[f"{name}.left.png"]
        assert record.inputs == {"picture": contents[f"{name}.jpg"], "caption": f"caf\u00e9 {name}", "left": left}
    with pytest.raises(DataError, match=r"pairs\.tar/a\.jpg: there is no member a\.words beside it"):
        read_all(tar, columns={**columns, "caption": "words"}, foreign=("caption",))
    refused: list[Refusal] = []
    contents |= {"a.txt": b"", "b.left.png": b"\x89PNG\r\n\x1a\nno picture"}
    tar = write_tar(tmp_path / "pairs.tar", contents)
    [left] = read_all(tar, columns=columns, foreign=("caption",), on_error=refused.append)
    assert left.id == "c.jpg"
    assert [one.id for one in refused] == ["a.jpg", "b.jpg"]


def test_labels_lie_beside_pictures_in_tar_files(rng: np.random.Generator, tmp_path: Path):
    contents: dict[str, bytes] = {}
    for i in range(6):
        # a label before its picture, and behind it
        beside = {f"{i:04d}.cls": f"{i % 3}\n".encode(), f"{i:04d}.json": as_json(age=i / 2, ok=bool(i % 2))}
        picture = {f"{i:04d}.png": encoded(rng)}
        contents |= beside | picture if i % 2 else picture | beside
    tar = write_tar(tmp_path / "0.tar", contents)
    records = read_all(tar, label_columns=("label", "age", "ok"))
    assert labels(records) == ["0", "1", "2"] * 2
    assert labels(records, "age") == [str(i / 2) for i in range(6)]
    assert labels(records, "ok") == ["false", "true"] * 3
    assert [record.id for record in records] == [f"{i:04d}.png" for i in range(6)]
    assert labels(read_all(tar, label_columns=("cls",)), "cls") == ["0", "1", "2"] * 2
    texts = write_tar(tmp_path / "1.tar", {"a.png": encoded(rng), "a.txt": b"a cat", "b.png": encoded(rng)})
    assert labels(read_all(texts, label_columns=("label",))) == ["a cat", None]
    with pytest.raises(DataError, match=r"0\.tar: no column 'breed': no member of a sample names it"):
        read_all(tar, label_columns=("breed",))


def test_single_pictures_and_standard_input_are_sources(
    rng: np.random.Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    payload = encoded(rng, "WEBP")
    path = tmp_path / "a.webp"
    path.write_bytes(payload)
    [record] = read_all(path)
    assert (record.id, record.payload, record.source) == (str(path), payload, str(path))
    with pytest.raises(DataError, match="no column 'label': a single picture has none"):
        read_all(path, label_columns=("label",))
    for content in (payload, gzip.compress(payload)):
        stdin = io.TextIOWrapper(io.BytesIO(content))
        monkeypatch.setattr(sys, "stdin", stdin)
        [record] = read_all("-")
        assert (record.id, record.payload) == ("<stdin>", payload)


# --- what is broken --------------------------------------------------------------------------------------------


def broken(rng: np.random.Generator) -> dict[str, tuple[bytes, str]]:
    """Broken pictures by name, and what is said of them."""
    return {
        "dog/cut.jpg": (encoded(rng, "JPEG", 60, 60)[:-300], "truncated"),
        "dog/text.png": (b"a text with the ending of a picture\n", "not in a known format"),
        "dog/zero.gif": (b"", "it is empty, 0 bytes"),
    }


def test_broken_pictures_are_named_in_every_kind_of_source(rng: np.random.Generator, tmp_path: Path):
    good = classes(rng)
    for number, (name, (payload, said)) in enumerate(broken(rng).items()):
        place = tmp_path / str(number)
        contents = dict(sorted((good | {name: payload}).items(), key=lambda item: item[0].split("/")))
        folder = write_folder(place / "pets", contents)
        tar = write_tar(place / "pets.tar", contents)
        (place / "pets.csv").write_text("path\n" + "\n".join(f"pets/{key}" for key in contents))
        pq.write_table(pa.table({"image": column(list(contents.values()))}), place / "pets.parquet")
        line = list(contents).index(name)
        # an empty value of a table is an empty record, as everywhere
        empty = r"empty record|0 bytes" if not payload else said
        for source, where, what in (
            (folder, f"{folder}/{name}: ", said),
            (tar, f"{tar}/{name}: ", said),
            (place / "pets.csv", f"{place}/pets.csv:{line + 2}: pets/{name}: ", said),
            (place / "pets.parquet", f"{place}/pets.parquet:{line + 1}: ", empty),
        ):
            with pytest.raises(DataError, match=what) as caught:
                read_all(source)
            assert str(caught.value).startswith(where)
            assert "\n" not in str(caught.value)
            refused: list[Refusal] = []
            records = read_all(source, on_error=refused.append)
            assert [record.payload for record in records] == list(good.values())
            assert [str(one).startswith(where) for one in refused] == [True]


def test_without_a_check_what_can_be_read_is_left_to_the_tokenizer(rng: np.random.Generator, tmp_path: Path):
    folder = write_folder(tmp_path / "pets", classes(rng) | {name: data for name, (data, _) in broken(rng).items()})
    refused: list[Refusal] = []
    records = read_all(folder, on_error=refused.append, is_checking=False)
    assert len(records) == 11
    assert not refused


def test_a_class_folder_without_a_picture_is_refused_where_classes_matter(rng: np.random.Generator, tmp_path: Path):
    folder = write_folder(tmp_path / "pets", classes(rng) | {"owl/readme.txt": b"none yet"})
    with pytest.raises(DataError, match=rf"^{folder}/owl/: a class folder must hold a picture"):
        read_all(folder, label_columns=("label",))
    assert len(read_all(folder)) == 8
    refused: list[Refusal] = []
    assert len(read_all(folder, label_columns=("label",), on_error=refused.append)) == 8
    assert len(refused) == 1


@pytest.mark.parametrize(
    "said",
    [
        "no such file",
        "is a directory",
        "named image or path or file",
        "no column",
    ],
)
def test_tables_that_name_no_picture_are_refused(said: str, rng: np.random.Generator, tmp_path: Path):
    write_folder(tmp_path, classes(rng))
    table = tmp_path / "t.csv"
    cases: dict[str, tuple[str, dict[str, Any]]] = {
        "no such file": ("path,label\ncat/000.png,1\ncat/9.png,1\n", {}),
        "is a directory": ("path,label\ncat/000.png,1\ncat,1\n", {}),
        "named image or path or file": ("name,label\na,1\nb,2\n", {}),
        "no column": ("path,kind\ncat/000.png,1\n", {"label_columns": ("label",)}),
    }
    text, options = cases[said]
    table.write_text(text)
    line = {"no such file": ":3: cat/9.png", "is a directory": ":3: cat"}.get(said, ":1")
    with pytest.raises(DataError, match=rf"(?i){table}{line}: .*{said}"):
        read_all(table, **options)


def test_damaged_tar_files_are_refused(rng: np.random.Generator, tmp_path: Path):
    whole = write_tar(tmp_path / "a.tar", classes(rng)).read_bytes()
    for cut in (*rng.integers(1, whole.rindex(b"dog/003.png"), 20).tolist(), whole.rindex(b"dog/003.png")):
        (tmp_path / "b.tar").write_bytes(whole[:cut])
        with pytest.raises(DataError, match=r"b\.tar: (damaged tar file: .|the file is empty)"):
            read_all(tmp_path / "b.tar")
    (tmp_path / "b.tar").write_bytes(whole + whole)
    with pytest.raises(DataError, match=r"b\.tar: damaged tar file: it goes on behind its end"):
        read_all(tmp_path / "b.tar")
    header = whole.rindex(b"dog/001.png")
    (tmp_path / "b.tar").write_bytes(whole[:header] + b"#" * 100 + whole[header + 100 :])
    with pytest.raises(DataError, match=r"b\.tar: damaged tar file: bad checksum"):
        read_all(tmp_path / "b.tar")
    (tmp_path / "c.tar").write_bytes(b"no tar file at all" * 100)
    with pytest.raises(DataError, match=r"c\.tar: damaged tar file"):
        read_all(tmp_path / "c.tar")
    lonely = write_tar(tmp_path / "d.tar", {"a.png": encoded(rng), "b.cls": b"3"})
    with pytest.raises(DataError, match=r"d\.tar/b\.cls: a label without a picture"):
        read_all(lonely)
    wrong = write_tar(tmp_path / "e.tar", {"a.png": encoded(rng), "a.json": b"{"})
    with pytest.raises(DataError, match=r"e\.tar/a\.png: the labels beside it are no JSON"):
        read_all(wrong, label_columns=("label",))


def test_what_is_no_source_of_pictures_is_refused(tmp_path: Path):
    (tmp_path / "a.fa").write_text(">a\nMKT\n")
    with pytest.raises(DataError, match=r"a\.fa: not a picture, a folder, a table"):
        read_all(tmp_path / "a.fa")
    with pytest.raises(DataError, match="no such file"):
        read_all(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty: no picture in the folder"):
        read_all(tmp_path / "empty")


# --- stores ----------------------------------------------------------------------------------------------------


def build(path: Path, cache: Path, **options: Any) -> RecordStore:
    source = Source(str(path))
    return RecordStore.build(domain.reader, [source], ReadOptions(**options), name="vision", cache_dir=cache)


def test_a_store_of_a_folder_is_built_once_and_anew_when_a_picture_changes(rng: np.random.Generator, tmp_path: Path):
    folder = write_folder(tmp_path / "pets", classes(rng))
    (tmp_path / "pets.csv").write_text("path\n" + "\n".join(f"pets/{key}" for key in classes(rng)))
    for source in (folder, tmp_path / "pets.csv"):
        stores = [build(source, tmp_path / "cache") for _ in range(2)]
        assert stores[0].path == stores[1].path
        assert len(stores[1]) == 8
        new = encoded(rng, height=20)
        (folder / "cat/001.png").write_bytes(new)
        changed = build(source, tmp_path / "cache")
        assert changed.path != stores[0].path
        assert changed[1].payload == new
        if source == folder:
            assert changed.where(1) == f"{folder}/cat/001.png"
            moved = folder.rename(tmp_path / "moved")
            again = build(moved, tmp_path / "cache")
            assert again.path == changed.path
            assert again.where(1) == f"{moved}/cat/001.png", "messages name the folder as it is now"
            folder = moved.rename(folder)
            write_folder(folder, {"owl/1.png": encoded(rng)})
            assert len(build(folder, tmp_path / "cache")) == 9


def test_pictures_that_differ_in_the_case_of_a_byte_are_two(rng: np.random.Generator, tmp_path: Path):
    payload = encoded(rng)
    for name, byte in (("a", b"x"), ("b", b"X")):
        write_folder(tmp_path / "two", {f"{name}.png": payload + byte})
    hashes = build(tmp_path / "two", tmp_path / "cache").payload_hashes(0)
    assert hashes[0] != hashes[1]


class SingleFiles(Reader):
    """Of a domain whose sources are files, never folders."""

    def read(self, source: Source, options: ReadOptions) -> Iterator[pa.RecordBatch]:
        yield from domain.reader.read(source, options)


def test_a_store_needs_the_domain_to_know_folders(rng: np.random.Generator, tmp_path: Path):
    folder = write_folder(tmp_path / "pets", classes(rng))
    with pytest.raises(DataError, match="pets: is a directory; name the files in it"):
        RecordStore.build(
            SingleFiles(), [Source(str(folder))], ReadOptions(), name="other", cache_dir=tmp_path / "cache"
        )


def test_records_that_the_tokenizer_refuses_are_named_and_have_no_length(rng: np.random.Generator, tmp_path: Path):
    contents = classes(rng) | {"cat/small.png": encoded(rng, height=3), "dog/tiny.png": encoded(rng, width=2)}
    store = build(write_folder(tmp_path / "pets", contents), tmp_path / "cache")
    tokenizer = domain.tokenizer(image_px=None, patch_px=4)
    for _ in range(2):  # computed, then read from where they are kept
        refused: list[Refusal] = []
        lengths = store.token_lengths(tokenizer, on_error=refused.append)
        assert [one.id for one in refused] == ["cat/small.png", "dog/tiny.png"]
        assert np.flatnonzero(lengths < 0).tolist() == [4, 9]
        assert set(lengths[lengths > 0]) == {1 + 3 * 4}
        with pytest.raises(DataError, match=r"pets/cat/small\.png: an image must be a patch or more .* got 3 x 16"):
            store.token_lengths(tokenizer)
        assert (store.token_lengths(tokenizer, np.array([0, 5])) > 0).all()
