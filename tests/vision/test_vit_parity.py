"""ViT and DINOv2 give the numbers and gradients of `transformers`, in both layouts of their tensors."""

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import images
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoImageProcessor,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersForImageClassification,
    Dinov2WithRegistersModel,
    ViTConfig,
    ViTForImageClassification,
    ViTForMaskedImageModeling,
    ViTModel,
)

from meristem.data.pack import pack
from meristem.errors import CheckpointError, ConfigError
from meristem.interop.directory import read_directory, read_model, write_directory
from meristem.interop.family import Family, find_family
from meristem.model.config import FeedForward, Prefix, Residual, RMSNorm
from meristem.model.model import Model
from meristem.types import Tokens
from meristem_domains.vision.families.dino import DINO, DINO_REGISTERS
from meristem_domains.vision.families.vit import VIT
from meristem_domains.vision.patches import PatchTokenizer
from model_runs import specs
from parity_checks import Case, outputs_of
from references import save

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 24,
    "patch_size": 8,
    "num_labels": 5,
}
# an epsilon so large that a foreign one shows
ODD = {**SMALL, "hidden_size": 30, "num_hidden_layers": 3, "num_attention_heads": 3, "layer_norm_eps": 1e-3}
GREY = {"image_size": [20, 12], "patch_size": 4, "num_channels": 1}

SHAPES: dict[str, tuple[Any, Any, Family, dict[str, Any]]] = {
    "ViT, 2 layers of 32, classifier": (
        ViTForImageClassification,
        ViTConfig,
        VIT,
        {**SMALL, "intermediate_size": 48, "id2label": dict(enumerate("abcde"))},
    ),
    "ViT, 3 layers of 30, 20 x 12 px, grey, pooler": (
        ViTModel,
        ViTConfig,
        VIT,
        {**ODD, **GREY, "intermediate_size": 37, "hidden_act": "gelu_pytorch_tanh", "qkv_bias": False},
    ),
    "ViT, 20 x 12 px, grey, one value": (
        ViTForImageClassification,
        ViTConfig,
        VIT,
        {**ODD, **GREY, "intermediate_size": 37, "num_labels": 1},
    ),
    "DINOv2, 2 layers of 32": (Dinov2Model, Dinov2Config, DINO, SMALL),
    "DINOv2, 3 layers of 30, gated, classifier": (
        Dinov2ForImageClassification,
        Dinov2Config,
        DINO,
        {**ODD, "image_size": 20, "patch_size": 4, "use_swiglu_ffn": True, "mlp_ratio": 3, "use_mask_token": False},
    ),
    "DINOv2, 4 registers": (Dinov2WithRegistersModel, Dinov2WithRegistersConfig, DINO_REGISTERS, SMALL),
    "DINOv2, 3 layers of 30, 3 registers, gated, classifier": (
        Dinov2WithRegistersForImageClassification,
        Dinov2WithRegistersConfig,
        DINO_REGISTERS,
        {**ODD, "use_swiglu_ffn": True, "num_register_tokens": 3},
    ),
}
PLAIN, TALL, _, DINO_PLAIN, DINO_GATED, _, REGISTERS = SHAPES

PROCESSOR = {
    "image_processor_type": "ViTImageProcessor",
    "do_resize": True,
    "resample": 3,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
}

CaseOf = Callable[[str], Case]


def make(shape: str, folder: Path, rng: np.random.Generator, **settings: object) -> Path:
    """A directory of a redrawn model, with the file of an image processor."""
    kind, config_kind, _, values = SHAPES[shape]
    config = config_kind(**{**values, **settings})
    height, width = config.image_size if isinstance(config.image_size, list) else [config.image_size] * 2
    mean = rng.random(config.num_channels).tolist()
    processor = {
        **PROCESSOR,
        "size": {"height": height, "width": width},
        "image_mean": mean,
        "image_std": [0.3] * config.num_channels,
    }
    model = images.redraw_image_model(kind(config), rng)
    return save(model, folder, {"preprocessor_config.json": json.dumps(processor)})


