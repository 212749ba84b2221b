"""From file to tokens, records move as columns: what Python does by hand does not grow with their number."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import numpy as np
import pyarrow as pa
import pytest

from meristem.data.records import PAYLOAD, ReadOptions, Source
from meristem.inference.chunks import CHUNK_RECORDS, ChunkReader
from meristem.inference.encoding import Reading
from meristem.model_directory import ModelCard, save_model
from meristem.types import INPUT
from meristem_domains.protein import domain
from meristem_domains.protein.presets import PRESETS
from model_runs import specs

FEW, MANY = 20, 900
assert MANY < CHUNK_RECORDS


def write_proteins(path: Path, count: int) -> str:
    path.write_text("".join(f">protein{i} of a kind\nMKVLAA\nTGIV\n" for i in range(count)))
    return str(path)


def num_steps(work: Callable[[], object]) -> int:
    """Instructions of Python that `work` runs, a loop's at each turn; what a library does in one call is one."""
    count = 0

    def on_event(frame: FrameType, event: str, argument: object) -> Callable[..., object]:
        nonlocal count
        frame.f_trace_opcodes = True
        count += event == "opcode"
        return on_event

    before = sys.gettrace()
    sys.settrace(on_event)
    try:
        work()
    finally:
        sys.settrace(before)
    return count


def read_and_encode(path: str) -> list[np.ndarray]:
    tokenizer = domain.tokenizer()
    batches = domain.reader.read(Source(path), ReadOptions())
    return [tokenizer.encode_column(batch.column(PAYLOAD)).ids for batch in batches]


def read_chunks(path: str) -> list[np.ndarray]:
    reading = Reading({INPUT: domain.tokenizer()})
    return [chunk.column.ids for chunk in ChunkReader(domain, reading, [path], ReadOptions())]


@pytest.mark.parametrize("work", [read_and_encode, read_chunks])
def test_python_works_as_much_for_many_records_as_for_few(
    tmp_path: Path, work: Callable[[str], list[np.ndarray]]
) -> None:
    few, many = write_proteins(tmp_path / "few.fa", FEW), write_proteins(tmp_path / "many.fa", MANY)
    for path, count in ((few, FEW), (many, MANY)):
        (ids,) = work(path)
        assert ids.tolist() == domain.tokenizer().encode("MKVLAATGIV").ids.tolist() * count
    assert num_steps(lambda: work(many)) <= num_steps(lambda: work(few)) + (MANY - FEW) // 10


def test_a_loop_over_records_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def looping(batch: pa.RecordBatch) -> pa.RecordBatch:
        rows = [batch.slice(row, 1) for row in range(batch.num_rows)]
        return pa.concat_batches(rows)

    def read(source: Source, options: ReadOptions) -> Iterator[pa.RecordBatch]:
        yield from map(looping, whole(source, options))

    whole = domain.reader.read
    few, many = write_proteins(tmp_path / "few.fa", FEW), write_proteins(tmp_path / "many.fa", MANY)
    monkeypatch.setattr(domain.reader, "read", read)
    assert num_steps(lambda: read_and_encode(many)) > num_steps(lambda: read_and_encode(few)) + MANY - FEW


START = """
import sys
if sys.argv.pop(1) == "filled":
    from meristem.model import init
    init._Unfilled.__torch_function__ = lambda self, func, types, args=(), kwargs=None: func(*args, **(kwargs or {}))
from meristem.cli.main import main
assert main(["embed", *sys.argv[1:]]) == 0
print("torch._dynamo" in sys.modules)
"""


@pytest.mark.parametrize(
    ("way", "is_imported"), [("as it is", False), pytest.param("filled", True, marks=pytest.mark.slow)]
)
def test_embedding_on_a_cpu_starts_without_the_compiler_of_torch(tmp_path: Path, way: str, is_imported: bool) -> None:
    """Its import takes longer than all else that `embed` does for a record; one call in the wrong place draws it in."""
    card = ModelCard(PRESETS["esm2_8m"], domain.tokenizer(), specs(("tokens",)), domain=domain.name)
    save_model(tmp_path / "model", card, card.build())
    source = write_proteins(tmp_path / "in.fa", 1)
    command = [sys.executable, "-c", START, way, str(tmp_path / "model"), source, "--output", str(tmp_path / "out")]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == str(is_imported)
