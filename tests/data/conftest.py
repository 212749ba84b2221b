"""Fixtures of the data path's tests."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from lines import LinesReader

from meristem.data.records import ReadOptions, Source
from meristem.data.store import RecordStore


@pytest.fixture
def make_store(tmp_path: Path) -> Callable[..., RecordStore]:
    """Builds a store of lists of columns: payloads, then labels; ids are r0, r1, ..."""

    def make(payloads: Sequence[str], *labels: Sequence, **options) -> RecordStore:
        path = tmp_path / f"records{len(list(tmp_path.iterdir()))}.txt"
        with path.open("w") as file:
            for i, (payload, *more) in enumerate(zip(payloads, *labels)):
                file.write("\t".join([f"r{i}", payload, *map(str, more)]) + "\n")
        cache = tmp_path / "cache"
        chosen = ReadOptions(**options)
        return RecordStore.build(LinesReader(), [Source(str(path))], chosen, name="lines", cache_dir=cache)

    return make