@pytest.fixture(scope="session")
def case_of(tmp_path_factory: pytest.TempPathFactory) -> CaseOf:
    """Each shape, read by both libraries once a session."""
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    print(f"reference seed={seed}")

    @cache
    def read(shape: str) -> Case:
        folder = make(shape, tmp_path_factory.mktemp("vit") / "hf", np.random.default_rng(seed))
        return Case.of(folder, SHAPES[shape][2])

    return read


@pytest.mark.parametrize("shape", SHAPES)
def test_layers_pooled_features_and_logits_are_those_of_the_reference(
    shape: str, case_of: CaseOf, rng: np.random.Generator, parity_row: Callable[..., None]
) -> None:
    case = case_of(shape)
    largest = case.check_forward(rng)
    parity_row(case.family.name, shape, library="transformers", forward=largest)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_output_is_compared(shape: str, case_of: CaseOf, rng: np.random.Generator) -> None:
    case = case_of(shape)
    parity = case.compare(case.imported.model, case.reference, rng)
    assert len(parity) - len(outputs_of(parity)) == case.imported.model.config.num_layers + 1
    assert set(outputs_of(parity)) == ({"label"} if case.imported.model.readouts else {"pooled"})


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_are_those_of_the_reference(
    shape: str, case_of: CaseOf, rng: np.random.Generator, tmp_path: Path, parity_row: Callable[..., None]
) -> None:
    def save_gradients(model: Any, folder: Path) -> None:
        # one row of ours stands for the class token and its position: both have its gradient, and the table adds them
        embeddings = model.base_model.embeddings
        torch.testing.assert_close(embeddings.cls_token[0, 0], embeddings.position_embeddings[0, 0])
        embeddings.position_embeddings.data[0, 0] = 0
        model.save_pretrained(folder)

    case = case_of(shape)
    largest = case.check_gradients(rng, tmp_path, save=save_gradients)
    parity_row(case.family.name, shape, gradients=largest)


@pytest.mark.parametrize("shape", SHAPES)
def test_exported_models_load_in_transformers_and_give_the_same(
    shape: str, case_of: CaseOf, rng: np.random.Generator, tmp_path: Path, parity_row: Callable[..., None]
) -> None:
    case = case_of(shape)
    parity_row(case.family.name, shape, export=case.check_export(rng, tmp_path))
    # and finds itself what it is of
    assert find_family(tmp_path, json.loads((tmp_path / "back/config.json").read_text())) is case.family
    back = read_directory(tmp_path / "back").tokenizer
    assert back == case.imported.tokenizer


@pytest.mark.parametrize("shape", SHAPES)
def test_names_in_memory_are_read_as_those_on_disk(shape: str, case_of: CaseOf, tmp_path: Path) -> None:
    case = case_of(shape)
    new = {name: tensor.contiguous() for name, tensor in case.reference.state_dict().items()}
    old = load_file(case.folder / "model.safetensors")
    assert any(".q_proj." in name for name in new)
    assert any(".attention.query." in name for name in old)
    for folder, tensors in ((tmp_path / "new", new), (tmp_path / "old", old)):
        folder.mkdir()
        save_file(tensors, folder / "model.safetensors")
        (folder / "config.json").write_text((case.folder / "config.json").read_text())
        model, notes = read_model(folder)
        assert notes == []
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, case.imported.model.state_dict()[name]), name


MUTANTS = {
    PLAIN: [
        images.take_tanh_gelu,
        images.take_foreign_epsilon,
        images.shift_positions,
        images.put_channels_last,
        images.swap_norms,
        images.drop_value_bias,
        images.drop_final_norm,
    ],
    TALL: [images.take_erf_gelu, images.take_foreign_epsilon, images.turn_grid],
    DINO_PLAIN: [images.drop_layer_scale, images.swap_layer_scales, images.put_channels_last],
    DINO_GATED: [images.swap_gate_and_value],
    REGISTERS: [images.swap_special_tokens, images.drop_layer_scale],
}


@pytest.mark.parametrize(("shape", "mutate"), [(shape, m) for shape, mutants in MUTANTS.items() for m in mutants])
def test_a_mutant_is_caught(
    shape: str, mutate: Callable[[Model], None], case_of: CaseOf, rng: np.random.Generator
) -> None:
    case_of(shape).check_mutant(rng, mutate)


