"""Masked patches: what the trunk sees, and a loss equal to another implementation's of the same weights and masks."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from labelled import ready
from meristem.data.pack import pack
from meristem.data.parts import RunData
from meristem.data.tokenizer import AlphabetTokenizer
from meristem.errors import ConfigError
from meristem.model.config import (
    Attention,
    Embedding,
    Experts,
    FeedForward,
    LayerNorm,
    Learned,
    Rotary,
    SinCos2D,
    TransformerConfig,
)
from meristem.model.model import Model
from meristem.types import IGNORE, SOURCE, PackedBatch, Record
from meristem_domains.vision.objectives.masked_patches import DECODER, PIXELS, MaskedPatches
from meristem_domains.vision.patches import PatchTokenizer
from meristem_domains.vision.picture_grid import GAP_PX, picture_grid

SIDE = 16
PATCH = 4
FIXED = PatchTokenizer(image_px=(SIDE, SIDE), patch_px=PATCH)
NATIVE = PatchTokenizer(image_px=None, patch_px=PATCH, crop="squash", max_patches=64)
CONFIG = TransformerConfig(
    width=32,
    num_layers=2,
    embedding=Embedding(vocab_size=1, patch_features=3 * PATCH**2),
    attention=Attention(num_heads=4),
    feedforward=FeedForward(width=64),
    position=SinCos2D(),
    norm=LayerNorm(eps=1e-12),
)
EPS = 1e-6


def made(config: TransformerConfig = CONFIG, tokenizer: PatchTokenizer = FIXED, **options):
    """The objective, and a model and a decoder with every parameter drawn anew."""
    objective = MaskedPatches(**{"decoder_width": 16, "decoder_layers": 1, "decoder_heads": 2, **options})
    objective.bind_model(config)
    objective.bind(RunData(tokenizer))
    model, extra = Model(config), objective.build(config)
    with torch.no_grad():
        for parameter in [*model.parameters(), *extra.parameters()]:
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return objective, model.eval(), extra.eval()


def pictures(rng: np.random.Generator, sizes: list[tuple[int, int]]) -> list[np.ndarray]:
    return [rng.integers(0, 256, (*size, 3), np.uint8) for size in sizes]


def packed(objective, tokenizer: PatchTokenizer, images: list[np.ndarray], seeds=None) -> PackedBatch:
    sides = [
        objective.prepare(Record.of(str(i), b""), ready(tokenizer.encode(image)), np.random.default_rng(seed))
        for i, (image, seed) in enumerate(zip(images, seeds or range(len(images))))
    ]
    return pack([side for pair in sides for side in pair], [i // 2 for i in range(2 * len(sides))])


def loss_of(objective, model: Model, extra, batch: PackedBatch) -> torch.Tensor:
    return objective.loss_of(model, extra, batch).terms[PIXELS].sum


def copy_weights(other: ViTMAEForPreTraining, model: Model, extra: torch.nn.ModuleDict) -> None:
    """Fill ours with another library's; the values of a patch are (channel, row, column) here, (row, column, channel)
    in what the other predicts."""
    theirs, trunk, decoder = dict(other.state_dict()), model.trunk, extra[DECODER]

    def linear(to: torch.nn.Module, *names: str) -> None:
        to.weight.copy_(torch.cat([theirs.pop(f"{name}.weight").flatten(1) for name in names]))
        to.bias.copy_(torch.cat([theirs.pop(f"{name}.bias") for name in names]))

    def norm(to: torch.nn.Module, name: str) -> None:
        to.weight.copy_(theirs.pop(f"{name}.weight"))
        to.bias.copy_(theirs.pop(f"{name}.bias"))

    def blocks(to: torch.nn.ModuleList, name: str) -> None:
        for i, block in enumerate(to):
            own = f"{name}.{i}"
            norm(block.attention_norm, f"{own}.layernorm_before")
            linear(block.attention.qkv, *(f"{own}.attention.{part}_proj" for part in "qkv"))
            linear(block.attention.out, f"{own}.attention.o_proj")
            norm(block.feedforward_norm, f"{own}.layernorm_after")
            linear(block.feedforward.up, f"{own}.mlp.fc1")
            linear(block.feedforward.down, f"{own}.mlp.fc2")

    with torch.no_grad():
        trunk.embedding.symbols.weight.copy_(theirs.pop("vit.embeddings.cls_token")[0])
        linear(trunk.embedding.patches, "vit.embeddings.patch_embeddings.projection")
        blocks(trunk.blocks, "vit.layers")
        norm(trunk.final_norm, "vit.layernorm")
        linear(decoder.read, "decoder.decoder_embed")
        decoder.hidden.copy_(theirs.pop("decoder.mask_token")[0, 0])
        blocks(decoder.stack.blocks, "decoder.decoder_layers")
        norm(decoder.stack.final_norm, "decoder.decoder_norm")
        weight, bias = theirs.pop("decoder.decoder_pred.weight"), theirs.pop("decoder.decoder_pred.bias")
        decoder.paint.weight.copy_(weight.unflatten(0, (PATCH, PATCH, 3)).permute(2, 0, 1, 3).flatten(0, 2))
        decoder.paint.bias.copy_(bias.unflatten(0, (PATCH, PATCH, 3)).permute(2, 0, 1).flatten())
        # fixed tables; this library has had both orders of the axes, so it takes ours
        positions = torch.from_numpy(FIXED.encode(np.zeros((SIDE, SIDE, 3), np.uint8)).positions)
        theirs.pop("vit.embeddings.position_embeddings").copy_(trunk.embedding.position(positions))
        theirs.pop("decoder.decoder_pos_embed").copy_(decoder.position(positions))
    assert not theirs


def reference(rng: np.random.Generator, is_normalised: bool) -> ViTMAEForPreTraining:
    config = ViTMAEConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=SIDE,
        patch_size=PATCH, decoder_hidden_size=16, decoder_num_hidden_layers=1, decoder_num_attention_heads=2,
        decoder_intermediate_size=64, norm_pix_loss=is_normalised, mask_ratio=0.75,
    )  # fmt: skip
    other = ViTMAEForPreTraining(config).eval()
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return other


@pytest.mark.parametrize("is_normalised", [True, False])
def test_loss_and_gradients_are_those_of_another_masked_autoencoder(is_normalised: bool, rng):
    objective, model, extra = made(is_normalised=is_normalised)
    other = reference(rng, is_normalised)
    copy_weights(other, model, extra)
    images = pictures(rng, [(SIDE, SIDE)] * 3)
    batch = packed(objective, FIXED, images)
    assert batch.records == (0, 1, 2)  # of one length, so in their order
    is_hidden = (batch.targets[PIXELS] != IGNORE)[: batch.layout.num_tokens].reshape(3, -1)[:, 1:]
    # the other hides what has the most noise, and keeps the order of the rest
    noise = is_hidden.float() + torch.arange(is_hidden.shape[1]) / 1000
    values = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 255 * 2 - 1
    out = other(pixel_values=values, noise=noise)
    term = objective.loss_of(model, extra, batch).terms[PIXELS]
    ours = term.sum / term.count
    # fp32 sums in another order
    torch.testing.assert_close(ours, out.loss, atol=1e-5, rtol=1e-5)
    ours.backward()
    out.loss.backward()
    theirs = other.vit.embeddings.patch_embeddings.projection.weight.grad.flatten(1)
    torch.testing.assert_close(model.trunk.embedding.patches.weight.grad, theirs, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(extra[DECODER].hidden.grad, other.decoder.mask_token.grad[0, 0], atol=1e-5, rtol=1e-4)


def test_hidden_pixels_change_the_loss_and_nothing_that_the_trunk_reads(rng):
    objective, model, extra = made()
    (image,) = pictures(rng, [(SIDE, SIDE)])
    before = packed(objective, FIXED, [image])
    rows = (before.targets[PIXELS] != IGNORE).nonzero().flatten()
    changed = image.copy()
    for row, column in before.positions[rows].tolist():
        patch = (slice(row * PATCH, (row + 1) * PATCH), slice(column * PATCH, (column + 1) * PATCH))
        changed[patch] = rng.integers(0, 256, (PATCH, PATCH, 3), np.uint8)
    after = packed(objective, FIXED, [changed])
    assert after.source is not None
    assert torch.equal(before.targets[PIXELS], after.targets[PIXELS])
    assert not torch.equal(before.features, after.features)
    first, second = model.trunk(before.source).final, model.trunk(after.source).final
    assert torch.equal(first, second)
    args = (before, before.targets[PIXELS] != IGNORE)
    assert torch.equal(extra[DECODER](first, *args), extra[DECODER](second, after, args[1]))
    assert loss_of(objective, model, extra, before) != loss_of(objective, model, extra, after)


def test_a_visible_pixel_changes_what_the_trunk_reads(rng):
    """The check above would catch an encoder that saw everything."""
    objective, model, _ = made()
    (image,) = pictures(rng, [(SIDE, SIDE)])
    before = packed(objective, FIXED, [image])
    row, column = before.source.positions[1].tolist()
    image[row * PATCH, column * PATCH] ^= 128
    after = packed(objective, FIXED, [image])
    assert not torch.equal(model.trunk(before.source).final, model.trunk(after.source).final)


@pytest.mark.parametrize("rate", [0.01, 0.5, 0.75, 0.99])
def test_the_number_of_hidden_patches_is_exact_and_planned_for(rate: float, rng):
    objective, _, _ = made(tokenizer=NATIVE, rate=rate)
    sizes = [(PATCH * int(rng.integers(1, 7)), PATCH * int(rng.integers(1, 7))) for _ in range(20)]
    for size, image in zip([*sizes, (PATCH, PATCH)], pictures(rng, [*sizes, (PATCH, PATCH)])):
        tokens = NATIVE.encode(image)
        source, main = objective.prepare(Record.of("a", b""), ready(tokens), rng)
        num_patches = size[0] * size[1] // PATCH**2
        wanted = min(max(round(rate * num_patches), 1), num_patches - 1)
        is_hidden = main.targets[PIXELS] != IGNORE
        assert is_hidden.sum() == wanted
        assert source.side == SOURCE
        assert len(source) == 1 + num_patches - wanted
        assert (source.features == tokens.features[~is_hidden]).all()
        assert (source.positions == tokens.positions[~is_hidden]).all()
        assert source.ids[0] == 0
        assert not is_hidden[0], "the class token is no patch"
        planned = objective.lengths(np.array([len(tokens)]))
        assert planned == len(source) + len(main)


def test_every_patch_is_hidden_as_often_as_another_and_by_the_given_generator_alone(rng):
    objective, _, _ = made()
    tokens = FIXED.encode(pictures(rng, [(SIDE, SIDE)])[0])
    hits = np.zeros(len(tokens))
    for seed in range(400):
        _, one = objective.prepare(Record.of("a", b""), ready(tokens), np.random.default_rng(seed))
        hits += one.targets[PIXELS] != IGNORE
    _, again = objective.prepare(Record.of("a", b""), ready(tokens), np.random.default_rng(399))
    assert (again.targets[PIXELS] == one.targets[PIXELS]).all()
    # 400 draws of 0.75: a deviation is 8.7, and 16 patches stay within 5 of them but once in 100,000 runs
    assert (abs(hits[1:] - 300) < 45).all()


@pytest.mark.parametrize("position", [SinCos2D(), Rotary(num_axes=2), Learned(max_positions=64, grid=(8, 8))])
def test_packing_pictures_of_any_sizes_does_not_change_their_loss(position, rng):
    objective, model, extra = made(replace(CONFIG, position=position), NATIVE)
    sizes = [(PATCH * int(rng.integers(1, 8)), PATCH * int(rng.integers(1, 8))) for _ in range(6)]
    images = pictures(rng, sizes)
    batch = packed(objective, NATIVE, images)
    term = objective.loss_of(model, extra, batch).terms[PIXELS]
    alone = [
        loss_of(objective, model, extra, packed(objective, NATIVE, [image], [seed]))
        for seed, image in enumerate(images)
    ]
    # fp32 sums in another order; a loss of some 100
    torch.testing.assert_close(term.sum, torch.stack(alone).sum(), atol=1e-3, rtol=1e-5)
    assert float(term.count) == objective.counts(batch)[PIXELS]


def test_counts_of_expert_layers_are_those_of_what_the_trunk_read(rng):
    objective, model, extra = made(replace(CONFIG, experts=Experts(count=3, balance_weight=0.1, z_weight=0.1)))
    batch = packed(objective, FIXED, pictures(rng, [(SIDE, SIDE)] * 4))
    terms = objective.loss_of(model, extra, batch).terms
    assert {name: float(term.count) for name, term in terms.items()} == objective.counts(batch)
    assert len(terms) == 3


def test_what_does_not_fit_is_refused():
    for options in ({"rate": 0.0}, {"rate": 1.0}, {"decoder_width": 30}, {"decoder_heads": 3}, {"decoder_layers": 0}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            MaskedPatches(**options)
    with pytest.raises(ConfigError, match="domain of pictures"):
        MaskedPatches().bind(RunData(AlphabetTokenizer(("A", "B"))))
    with pytest.raises(ConfigError, match="patch_features"):
        MaskedPatches().bind_model(replace(CONFIG, embedding=Embedding(vocab_size=3)))
    with pytest.raises(ConfigError, match="one stack"):
        MaskedPatches().bind_model(replace(CONFIG, num_decoder_layers=1))


@pytest.mark.parametrize("is_normalised", [True, False])
def test_the_reconstruction_shows_the_picture_what_is_seen_and_what_is_painted(is_normalised: bool, rng, monkeypatch):
    objective, model, extra = made(tokenizer=NATIVE, is_normalised=is_normalised)
    images = pictures(rng, [(16, 24), (8, 28)])
    batch = packed(objective, NATIVE, images)
    wanted = objective._values(batch)
    monkeypatch.setattr(extra[DECODER], "forward", lambda *_: wanted)  # a decoder that knows it all
    sheet = objective.figures(model, extra, batch)["reconstruction"]
    assert sheet.dtype == np.uint8
    first = images[batch.records[0]]
    height, width = first.shape[:2]
    factor = 96 // max(height, width)
    shown = [
        sheet[GAP_PX : GAP_PX + factor * height : factor, left : left + factor * width : factor].astype(int)
        for left in (GAP_PX + column * (GAP_PX + 96) for column in range(3))
    ]
    original, seen, painted = shown
    assert (original == first).all()
    assert abs(painted - first).max() <= 1, "rounding"
    is_grey = (abs(seen - 127.5) <= 1).all(2)
    assert ((seen == first).all(2) | is_grey).all()
    assert is_grey.reshape(height // PATCH, PATCH, width // PATCH, PATCH).all((1, 3)).sum() == round(
        0.75 * height * width / PATCH**2
    )


def test_a_sheet_takes_pictures_of_any_channels(rng):
    sheet = picture_grid([[rng.random((5, 7, 1)), rng.random((200, 3, 2))], [rng.random((9, 9, 6))]])
    assert sheet.shape == (GAP_PX * 3 + 200 + 90, GAP_PX * 3 + 91 + 3, 3)
    assert (sheet[-GAP_PX:] == 255).all()


CONFIG_FILE = """
model:
  architecture: {preset: vit_digits}
  objective: {class_path: MaskedPatches, init_args: {decoder_width: 32}}
  optimizer: {lr: 1e-3, warmup_steps: 5}
