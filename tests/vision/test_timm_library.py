"""`meristem import timm:NAME OUT`: an installed timm builds the model, and nothing is downloaded."""

import hashlib
import socket
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
import timm
import torch
from images import redraw_image_model
from safetensors.torch import save_file
from timm.models import save_for_hf

from meristem.cli.main import main
from meristem.errors import ConfigError
from meristem.interop.library import FetchOptions, fetch_model, is_named
from meristem.model_directory import load_model
from meristem_domains.vision.families import timm_library

NAME = "test_vit"
"""The smallest architecture of timm: 371,176 parameters."""


@pytest.fixture(autouse=True)
def _empty_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches of this test alone, and no way to anything outside this machine."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))

    def refuse(*_: object) -> None:
        raise AssertionError("nothing may be downloaded")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def cached(root: Path, rng: np.random.Generator) -> tuple[Path, torch.nn.Module]:
    """A model of random weights in the cache of the hub, where timm would have put its own."""
    repository = timm.get_pretrained_cfg(NAME).hf_hub_id
    folder = root / "hub" / f"models--{repository.replace('/', '--')}"
    revision = hashlib.sha1(repository.encode()).hexdigest()
    (folder / "refs").mkdir(parents=True)
    (folder / "refs/main").write_text(revision)
    file = folder / "snapshots" / revision / "model.safetensors"
    file.parent.mkdir(parents=True)
    model = redraw_image_model(timm.create_model(NAME), rng)
    save_file(model.state_dict(), file)
    return file, model


def run(*arguments: object) -> int:
    return main(["import", *map(str, arguments)])


def test_random_weights_are_said_and_drawn_by_the_seed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        assert run(f"timm:{NAME}", tmp_path / name, "--random-weights", "--seed", seed) == 0
    said = capsys.readouterr().out
    assert f"note: built by timm {timm.__version__} with random weights (seed 3): it has learned nothing" in said
    assert "parity with timm" in said
    card, model = load_model(tmp_path / "a")
    assert "random weights (seed 3)" in card.facts["weights"]
    assert card.facts["imported_from"].endswith(f": {NAME}")
    a, b, c = (load_model(tmp_path / name)[1].state_dict()["trunk.embedding.patches.weight"] for name in "abc")
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert [readout.name for readout in model.readouts] == ["label"]


def test_a_draw_leaves_the_random_state_of_the_process_alone(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    fetch_model(f"timm:{NAME}", tmp_path / "x", FetchOptions(random_weights=True))
    assert torch.equal(torch.get_rng_state(), before)


def test_weights_of_the_cache_are_taken(
    tmp_path: Path, rng: np.random.Generator, capsys: pytest.CaptureFixture[str]
) -> None:
    file, reference = cached(tmp_path, rng)
    assert run(f"timm:{NAME}", tmp_path / "own", "--skip-parity") == 0
    assert f"with the weights of its cache: {file}" in capsys.readouterr().out
    blocks = load_model(tmp_path / "own")[1].state_dict()
    for layer, block in enumerate(reference.blocks):
        assert torch.equal(blocks[f"trunk.blocks.{layer}.attention.qkv.weight"], block.attn.qkv.weight)


def test_weights_in_the_cache_of_torch_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(timm.create_model(NAME).state_dict(), (tmp_path / "a.pth"))
    config = timm.get_pretrained_cfg(NAME)
    config.hf_hub_id, config.url = None, "https://example.org/a-0123.pth?download=1"
    assert timm_library._local_weights(config) is None
    file = tmp_path / "torch/hub/checkpoints/a-0123.pth"
    file.parent.mkdir(parents=True)
    (tmp_path / "a.pth").rename(file)
    assert timm_library._local_weights(config) == file


def test_weights_that_are_not_there_are_not_downloaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(f"timm:{NAME}", tmp_path / "own") == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert "its weights must be on this machine, and nothing is downloaded" in error
    assert "--random-weights" in error
    assert not (tmp_path / "own").exists()


def test_a_library_that_downloads_would_be_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant leaves the weights to timm."""
    monkeypatch.setattr(timm_library, "_local_weights", lambda config: "")
    with pytest.raises(AssertionError, match="nothing may be downloaded"):
        fetch_model(f"timm:{NAME}", tmp_path / "x", FetchOptions())


@pytest.mark.parametrize(
    ("source", "match"),
    [
        ("timm:vit_tny_patch16_224", r"must be a supported vision transformer of timm, one of \d+ such as vit_tiny"),
        ("timm:resnet18", "must be a supported vision transformer"),
        ("timm:test_vit.in7k", "has no such model: Invalid pretrained tag"),
        ("torchvision:vit_b_16", "offers the library of foreign models 'torchvision'; installed: hf, timm"),
        ("hf:bert-base-uncased", "hf must be a library that builds models by name \\(timm\\); give a directory"),
    ],
)
def test_names_that_cannot_be_built_are_refused(source: str, match: str, tmp_path: Path) -> None:
    assert is_named(source)
    with pytest.raises(ConfigError, match=match):
        fetch_model(source, tmp_path / "x", FetchOptions(random_weights=True))


def test_options_of_a_draw_need_a_draw(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_for_hf(timm.create_model(NAME), tmp_path / "plain", safe_serialization=True)
    assert run(tmp_path / "plain", tmp_path / "own", "--random-weights") == 2
    assert "--random-weights needs LIBRARY:MODEL as SOURCE" in capsys.readouterr().err
    assert run(f"timm:{NAME}", tmp_path / "own", "--seed", 3) == 2
    assert "--seed needs --random-weights" in capsys.readouterr().err


def test_a_path_with_a_colon_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_for_hf(timm.create_model(NAME), "timm:mine", safe_serialization=True)
    assert not is_named("timm:mine")
    assert run("timm:mine", "own", "--skip-parity") == 0
