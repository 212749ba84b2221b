"""Attention over the grid of an image, against a loop over the weights."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from meristem.cli.main import main
from meristem.data.pack import pack
from meristem.data.tokenizer import Tokenizer
from meristem.errors import ConfigError
from meristem.figures.canvas import save_figure
from meristem.model.config import Attention, Embedding, FeedForward, Learned, TransformerConfig
from meristem.model.model import Model
from meristem.model.outputs import Wanted
from meristem.scoring.running import RunningModel
from meristem.types import TokenColumn, Tokens
from meristem_domains.vision.attention import AttentionOptions, attention_maps, draw_attention, map_of
from meristem_domains.vision.patches import PatchTokenizer

sys.path.insert(0, str(Path(__file__).parents[1] / "probing"))  # a domain of pictures that fits in a file
import small_probes
from image_table import write_images


def build(tokens: PatchTokenizer) -> Model:
    config = TransformerConfig(
        width=32,
        num_layers=3,
        embedding=Embedding(vocab_size=max(1, len(tokens.vocab)), patch_features=3 * tokens.patch_px**2),
        position=Learned(max_positions=int(np.prod(tokens.grid)), grid=tokens.grid),
        attention=Attention(num_heads=4),
        feedforward=FeedForward(width=64),
    )
    model = Model(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return model


def maps(model: Model, tokenizer: Tokenizer, column: TokenColumn, **options: Any) -> list[np.ndarray]:
    return list(attention_maps(RunningModel(model, tokenizer), column, AttentionOptions(**options)))


def by_hand(model: Model, tokens: Tokens, grid: tuple[int, int], layer: int, query: str) -> np.ndarray:
    """One cell at a time, by the position that each token says it has."""
    with torch.inference_mode():
        hidden = model.trunk(pack([tokens], [0]), Wanted(attentions=(layer,)))
    [weights] = hidden.attentions[layer]
    patches = [j for j, place in enumerate(tokens.positions) if place[0] >= 0]
    out = np.zeros((len(weights), *grid))
    for head in range(len(weights)):
        for j in patches:
            row, column = tokens.positions[j]
            asked = [0] if query == "class" else patches
            out[head, row, column] = sum(float(weights[head, i, j]) for i in asked) / len(asked)
    return out


@pytest.mark.parametrize("prefix", [("<class>",), ("<class>", "<r1>", "<r2>")])
@pytest.mark.parametrize("query", ["class", "mean"])
@pytest.mark.parametrize("layer", [0, -1])
def test_a_map_is_the_attention_of_the_class_row_or_the_mean_of_patches(
    prefix: tuple[str, ...], query: str, layer: int, rng: np.random.Generator
) -> None:
    tokenizer = PatchTokenizer(image_px=(12, 20), patch_px=4, prefix=prefix)
    model = build(tokenizer)
    images = [tokenizer.encode(rng.random((12, 20, 3), np.float32)) for _ in range(3)]
    for got, tokens in zip(maps(model, tokenizer, _column(images), layer=layer, query=query), images, strict=True):
        assert got.shape == (4, 3, 5)
        # sums of at most 18 weights in fp32
        np.testing.assert_allclose(got, by_hand(model, tokens, (3, 5), layer % 3, query), atol=1e-6)
        assert (got.sum((1, 2)) < 1 + 1e-5).all()  # the rest goes to the special rows


def test_a_model_without_a_class_row_looks_by_the_mean(rng: np.random.Generator) -> None:
    tokenizer = PatchTokenizer(image_px=(8, 8), patch_px=4, prefix=())
    model = build(tokenizer)
    column = _column([tokenizer.encode(rng.random((8, 8, 3), np.float32))])
    np.testing.assert_array_equal(maps(model, tokenizer, column), maps(model, tokenizer, column, query="mean"))
    with pytest.raises(ConfigError, match="needs a class row"):
        maps(model, tokenizer, column, query="class")


def test_maps_of_a_pack_are_those_of_each_image_alone(rng: np.random.Generator) -> None:
    """Also of images of other grids, as those of native resolution are."""
    small = PatchTokenizer(image_px=(8, 12), patch_px=4)
    large = PatchTokenizer(image_px=(12, 20), patch_px=4)
    model = build(large)
    images = [one.encode(rng.random((*one.image_px, 3), np.float32)) for one in (small, large, small)]
    with torch.inference_mode():
        batch = pack(images, [0, 1, 2])
        together = model.trunk(batch, Wanted(attentions=(1,))).attentions[1]
    assert len(together) == 3
    for weights, start, length, record in zip(together, batch.layout.starts, batch.layout.lengths, batch.records):
        got, shape = map_of(weights, batch.positions[start : start + length]), [(2, 3), (3, 5), (2, 3)][record]
        assert got.shape == (4, *shape)
        np.testing.assert_allclose(got, by_hand(model, images[record], shape, 1, "class"), atol=1e-6)


def test_a_grid_read_column_after_column_would_be_seen(rng: np.random.Generator) -> None:
    tokenizer = PatchTokenizer(image_px=(12, 12), patch_px=4)
    model = build(tokenizer)
    tokens = tokenizer.encode(rng.random((12, 12, 3), np.float32))
    [got] = maps(model, tokenizer, _column([tokens]))
    wanted = by_hand(model, tokens, (3, 3), 2, "class")
    np.testing.assert_allclose(got, wanted, atol=1e-6)
    assert abs(got.transpose(0, 2, 1) - wanted).max() > 1e-3


def test_a_layer_that_is_not_there_is_refused(rng: np.random.Generator) -> None:
    tokenizer = PatchTokenizer(image_px=(8, 8), patch_px=4)
    column = _column([tokenizer.encode(rng.random((8, 8, 3), np.float32))])
    for layer in (3, -4):
        with pytest.raises(ConfigError, match=rf"layer of attention must be in 0\.\.2 or -3\.\.-1; got {layer}"):
            maps(build(tokenizer), tokenizer, column, layer=layer)


@pytest.mark.parametrize("num_channels", [1, 3, 5])
def test_a_picture_is_drawn_of_any_channels(num_channels: int, tmp_path: Path, rng: np.random.Generator) -> None:
    image = rng.random((12, 20, num_channels), np.float32) * 2 - 0.5
    save_figure(draw_attention(rng.random((16, 3, 5)), image), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_score_writes_arrays_and_pictures(
    tmp_path: Path, rng: np.random.Generator, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, model = small_probes.save_image_model(tmp_path / "model")
    pictures = [rng.integers(0, 255, (16, 16, 3)).astype(np.uint8) for _ in range(3)]
    table = write_images(tmp_path / "in.parquet", pictures)
    arguments = ["--scorer", "attention", "--layer", "0", "--plots", str(tmp_path / "plots")]
    assert main(["score", str(folder), str(table), *arguments, "--output", str(tmp_path / "a.npz")]) == 0
    assert "attention of block 0 over patches" in capsys.readouterr().out
    found = np.load(tmp_path / "a.npz")
    assert list(found) == ["i0", "i1", "i2"]
    tokenizer = small_probes.image_card().tokenizer
    for got, picture in zip(found.values(), pictures):
        wanted = by_hand(model, tokenizer.encode(picture), (4, 4), 0, "class")
        np.testing.assert_allclose(got, wanted, atol=1e-6)
    assert [path.name for path in sorted((tmp_path / "plots").iterdir())] == [f"0000{i + 1}_i{i}.png" for i in range(3)]


def _column(images: list[Tokens]) -> TokenColumn:
    assert all(image.features is not None for image in images)
    return TokenColumn(
        ids=np.concatenate([image.ids for image in images]),
        offsets=np.cumsum([0, *map(len, images)]),
        features=np.concatenate([image.features for image in images]),  # type: ignore[arg-type]
        positions=np.concatenate([image.positions for image in images]),
    )