data:
  domain: vision
  sources: pictures
  tokenizer: {image_px: 8, patch_px: 2, num_channels: 1}
  tokens_per_batch: 512
  split: {validation_frac: 0.3}
trainer: {max_steps: 12, accelerator: cpu, enable_progress_bar: false}
watch: {validate_every_n_steps: 6, save_every_n_steps: 6}
"""


@pytest.fixture
def run_of_pictures(tmp_path: Path, rng, monkeypatch) -> Path:
    """A run on a plain folder."""
    from meristem.cli.main import main

    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(40):
        smooth = np.add.outer(rng.random() * np.arange(8), rng.random() * np.arange(8)) * 18
        Image.fromarray(smooth.astype(np.uint8)).save(folder / f"{i}.png")
    (tmp_path / "mae.yaml").write_text(CONFIG_FILE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MERISTEM_CACHE", str(tmp_path / "cache"))
    assert main(["fit", "--config", "mae.yaml", "--run_dir", "run"]) == 0
    return tmp_path / "run"


def test_a_run_trains_the_decoder_too_and_leaves_a_trunk_and_a_reconstruction(run_of_pictures: Path, capsys):
    with Image.open(run_of_pictures / "reconstruction.png") as image:
        assert image.width == 3 * 96 + 4 * GAP_PX
        num_rows, rest = divmod(image.height - GAP_PX, 96 + GAP_PX)
        assert rest == 0
        assert 1 < num_rows <= 8  # what falls into the validation part is drawn by content
    state = torch.load(run_of_pictures / "checkpoints" / "last.ckpt", weights_only=True)
    moments = state["optimizer_states"][0]["state"]
    trained = [name for name in state["state_dict"] if name.startswith("extra.")]
    assert trained
    assert len(moments) == len(state["state_dict"])
    from meristem import load

    vectors = load(str(run_of_pictures / "model")).embed(
        sorted(map(str, (run_of_pictures.parent / "pictures").iterdir()))
    )
    assert np.isfinite(np.asarray(vectors)).all()


def test_the_shipped_config_is_whole(tmp_path: Path):
    from meristem.cli.configs import shipped_configs
    from meristem.cli.run_config import parse
    from meristem.train.run import build

    config = parse(["--config", "vision/mae_tiny", "--data.sources", str(tmp_path), "--run_dir", str(tmp_path)])
    assert config is not None
    task, data = build(config)
    task.objective.bind_model(task.architecture)
    task.objective.bind(RunData(data.tokenizer))
    assert task.architecture.embedding.patch_features == data.tokenizer.num_features == 48
    header = shipped_configs()["vision/mae_tiny"].read_text().split("\nmodel:")[0]
    assert all(word in header for word in ("command:", "hardware:", "minutes:", "expected:"))
