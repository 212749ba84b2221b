"""Files are written as a whole or not at all."""

import errno
import os
import stat
import threading

import pytest

from meristem.errors import CheckpointError, DataError
from meristem.files import TEMPORARY, read_json, replacing, replacing_folder, write_file, write_json


def test_a_file_is_replaced_only_when_the_block_ends_well(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")

    def fail() -> None:
        with replacing(path) as temporary:
            temporary.write_bytes(b"half")
            assert path.read_bytes() == b"old"
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert [item.name for item in tmp_path.iterdir()] == ["a.bin"]
    with replacing(path) as temporary:
        temporary.write_bytes(b"new")
    assert path.read_bytes() == b"new"
    assert [item.name for item in tmp_path.iterdir()] == ["a.bin"]


@pytest.mark.parametrize("was_there", [True, False])
def test_a_folder_is_replaced_only_when_the_block_ends_well(tmp_path, was_there):
    path = tmp_path / "above" / "folder"
    if was_there:
        path.mkdir(parents=True)
        (path / "old").write_bytes(b"old")

    def fail() -> None:
        with replacing_folder(path) as temporary:
            (temporary / "half").write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert [item.name for item in path.parent.rglob("*")] == (["folder", "old"] if was_there else [])
    (path.parent / "folder.part").mkdir()  # as a killed writer leaves it
    (path.parent / "folder.part/rest").write_bytes(b"rest")
    old = os.umask(0o027)
    try:
        with replacing_folder(path) as temporary:
            (temporary / "new").write_bytes(b"new")
            (temporary / "new").chmod(0o600)
    finally:
        os.umask(old)
    assert [item.name for item in path.parent.rglob("*")] == ["folder", "new"]
    assert stat.S_IMODE((path / "new").stat().st_mode) == 0o640


def test_two_writers_of_one_file_do_not_share_a_temporary_one(tmp_path):
    path = tmp_path / "a.bin"
    with replacing(path) as one, replacing(path) as other:
        assert one != other
        assert all(name.endswith(TEMPORARY) for name in (one.name, other.name))
        one.write_bytes(b"one")
        other.write_bytes(b"other")


def test_many_writers_leave_one_whole_file(tmp_path, rng):
    path = tmp_path / "a.bin"
    contents = [rng.bytes(int(rng.integers(1, 200_000))) for _ in range(8)]
    threads = [threading.Thread(target=write_file, args=(path, content)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_bytes() in contents
    assert list(tmp_path.iterdir()) == [path]


def test_a_new_file_has_the_rights_that_the_user_gives_to_new_files(tmp_path):
    old = os.umask(0o027)
    try:
        write_file(tmp_path / "a", b"")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with pytest.raises(OSError, match="No space left"), replacing(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_content_is_on_the_disk_before_the_name_is(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (events.append("sync"), fsync(handle))[1])
    monkeypatch.setattr(os, "replace", lambda *names: (events.append("rename"), replace(*names))[1])
    write_file(tmp_path / "a", b"x")
    assert events == ["sync", "rename", "sync"]


def test_json_that_is_no_object_is_refused_by_the_name_of_its_file(tmp_path):
    path = tmp_path / "a.json"
    with pytest.raises(CheckpointError, match=r"a\.json: no such file"):
        read_json(path, CheckpointError)
    for text in ("", "{", "[1]", "3", "\x00", '{"a": NaN'):
        path.write_text(text)
        with pytest.raises(DataError, match=r"a\.json must be"):
            read_json(path)
    path.write_bytes(b"\xff\xfe{}")
    with pytest.raises(DataError, match=r"a\.json must be JSON"):
        read_json(path)


def test_what_is_written_as_json_is_read_again(tmp_path):
    values = {"a": [1, 2.5, None], "\u00e9": {"b": True}}
    write_json(tmp_path / "new" / "a.json", values)
    assert read_json(tmp_path / "new" / "a.json") == values
