"""Positions of images: sines and cosines in both conventions, and tables brought to other grids as timm does."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from timm.layers import build_sincos2d_pos_embed, resample_abs_pos_embed
from timm.models import create_model

from meristem.data.pack import pack
from meristem.data.tokenizer import AlphabetTokenizer
from meristem.errors import ConfigError
from meristem.model.config import (
    Attention,
    Embedding,
    FeedForward,
    LayerNorm,
    Learned,
    Prefix,
    Rotary,
    SinCos2D,
    TransformerConfig,
)
from meristem.model.grid import resampled, with_grid
from meristem.model.model import Model
from meristem.model.plain import from_json, to_json
from meristem.model.position import build_added, resample_grid
from meristem.model_directory import ModelCard, with_tokenizer_options
from meristem_domains.vision.patches import PatchTokenizer


def grid_positions(rows: int, columns: int) -> torch.Tensor:
    places = torch.from_numpy(np.indices((rows, columns)).reshape(2, -1).T.copy())
    return torch.cat([torch.full((1, 2), -1), places])


def plain_sincos(rows: int, columns: int, width: int, base: float, reaches_base: bool) -> np.ndarray:
    """One number at a time."""
    count = width // 4
    out = np.zeros((1 + rows * columns, width))
    for row in range(rows):
        for column in range(columns):
            for i in range(count):
                omega = base ** -(i / (count - 1 if reaches_base else count))
                values = np.sin(column * omega), np.cos(column * omega), np.sin(row * omega), np.cos(row * omega)
                for part, value in enumerate(values):
                    out[1 + row * columns + column, part * count + i] = value
    return out


@pytest.mark.parametrize("reaches_base", [False, True])
def test_sines_and_cosines_of_both_conventions(reaches_base: bool):
    config = SinCos2D(reaches_base=reaches_base, base=1000.0)
    got = build_added(config, 24)(grid_positions(5, 7)).numpy()
    expected = plain_sincos(5, 7, 24, 1000.0, reaches_base)
    np.testing.assert_allclose(got, expected, atol=1e-5)  # angles up to 7 in fp32
    other = plain_sincos(5, 7, 24, 1000.0, not reaches_base)
    assert np.abs(got - other).max() > 0.1, "the other convention must be seen"
    assert np.abs(got - plain_sincos(7, 5, 24, 1000.0, reaches_base)[: len(got)]).max() > 0.1, "so must another grid"
    assert not got[0].any()


def test_frequencies_of_the_lower_convention_are_timms():
    got = build_added(SinCos2D(), 32)(grid_positions(6, 9))[1:]
    theirs = build_sincos2d_pos_embed([6, 9], 32, interleave_sin_cos=False).unflatten(1, (2, 2, 8))
    # timm has sines before cosines, of rows before columns; angles up to 9 in fp32
    torch.testing.assert_close(got, theirs.flip(2).transpose(1, 2).flatten(1), rtol=0, atol=1e-5)


def test_a_width_that_four_does_not_divide_is_refused():
    with pytest.raises(ConfigError, match="4 divides; got 30"):
        vit(position=SinCos2D(), width=30)


@pytest.mark.parametrize(("old", "new"), [((4, 4), (7, 7)), ((6, 6), (3, 9)), ((5, 8), (8, 5)), ((4, 6), (4, 6))])
def test_a_table_is_resampled_as_timm_does(old: tuple[int, int], new: tuple[int, int], rng: np.random.Generator):
    table = torch.randn(old[0] * old[1], 12)
    expected = resample_abs_pos_embed(table[None], list(new), list(old), num_prefix_tokens=0)[0]
    got = resample_grid(table, old, new)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)  # the same kernel, another layout
    if old != new:
        plain = torch.nn.functional.interpolate(
            table.unflatten(0, old).permute(2, 0, 1)[None], size=new, mode="bicubic"
        )
        assert not torch.allclose(got, plain[0].permute(1, 2, 0).flatten(0, 1), atol=1e-3) or new[0] >= old[0]
    assert resample_grid(table.bfloat16(), old, new).dtype == torch.bfloat16


def vit(**changes: object) -> TransformerConfig:
    values = {
        "width": 32,
        "num_layers": 2,
        "embedding": Embedding(vocab_size=1, patch_features=3 * 64),
        "position": Learned(max_positions=18, offset=2, grid=(4, 4)),
        "attention": Attention(num_heads=2),
        "feedforward": FeedForward(width=48),
        "norm": LayerNorm(eps=1e-6),
        "pool": Prefix(),
    }
    return TransformerConfig(**{**values, **changes})


def test_a_model_for_another_size_reads_its_images_with_the_resampled_table(rng: np.random.Generator):
    card = ModelCard(vit(), PatchTokenizer((32, 32), 8, resize_px=(36, 36)), domain="vision")
    model = card.build().eval()
    torch.nn.init.normal_(model.trunk.embedding.position.table.weight)
    table = model.trunk.embedding.position.table.weight.detach()
    changed, other = with_tokenizer_options(card, model, {"image_px": (24, 48)})
    assert changed.tokenizer.image_px == (24, 48)
    assert changed.architecture.position == Learned(max_positions=2 + 18, offset=2, grid=(3, 6))
    assert from_json(TransformerConfig, to_json(changed.architecture)) == changed.architecture
    got = other.trunk.embedding.position.table.weight
    torch.testing.assert_close(got[:2], table[:2], rtol=0, atol=0)
    torch.testing.assert_close(got[2:], resample_grid(table[2:], (4, 4), (3, 6)), rtol=0, atol=0)
    for name, tensor in model.state_dict().items():
        if "position" not in name:
            torch.testing.assert_close(other.state_dict()[name], tensor, rtol=0, atol=0)
    tokens = changed.tokenizer.encode(rng.integers(0, 256, (50, 60, 3), np.uint8))
    with torch.no_grad():
        assert other.trunk(pack([tokens], [0])).final.shape[1] == 32
    same, _ = with_tokenizer_options(card, model, {"image_px": (32, 32)})
    assert same == card


def test_features_at_another_size_are_timms(rng: np.random.Generator):
    """From an array to features, at a size that the model was not made for."""
    options = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8, "num_classes": 0}
    theirs = create_model("vit_tiny_patch16_224", img_size=32, **options).eval()
    wider = create_model("vit_tiny_patch16_224", img_size=(24, 48), **options).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    state = theirs.state_dict()
    state["pos_embed"] = resample_abs_pos_embed(state["pos_embed"], [3, 6], [4, 4], num_prefix_tokens=1)
    wider.load_state_dict(state)

    config = vit(position=Learned(max_positions=16, grid=(4, 4)), feedforward=FeedForward(width=128))
    card = ModelCard(config, PatchTokenizer((32, 32), 8), domain="vision")
    _, other = with_tokenizer_options(card, _loaded(config, theirs.state_dict()), {"image_px": (24, 48)})
    image = rng.random((24, 48, 3)).astype(np.float32)
    tokens = replace(card.tokenizer, image_px=(24, 48)).encode(image)
    with torch.no_grad():
        got = other.trunk(pack([tokens], [0])).final[: len(tokens)]
        expected = wider.forward_features((torch.from_numpy(image).permute(2, 0, 1)[None] - 0.5) / 0.5)[0]
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)  # two layers of fp32, features of a few units


def _loaded(config: TransformerConfig, theirs: dict[str, torch.Tensor]) -> Model:
    names = {
        "attention_norm": "norm1",
        "attention.qkv": "attn.qkv",
        "attention.out": "attn.proj",
        "feedforward_norm": "norm2",
        "feedforward.up": "mlp.fc1",
        "feedforward.down": "mlp.fc2",
    }
    state = {
        "trunk.embedding.symbols.weight": theirs["cls_token"][0] + theirs["pos_embed"][0, :1],
        "trunk.embedding.position.table.weight": theirs["pos_embed"][0, 1:],
        "trunk.embedding.patches.weight": theirs["patch_embed.proj.weight"].flatten(1),
        "trunk.embedding.patches.bias": theirs["patch_embed.proj.bias"],
    }
    for part in ("weight", "bias"):
        state[f"trunk.final_norm.{part}"] = theirs[f"norm.{part}"]
        for layer in range(config.num_layers):
            for own, their in names.items():
                state[f"trunk.blocks.{layer}.{own}.{part}"] = theirs[f"blocks.{layer}.{their}.{part}"]
    model = Model(config)
    model.load_state_dict(state, strict=True)
    return model.eval()


def test_positions_without_a_table_serve_any_grid():
    for position in (SinCos2D(), Rotary(num_axes=2)):
        config = vit(position=position)
        assert with_grid(config, (3, 6)) is config
        assert with_grid(config, ()) is config
        model = Model(config)
        assert resampled(model.state_dict(), config, config).keys() == model.state_dict().keys()
    with pytest.raises(ConfigError, match="a grid of their own"):
        with_grid(vit(), ())
    residues = ModelCard(vit(), AlphabetTokenizer(("A", "B")), domain="protein")
    with pytest.raises(ConfigError, match=r"tokenizer of protein does not take that: .*'image_px'; its options: nonst"):
        with_tokenizer_options(residues, Model(vit()), {"image_px": (8, 8)})
    with pytest.raises(ConfigError, match="no installed package offers the domain 'elsewhere'"):
        with_tokenizer_options(replace(residues, domain="elsewhere"), Model(vit()), {"nonstandard": "x"})
