"""The record store: what goes in comes out, built once, keyed by content, nothing left by a failure."""

import multiprocessing
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from lines import TOKENIZER, LinesReader, random_payloads

import meristem.data.store_writer as store_writer
from meristem.data.records import PAYLOAD, ReadOptions, Source
from meristem.data.store import RecordStore, default_cache_dir
from meristem.errors import DataError


def write(path: Path, *lines: str) -> Source:
    path.write_text("".join(line + "\n" for line in lines))
    return Source(str(path))


def build(sources, cache: Path, options: ReadOptions | None = None, reader=None, **more) -> RecordStore:
    return RecordStore.build(
        reader or LinesReader(), sources, options or ReadOptions(), name="lines", cache_dir=cache, **more
    )


class Never(LinesReader):
    def read(self, source, options):
        raise AssertionError("read again")


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of a few records, so that rows of many chunks are asked for."""
    monkeypatch.setattr(store_writer, "CHUNK_BYTES", 700)


@pytest.mark.usefixtures("small_chunks")
def test_records_come_back_as_they_were_in_any_order(rng, tmp_path, make_store):
    payloads = random_payloads(rng, 200)
    scores = rng.random(200).round(6)
    store = make_store(payloads, scores, label_columns=("score",))
    assert len(store) == 200
    assert len(store.column(PAYLOAD).chunks) > 10
    rows = rng.integers(0, 200, 77)  # with repeats
    assert store.payloads(rows).to_pylist() == [payloads[i] for i in rows]
    assert store.labels("score", rows).to_pylist() == [str(scores[i]) for i in rows]
    records = store.records(rows)
    assert [record.id for record in records] == [f"r{i}" for i in rows]
    assert [record.labels["score"] for record in records] == [str(scores[i]) for i in rows]
    assert records[0].source.endswith(f".txt:{rows[0] + 1}")
    assert store.column(PAYLOAD).to_pylist() == payloads
    assert store.column("score").to_pylist() == list(map(str, scores))
    assert store.label_columns == ("score",)
    assert store[199].payload == payloads[199]
    assert store.payloads(np.zeros(0, int)).to_pylist() == []
    with pytest.raises(IndexError):
        store[200]


@pytest.mark.usefixtures("small_chunks")
def test_token_lengths_are_those_of_the_tokenizer_and_are_kept(rng, make_store, monkeypatch):
    payloads = random_payloads(rng, 50)
    store = make_store(payloads)
    expected = [len(TOKENIZER.encode(payload)) for payload in payloads]
    assert store.token_lengths(TOKENIZER).tolist() == expected
    monkeypatch.setattr(type(TOKENIZER), "encode_column", Never.read)
    assert store.token_lengths(TOKENIZER).tolist() == expected


@pytest.mark.usefixtures("small_chunks")
def test_a_payload_that_the_tokenizer_refuses_is_named_by_file_and_line(rng, make_store):
    payloads = random_payloads(rng, 50)
    payloads[37] = "ACDEF1"
    with pytest.raises(DataError, match=r"records\d\.txt:38: '1' is not in the alphabet .*position 6"):
        make_store(payloads).token_lengths(TOKENIZER)


def test_a_store_is_built_once_and_again_when_anything_that_matters_changes(tmp_path):
    cache = tmp_path / "cache"
    source = write(tmp_path / "a.txt", "x\tMKV\t1", "y\tMKKV\t2")
    first = build([source], cache)
    assert build([source], cache, reader=Never()).path == first.path
    assert build([source], cache, ReadOptions(batch_bytes=7), reader=Never()).path == first.path
    others = {
        build([source], cache, ReadOptions(label_columns=("n",))).path,
        build([source], cache, ReadOptions(on_error=lambda refusal: None)).path,
        build([source, source], cache).path,
        build([Source(shutil.copy(source.path, str(tmp_path / "a.a3m")))], cache).path,
        RecordStore.build(LinesReader(), [source], ReadOptions(), name="other", cache_dir=cache).path,
        build([write(tmp_path / "a.txt", "x\tMKV\t1", "y\tMKKA\t2")], cache).path,
    }
    assert len(others | {first.path}) == 7


def test_the_same_content_under_another_name_is_named_as_the_user_names_it(tmp_path):
    cache = tmp_path / "cache"
    skipped: list = []
    options = ReadOptions(on_error=skipped.append)
    build([write(tmp_path / "old.txt", "x\tMKV", "y\t")], cache, options)
    (tmp_path / "old.txt").rename(tmp_path / "new.txt")
    store = build([Source(str(tmp_path / "new.txt"))], cache, options, reader=Never())
    assert store[0].source == f"{tmp_path}/new.txt:1"
    assert [str(refusal) for refusal in store.refused] == [f"{tmp_path}/new.txt:2: empty record"]
    assert [refusal.file for refusal in skipped] == [f"{tmp_path}/old.txt", f"{tmp_path}/new.txt"]
    again = pickle.loads(pickle.dumps(store))
    assert again[0] == store[0]
    assert len(pickle.dumps(store)) < 1000  # a path, not the records


def test_several_files_make_one_store_whichever_has_labels(tmp_path):
    a = write(tmp_path / "a.txt", "x\tMK\t", "x\tMK\t")
    b = write(tmp_path / "b.txt", "y\tAC\t2", "y\tAC\t3")
    c = write(tmp_path / "c.txt", "z\tGG\t0.5")
    seen: list[tuple[int, int]] = []
    store = build(
        [a, b, c],
        tmp_path / "cache",
        ReadOptions(label_columns=("n",)),
        progress=lambda *now: seen.append(now),
    )
    assert store.column("n").to_pylist() == [None, None, "2", "3", "0.5"]
    assert store.column("n").type == pa.string()
    assert [record.source for record in store.records(np.array([4, 2]))] == [f"{c.path}:1", f"{b.path}:1"]
    assert store[0].labels == {}
    total = sum(os.path.getsize(source.path) for source in (a, b, c))
    assert seen[-1] == (total, total)
    assert all(0 < done <= total for done, _ in seen)
    mixed = write(tmp_path / "d.txt", "w\tGG\ta|b")
    with pytest.raises(DataError, match=r"d\.txt: a column has another type"):
        build([b, mixed], tmp_path / "cache", ReadOptions(label_columns=("n",)))


@pytest.mark.parametrize("damage", ["cut", "empty", "foreign", "without an end"])
def test_a_damaged_store_is_refused_and_rebuilt(tmp_path, damage):
    source = write(tmp_path / "a.txt", "x\tMKV", "y\tMKKV")
    path = build([source], tmp_path / "cache").path
    whole = path.read_bytes()
    if damage == "without an end":
        batch = pa.ipc.open_file(path).get_batch(0)
        with pa.ipc.new_file(path, batch.schema) as writer:
            writer.write_batch(batch)
    else:
        path.write_bytes({"cut": whole[:-40], "empty": b"", "foreign": b"hello" * 100}[damage])
    with pytest.raises(DataError, match="not a complete record store; delete it"):
        RecordStore.open(path, LinesReader())
    assert build([source], tmp_path / "cache").column("id").to_pylist() == ["x", "y"]
    assert path.read_bytes() == whole


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_full_disk_is_one_line_that_names_the_folder_and_nothing_is_left(tmp_path, monkeypatch):
    source = write(tmp_path / "a.txt", "x\tMKV")

    os_file = pa.OSFile
    monkeypatch.setattr(store_writer.pa, "OSFile", lambda path, mode: os_file("/dev/full", mode))
    with pytest.raises(DataError, match="cache: the cache of record stores: no space is left") as caught:
        build([source], tmp_path / "cache")
    assert "\n" not in str(caught.value)
    assert "MERISTEM_CACHE" in str(caught.value)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_read_that_fails_leaves_nothing_behind(tmp_path):
    with pytest.raises(DataError, match=r"a\.txt:2: empty record"):
        build([write(tmp_path / "a.txt", "x\tMKV", "y\t")], tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_sources_that_cannot_be_read_are_refused(tmp_path):
    cache = tmp_path / "cache"
    with pytest.raises(DataError, match=r"none\.fa: no such file"):
        build([Source(str(tmp_path / "none.fa"))], cache)
    with pytest.raises(DataError, match="is a directory; name the files in it"):
        build([Source(str(tmp_path))], cache)
    with pytest.raises(DataError, match="<stdin>: training data is read more than once"):
        build([Source("-")], cache)
    with pytest.raises(DataError, match="at least one source"):
        build([], cache)
    with pytest.raises(DataError, match=r"a\.txt: no records"):
        build([write(tmp_path / "a.txt")], cache)
    with pytest.raises(DataError, match=r"no records; 1 were refused, the first: .*a\.txt:1: empty record"):
        build([write(tmp_path / "a.txt", "x\t")], cache, ReadOptions(on_error=lambda refusal: None))
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="file/cache: the cache of record stores: cannot be written"):
        build([write(tmp_path / "a.txt", "x\tMK")], tmp_path / "file" / "cache")


def _build_in_process(path: Path, cache: Path, results) -> None:
    store = build([Source(str(path))], cache)
    results.put((str(store.path), len(store)))


def test_processes_that_build_the_same_store_at_once_all_get_it(rng, tmp_path):
    source = write(tmp_path / "a.txt", *(f"r\t{payload}" for payload in random_payloads(rng, 300)))
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    arguments = (Path(source.path), tmp_path / "cache", results)
    processes = [context.Process(target=_build_in_process, args=arguments) for _ in range(4)]
    for process in processes:
        process.start()
    found = {results.get(timeout=60) for _ in processes}
    for process in processes:
        process.join()
    assert len(found) == 1
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".arrow"]


def test_what_a_killed_build_left_is_cleared_away(tmp_path):
    source = write(tmp_path / "a.txt", "x\tMKV")
    path = build([source], tmp_path / "cache").path
    path.rename(path.with_name(f"{path.name}.abc.tmp"))
    build([source], tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == [path]


def test_the_cache_folder_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("MERISTEM_CACHE", str(tmp_path / "here"))
    assert default_cache_dir() == tmp_path / "here"
    source = write(tmp_path / "a.txt", "x\tMKV")
    store = RecordStore.build(LinesReader(), [source], ReadOptions(), name="lines")
    assert store.path.parent == tmp_path / "here"
    monkeypatch.delenv("MERISTEM_CACHE")
    assert default_cache_dir() == Path.home() / ".cache" / "meristem"