@pytest.mark.parametrize("shape", [PLAIN, REGISTERS])
def test_a_class_token_without_its_position_is_caught(shape: str, case_of: CaseOf, rng: np.random.Generator) -> None:
    case = case_of(shape)
    token = case.reference.base_model.embeddings.cls_token.data[0, 0]

    def forget_position(model: Model) -> None:
        model.trunk.embedding.symbols.weight.data[0] = token

    case.check_mutant(rng, forget_position)


def test_a_pooler_without_tanh_is_caught(case_of: CaseOf, rng: np.random.Generator) -> None:
    def forget_tanh(model: Model) -> None:
        pool = model.pool
        pool.forward = (
            lambda rows, layout: pool.dense(  # type: ignore[union-attr]
                torch.stack([part[0] for part in rows.split([*layout.lengths, layout.num_spare])[:-1]])
            )
        )

    case_of(TALL).check_mutant(rng, forget_tanh)


@pytest.mark.parametrize(("shape", "kind"), [("ViT", ViTForMaskedImageModeling), (DINO_PLAIN, None), (REGISTERS, None)])
def test_hidden_patches_are_those_of_the_reference(
    shape: str, kind: Any, case_of: CaseOf, rng: np.random.Generator, tmp_path: Path
) -> None:
    if kind is None:
        case = case_of(shape)
    else:
        model = images.redraw_image_model(kind(ViTConfig(**{**SMALL, "encoder_stride": 8})), rng)
        case = Case.of(save(model, tmp_path / "hf"), VIT)
        assert any("decoder" in note for note in case.imported.notes)
    tokenizer = case.imported.tokenizer
    assert isinstance(tokenizer, PatchTokenizer)
    assert tokenizer.mask_id is not None
    side = tokenizer.image_px[0]
    pixels = rng.random((side, side, 3), dtype=np.float32)
    tokens = tokenizer.encode(pixels)
    is_hidden = rng.random(len(tokens)) < 0.4
    is_hidden[: tokenizer.num_special[0]] = False
    is_hidden[-1] = True
    ids = np.where(is_hidden, tokenizer.mask_id, tokens.ids)
    hidden = Tokens(positions=tokens.positions, ids=ids, features=tokens.features)
    image = (pixels - np.array(tokenizer.mean, np.float32)) / np.array(tokenizer.std, np.float32)
    with torch.inference_mode():
        ours = case.imported.model.trunk(pack([hidden], [0])).final[: len(tokens)]
        theirs = case.reference.base_model(
            torch.from_numpy(image.transpose(2, 0, 1).copy())[None],
            bool_masked_pos=torch.from_numpy(is_hidden[tokenizer.num_special[0] :])[None],
        ).last_hidden_state[0]
    assert is_hidden.any()
    # fp32 rounds at 1e-7; sharp attention multiplies it by some tens
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_a_picture_is_prepared_as_transformers_prepares_it(
    case_of: CaseOf, rng: np.random.Generator, tmp_path: Path
) -> None:
    picture = Image.fromarray(rng.integers(0, 256, (53, 41, 3), dtype=np.uint8))
    stream = io.BytesIO()
    picture.save(stream, "png")
    case = case_of(PLAIN)
    # 32 x 41 px: half of what stands out, 8.5, is rounded alike by both
    cut = {"size": {"shortest_edge": 32}, "do_center_crop": True, "crop_size": {"height": 24, "width": 24}}
    for name, change in (("squash", {}), ("center", {"image_processor_type": "BitImageProcessor", **cut})):
        folder = tmp_path / name
        shutil.copytree(case.folder, folder)
        file = folder / "preprocessor_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
        tokenizer = read_directory(folder).tokenizer
        assert tokenizer.crop == name
        ours = torch.from_numpy(tokenizer.encode(stream.getvalue()).features[1:])
        back = tmp_path / f"{name} back"
        write_directory(back, case.imported.model.config, tokenizer, case.imported.model)
        for place in (folder, back):
            processor = AutoImageProcessor.from_pretrained(place, backend="pil")
            pixels = processor(picture, return_tensors="pt").pixel_values[0]
            theirs = pixels.unfold(1, 8, 8).unfold(2, 8, 8).permute(1, 2, 0, 3, 4).reshape(9, -1)
            # the same bytes: what is left is the order of three operations in fp32
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_a_smaller_crop_than_the_positions_were_learned_for_is_said(case_of: CaseOf, tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    shutil.copytree(case_of(DINO_PLAIN).folder, folder)
    cut = {"size": {"shortest_edge": 16}, "do_center_crop": True, "crop_size": {"height": 12, "width": 12}}
    (folder / "preprocessor_config.json").write_text(json.dumps({**PROCESSOR, **cut}))
    imported = read_directory(folder)
    (note,) = imported.notes
    assert "cuts pictures to 12 x 12 px" in note
    assert (imported.tokenizer.image_px, imported.tokenizer.resize_px) == ((24, 24), (32, 32))


def rewritten(source: Path, folder: Path, **changes: Any) -> Path:
    """A copy of a directory with other settings in its config."""
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


REFUSALS = {
    "patches": (PLAIN, {"patch_size": [8, 4]}, "patch_size must be a square; got 8 x 4"),
    "edge": (PLAIN, {"image_size": 25}, "patch_px must divide"),
    "activation": (PLAIN, {"hidden_act": "mish"}, "hidden_act must be one of gelu.*got 'mish'"),
    "pooler": (TALL, {"pooler_act": "relu"}, "pooler_act must be tanh in a ViT config; got 'relu'"),
    "tall": (DINO_PLAIN, {"image_size": [24, 16]}, "image_size must be a square in a DINOv2 config; got 24 x 16"),
    "size": (DINO_PLAIN, {"image_size": 32}, "of another shape.*position_embeddings"),
    "registers": (REGISTERS, {"num_register_tokens": 2}, "of another shape.*register_tokens"),
    "width": (DINO_PLAIN, {"mlp_ratio": 3}, "of another shape.*mlp.fc1"),
    "classes": (PLAIN, {"id2label": {"0": "a", "1": "b"}}, "of another shape: classifier"),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_what_is_not_of_the_family_is_refused(what: str, case_of: CaseOf, tmp_path: Path) -> None:
    shape, changes, message = REFUSALS[what]
    with pytest.raises(CheckpointError, match=message):
        read_directory(rewritten(case_of(shape).folder, tmp_path / "changed", **changes))


UNSAYABLE = {
    "norm": (PLAIN, lambda config: replace(config, norm=RMSNorm(eps=1e-12)), "ViT: cannot have norm"),
    "feed-forward": (DINO_PLAIN, lambda config: replace(config, feedforward=FeedForward(width=33)), "whole mlp_ratio"),
    "no layer scale": (DINO_PLAIN, lambda config: replace(config, residual=Residual()), "has residual.layer_scale"),
    "pool": (TALL, lambda config: replace(config, pool=Prefix(is_dense=True, has_mean=True)), "pool.has_mean=True"),
}


@pytest.mark.parametrize("what", UNSAYABLE)
def test_what_transformers_cannot_say_is_not_exported(what: str, case_of: CaseOf, tmp_path: Path) -> None:
    shape, change, message = UNSAYABLE[what]
    case = case_of(shape)
    architecture = change(case.imported.model.config)
    model = Model(architecture, specs((), case.imported.model.readouts))
    with pytest.raises(ConfigError, match=message):
        write_directory(tmp_path / "back", architecture, case.imported.tokenizer, model, family=case.family)
    assert not (tmp_path / "back").exists()


def test_a_classifier_beside_a_pooler_it_does_not_read_is_told(case_of: CaseOf, tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    shutil.copytree(case_of(PLAIN).folder, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["vit.pooler.dense.weight"], tensors["vit.pooler.dense.bias"] = torch.zeros(32, 32), torch.zeros(32)
    save_file(tensors, folder / "model.safetensors")
    imported = read_directory(folder)
    assert imported.notes == ("the pooler is left out: the classifier does not read it",)
    assert imported.model.config == case_of(PLAIN).imported.model.config
