"""What `import meristem` offers does what the verbs do."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from small_models import READOUTS, random_protein, records_with_repeats, write_fasta

import meristem
from meristem.errors import CheckpointError, ConfigError, DataError

MakeModel = Callable[..., Path]


@pytest.mark.parametrize("pool", ["mean", "max", "cls", "none"])
def test_vectors_in_memory_are_those_of_the_file(
    tmp_path: Path, make_model_directory: MakeModel, rng: np.random.Generator, pool: str
) -> None:
    model, records = make_model_directory(), records_with_repeats(rng, 50)
    source = write_fasta(tmp_path / "in.fa", records)
    manifest = meristem.embed(model, source, tmp_path / "out", pool=pool)
    assert manifest["records"] == 50
    found = meristem.read_embeddings(tmp_path / "out")
    vectors = meristem.load(model).embed([sequence for _, sequence in records], pool=pool)
    wanted = np.concatenate(vectors) if pool == "none" else vectors
    assert np.array_equal(np.asarray(found.values), wanted)  # bit for bit, whatever lay together


def test_predictions_come_by_label(make_model_directory: MakeModel, rng: np.random.Generator) -> None:
    sequences = [random_protein(rng) for _ in range(7)]
    found = meristem.load(make_model_directory(readouts=READOUTS)).predict(sequences)
    assert set(found) == {readout.name for readout in READOUTS}
    assert found["place"].values.shape == (7, 3)
    np.testing.assert_allclose(found["place"].values.sum(1), 1, atol=1e-6)
    assert [len(part) for part in found["ss"].split()] == [len(sequence) for sequence in sequences]


def test_wrong_sequences_are_named(make_model_directory: MakeModel) -> None:
    model = meristem.load(make_model_directory())
    with pytest.raises(DataError, match="sequence 1: empty"):
        model.embed(["MKT", ""])
    with pytest.raises(DataError, match="sequence 2: '1'"):
        model.embed(["MKT", "MKV", "MK1"])
    with pytest.raises(ConfigError, match="one string"):
        model.embed("MKT")
    with pytest.raises(ConfigError, match="pool must be one of"):
        model.embed(["MKT"], pool="median")
    assert model.embed([]).shape == (0, 32)


def test_no_model_is_a_checkpoint_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        meristem.load(tmp_path)


def test_importing_the_package_does_not_import_torch() -> None:
    code = "import sys, meristem; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
