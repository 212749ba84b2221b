"""What `import meristem` offers."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import meristem
from meristem.errors import CheckpointError, ConfigError, DataError
from meristem.model.config import Attention, Embedding, FeedForward, TransformerConfig
from meristem.model.heads import Readout
from meristem.model_directory import ModelCard, save_model
from meristem_domains.protein import domain
from model_runs import specs


@pytest.fixture
def model_directory(tmp_path: Path, rng: np.random.Generator) -> Path:
    config = TransformerConfig(
        width=32,
        num_layers=2,
        embedding=Embedding(vocab_size=33, mask_id=32, mask_dropout_frac=0.12),
        attention=Attention(num_heads=4),
        feedforward=FeedForward(width=64),
    )
    readouts = (Readout(name="place", classes=("in", "out")), Readout(name="ss", level="token", classes=tuple("HEC")))
    card = ModelCard(config, domain.tokenizer(), specs((), readouts), domain="protein")
    save_model(tmp_path / "model", card, card.build())
    return tmp_path / "model"


@pytest.fixture
def sequences(rng: np.random.Generator) -> list[str]:
    return ["".join(rng.choice(list("LAGVSERTIDPKQNFYMHWC"), int(n))) for n in rng.integers(1, 60, 30)]


def test_the_surface_is_small_and_pinned() -> None:
    classes = ["DataSpec", "Embeddings", "LoadedModel", "ModelSpec", "RunSpec", "TrainerSpec"]
    functions = ["embed", "fit", "generate", "load", "read_embeddings", "test", "validate"]
    assert meristem.__all__ == [*classes, *functions]
    assert all(hasattr(meristem, name) for name in meristem.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = meristem.nonsense


def test_importing_meristem_imports_no_torch() -> None:
    script = "import sys, meristem; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_sequences_in_memory_and_in_a_file_get_the_same_vectors(
    tmp_path: Path, model_directory: Path, sequences: list[str]
) -> None:
    source = tmp_path / "in.fa"
    source.write_text("".join(f">{i}\n{text}\n" for i, text in enumerate(sequences)))
    model = meristem.load(model_directory, device="cpu")
    manifest = meristem.embed(model_directory, source, tmp_path / "out", precision="fp32", pool="max")
    assert manifest["records"] == len(sequences)
    got = meristem.read_embeddings(tmp_path / "out").values
    assert np.array_equal(got, model.embed(iter(sequences), pool="max"))
    tokens = model.embed(sequences, pool="none", layer=1)
    assert [vectors.shape for vectors in tokens] == [(len(text), 32) for text in sequences]
    assert model.embed([]).shape == (0, 32)
    assert model.embed([], pool="none") == []


def test_predictions_have_the_names_of_their_labels(model_directory: Path, sequences: list[str]) -> None:
    found = meristem.load(model_directory).predict(sequences)
    assert set(found) == {"place", "ss"}
    assert found["place"].values.shape == (len(sequences), 2)
    assert set(found["place"].classes) <= {"in", "out"}
    assert [len(rows) for rows in found["ss"].split()] == [len(text) for text in sequences]
    # probabilities in single precision
    assert np.abs(found["ss"].values.sum(1) - 1).max() < 1e-6


def test_bf16_does_not_change_the_model(model_directory: Path, sequences: list[str]) -> None:
    model = meristem.load(model_directory, device="cpu")
    before = model.embed(sequences)
    rough = model.embed(sequences, precision="bf16")
    assert not np.array_equal(rough, before)
    assert np.array_equal(model.embed(sequences), before)


@pytest.mark.parametrize(
    ("call", "error", "reason"),
    [
        (lambda model: model.embed(["MKT", "MK1"]), DataError, "sequence 1: '1'"),
        (lambda model: model.embed(["MKT", ""]), DataError, "sequence 1: empty"),
        (lambda model: model.embed("MKT"), ConfigError, "put it in a list"),
        (lambda model: model.embed(["MKT"], pool="median"), ConfigError, "pool must be one of"),
        (lambda model: model.embed(["MKT"], layer=9), ConfigError, "layer must be in"),
        (lambda model: model.embed(["MKT"], precision="fp8"), ConfigError, "precision must be one of"),
    ],
)
def test_what_cannot_work_says_so(
    model_directory: Path, call: Callable[[meristem.LoadedModel], object], error: type[Exception], reason: str
) -> None:
    with pytest.raises(error, match=reason):
        call(meristem.load(model_directory))


def test_a_result_that_is_not_finite_names_its_sequence(model_directory: Path) -> None:
    model = meristem.load(model_directory)
    with torch.no_grad():
        model.model.trunk.embedding.symbols.weight[23] = torch.nan  # C
    assert np.isfinite(model.embed(["MKT"])).all()
    with pytest.raises(DataError, match="sequence 2: the result is not finite"):
        model.embed(["MKT", "MKV", "MCK"])


def test_an_unknown_option_of_embed_is_an_error(tmp_path: Path, model_directory: Path) -> None:
    with pytest.raises(ConfigError, match="pooling"):
        meristem.embed(model_directory, "in.fa", tmp_path / "out", pooling="mean")
    with pytest.raises(ConfigError, match="on_error"):
        meristem.embed(model_directory, "in.fa", tmp_path / "out", on_error="ignore")


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="must be the directory of a run"):
        meristem.load(tmp_path)
