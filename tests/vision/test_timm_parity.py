"""Vision transformers of timm give its numbers, from directories as timm saves them, and back."""

import io
import json
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import images
import numpy as np
import pytest
import timm
import timm.data
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf
from torch import nn

from meristem.errors import CheckpointError, ConfigError
from meristem.interop.directory import read_directory, write_directory
from meristem.interop.family import find_family
from meristem.model.config import LayerNorm, Mean, Prefix, Rotary
from meristem.model.model import Model
from meristem_domains.vision.families.timm_facts import ARCHITECTURES
from meristem_domains.vision.families.timm_vit import TIMM_VIT
from model_runs import specs
from parity_checks import Case, outputs_of

SMALL = {"img_size": 24, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 5}
ODD = {"img_size": (20, 12), "patch_size": 4, "embed_dim": 30, "depth": 3, "num_heads": 3, "num_classes": 4}

SHAPES: dict[str, tuple[str, Mapping[str, Any]]] = {
    "ViT, 2 layers of 32": ("vit_base_patch16_224", SMALL),
    "ViT, 3 layers of 30, 20 x 12 px, grey": (
        "vit_base_patch16_224",
        {**ODD, "in_chans": 1, "mlp_ratio": 2.3, "qkv_bias": False},
    ),
    "DeiT, distilled": ("deit_tiny_distilled_patch16_224", SMALL),
    "DeiT, distilled, 3 layers of 30, 20 x 12 px": ("deit_small_distilled_patch16_224", ODD),
    "DeiT III": ("deit3_small_patch16_224", SMALL),
    "4 registers, DINOv2": ("vit_small_patch14_reg4_dinov2", {**SMALL, "num_classes": 0}),
    "4 registers, DINOv2, gated, 20 x 12 px": ("vit_giant_patch14_reg4_dinov2", {**ODD, "num_classes": 0}),
    "4 registers, mean, no class token": ("vit_medium_patch16_reg4_gap_256", SMALL),
    "class token and 3 registers, mean": (
        "vit_base_patch16_224",
        {**ODD, "global_pool": "avg", "reg_tokens": 3, "init_values": 0.5},
    ),
    "mean without a norm behind it": ("vit_base_patch16_siglip_gap_224", SMALL),
    "maximum": ("vit_base_patch16_224", {**ODD, "global_pool": "max", "fc_norm": False}),
    "pre-norm, quick GELU": ("vit_base_patch16_clip_quickgelu_224", SMALL),
    "pre-norm, 20 x 12 px": ("vit_base_patch16_clip_224", ODD),
    "attention pool": ("vit_base_patch16_siglip_224", SMALL),
    "attention pool, tanh GELU, 20 x 12 px": ("vit_so400m_patch16_siglip_256", ODD),
    "attention pool beside 4 registers": ("vit_so150m_patch16_reg4_map_256", SMALL),
    "no norm at the end": ("vit_base_patch16_radio_v3", {**SMALL, "num_classes": 0}),
    "no positions": ("vit_base_patch16_224", {**ODD, "pos_embed": "none"}),
}
PLAIN, GREY, DISTILLED, _, SCALED, _, GATED, GAP, CLASS_GAP, NORMLESS, _, QUICK, _, MAP, TANH_MAP, REGISTER_MAP, *_ = (
    SHAPES
)

PLAIN, DISTILLED, SCALED = "ViT, 2 layers of 32", "DeiT, distilled", "DeiT III"
GATED, GAP, POOLED = "4 registers, DINOv2, gated, 20 x 12 px", "4 registers, mean, no class token", "attention pool"
QUICK, TANH = "pre-norm, quick GELU", "attention pool, tanh GELU, 20 x 12 px"

CaseOf = Callable[[str], Case]


def make(shape: str, folder: Path, rng: np.random.Generator, **settings: object) -> Path:
    """A directory of a redrawn model, as timm writes it."""
    name, values = SHAPES[shape]
    model = images.redraw_image_model(timm.create_model(name, **{**values, **settings}), rng)
    save_for_hf(model, folder, safe_serialization=True)
    return folder


@pytest.fixture(scope="session")
def case_of(tmp_path_factory: pytest.TempPathFactory) -> CaseOf:
    """Each shape, read by both libraries once a session."""
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    print(f"reference seed={seed}")

    @cache
    def read(shape: str) -> Case:
        return Case.of(make(shape, tmp_path_factory.mktemp("timm") / "hf", np.random.default_rng(seed)), TIMM_VIT)

    return read


@pytest.mark.parametrize("shape", SHAPES)
def test_layers_pooled_features_and_logits_are_those_of_timm(
    shape: str, case_of: CaseOf, rng: np.random.Generator, parity_row: Callable[..., None]
) -> None:
    largest = case_of(shape).check_forward(rng)
    parity_row("timm", shape, library="timm", forward=largest)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_output_is_compared(shape: str, case_of: CaseOf, rng: np.random.Generator) -> None:
    case = case_of(shape)
    parity = case.compare(case.imported.model, case.reference, rng)
    assert len(parity) - len(outputs_of(parity)) == case.imported.model.config.num_layers + 1
    assert set(outputs_of(parity)) == {"pooled", *(["label"] if SHAPES[shape][1]["num_classes"] else [])}


@pytest.mark.parametrize("shape", SHAPES)
def test_exported_models_load_in_timm_and_give_the_same(
    shape: str, case_of: CaseOf, rng: np.random.Generator, tmp_path: Path, parity_row: Callable[..., None]
) -> None:
    case = case_of(shape)
    parity_row("timm", shape, export=case.check_export(rng, tmp_path))
    assert find_family(tmp_path, json.loads((tmp_path / "back/config.json").read_text())) is TIMM_VIT
    assert read_directory(tmp_path / "back").tokenizer == case.imported.tokenizer


def test_names_stand_for_what_timm_builds() -> None:
    seen = 0
    for name, named in ARCHITECTURES.items():
        with torch.device("meta"):
            model = timm.create_model(name, depth=1)
        block = model.blocks[0]
        assert type(block).__name__ == "Block", name
        assert isinstance(block.norm1, nn.LayerNorm), name
        assert block.attn.num_heads == named.num_heads, name
        assert {m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)} == {named.eps}, name
        kinds = {"GELU": "gelu", "GELUTanh": "gelu_tanh", "QuickGELU": "quick_gelu", "SiLU": "silu"}
        assert kinds[type(block.mlp.act).__name__] == named.activation, name
        assert hasattr(block.mlp, "gate_last") == named.is_gated, name
        assert not getattr(block.mlp, "gate_last", False), name
        assert hasattr(model, "head_dist") == named.is_distilled, name
        assert not model.pool_include_prefix, name
        seen += 1
    assert seen > 150


def forget_distillation(model: Model) -> None:
    """The class token's classifier alone, and not halved."""
    weight = model.heads["label"].out.weight.data
    weight[:, weight.shape[1] // 2 :] = 0
    weight *= 2


def take_registers_for_patches(model: Model) -> None:
    """The mean goes over special rows too."""
    pool, forward = model.pool, model.pool.forward
    pool.forward = lambda rows, layout: forward(rows, replace(layout, special_rows=()))


def drop_pool_norm(model: Model) -> None:
    model.pool.norm = nn.Identity()


def swap_pool_keys_and_values(model: Model) -> None:
    kv = model.pool.kv
    kv.weight.data = torch.cat(list(kv.weight.data.chunk(2))[::-1])


def drop_pool_residual(model: Model) -> None:
    model.pool.down.weight.data *= 0
    model.pool.down.bias.data *= 0


def drop_norm_of_patches(model: Model) -> None:
    model.trunk.embedding.norm = nn.Identity()


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
    DISTILLED: [forget_distillation, images.swap_special_tokens],
    SCALED: [images.drop_layer_scale, images.swap_layer_scales],
    GATED: [images.swap_gate_and_value, images.turn_grid],
    GAP: [take_registers_for_patches, drop_pool_norm],
    QUICK: [images.take_erf_gelu, drop_norm_of_patches],
    TANH: [images.take_erf_gelu],
    POOLED: [swap_pool_keys_and_values, drop_pool_residual, drop_pool_norm],
    "attention pool beside 4 registers": [take_registers_for_patches],
}


@pytest.mark.parametrize(("shape", "mutate"), [(shape, m) for shape, mutants in MUTANTS.items() for m in mutants])
def test_a_mutant_is_caught(
    shape: str, mutate: Callable[[Model], None], case_of: CaseOf, rng: np.random.Generator
) -> None:
    case_of(shape).check_mutant(rng, mutate)


@pytest.mark.parametrize("shape", [PLAIN, DISTILLED])
def test_a_class_token_without_its_position_is_caught(shape: str, case_of: CaseOf, rng: np.random.Generator) -> None:
    case = case_of(shape)

    def forget_position(model: Model) -> None:
        model.trunk.embedding.symbols.weight.data[0] = case.reference.cls_token.data[0, 0]

    case.check_mutant(rng, forget_position)


def test_a_directory_is_read_without_timm(case_of: CaseOf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    case = case_of(PLAIN)
    again = read_directory(case.folder)
    assert again.family is TIMM_VIT
    assert again.model.config == case.imported.model.config


def test_arguments_that_were_changed_behind_the_name_are_read(
    case_of: CaseOf, rng: np.random.Generator, tmp_path: Path
) -> None:
    changed = {"act_layer": "relu", "num_heads": 2, "norm_layer": "layernorm", "pos_drop_rate": 0.1}
    model = images.redraw_image_model(timm.create_model("vit_base_patch16_clip_224", **{**SMALL, **changed}), rng)
    save_for_hf(model, tmp_path / "hf", safe_serialization=True)
    case = Case.of(tmp_path / "hf", TIMM_VIT)
    assert case.imported.model.config.norm == LayerNorm(eps=1e-6)
    case.check_forward(rng)
    case.check_export(rng, tmp_path)
    case.check_mutant(rng, images.take_erf_gelu)


def test_a_published_directory_that_says_a_name_alone_is_read(rng: np.random.Generator, tmp_path: Path) -> None:
    model = images.redraw_image_model(timm.create_model("deit_tiny_patch16_224"), rng)
    save_for_hf(model, tmp_path / "hf", safe_serialization=True)
    file = tmp_path / "hf/config.json"
    config = json.loads(file.read_text())
    del config["model_args"]
    file.write_text(json.dumps(config))
    case = Case.of(tmp_path / "hf", TIMM_VIT)
    assert case.imported.model.config.attention.num_heads == 3
    # 12 layers of sharp attention
    case.check_forward(rng, tolerance=5e-4)


def test_a_picture_is_prepared_as_timm_prepares_it(case_of: CaseOf, rng: np.random.Generator, tmp_path: Path) -> None:
    settings = {"crop_pct": 0.7, "interpolation": "bilinear", "mean": (0.2, 0.3, 0.4), "std": (0.5, 0.6, 0.7)}
    model = images.redraw_image_model(timm.create_model("vit_base_patch16_224", **SMALL), rng)
    save_for_hf(model, tmp_path / "hf", safe_serialization=True, data_config=settings)
    imported = read_directory(tmp_path / "hf")
    picture = Image.fromarray(rng.integers(0, 256, (53, 41, 3), dtype=np.uint8))
    stream = io.BytesIO()
    picture.save(stream, "png")
    transform = timm.data.create_transform(
        **timm.data.resolve_data_config({}, model=TIMM_VIT.runner.load(tmp_path / "hf"))
    )
    pixels = transform(picture)
    theirs = pixels.unfold(1, 8, 8).unfold(2, 8, 8).permute(1, 2, 0, 3, 4).reshape(9, -1)
    ours = torch.from_numpy(imported.tokenizer.encode(stream.getvalue()).features[1:])
    # the same bytes: what is left is the order of a subtraction and a division in fp32
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def rewritten(source: Path, folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of a directory with another config."""
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def put(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """A change of one argument."""
    return lambda config: config["model_args"].update({name: value})


def forget_pool(config: dict[str, Any]) -> None:
    del config["global_pool"]
    del config["model_args"]["global_pool"]


REFUSALS = {
    "architecture": (
        lambda config: config.update(architecture="vit_dwee_patch16_reg1_gap_256"),
        "architecture must be",
    ),
    "another kind": (lambda config: config.update(architecture="resnet50"), "architecture must be .*got 'resnet50'"),
    "query norm": (put("qk_norm", True), "model_args.qk_norm must be False; got True"),
    "block": (put("block_fn", "ResPostBlock"), "model_args.block_fn must be None"),
    "unknown": (put("rope", True), "model_args.rope is not known"),
    "norm": (put("norm_layer", "rmsnorm"), "model_args.norm_layer must be layernorm"),
    "activation": (put("act_layer", "mish"), "act_layer must be one of gelu.*got 'mish'"),
    "pool": (put("global_pool", "avgmax"), "global_pool must be one of token, avg, max, map; got 'avgmax'"),
    "no pool": (forget_pool, "global_pool must be one of token, avg, max, map; got None"),
    "prefix in the mean": (put("pool_include_prefix", True), "pool_include_prefix must be false"),
    "another depth": (put("depth", 3), "model_args.depth must be 2, as the tensors say; got 3"),
    "another size": (put("img_size", [32, 24]), "pos_embed must have 12 rows for pictures of 32 x 24 px"),
    "padding": (put("dynamic_img_pad", True), "dynamic_img_pad must be False"),
    "classes": (lambda config: config.update(label_names=["a"]), "label_names must name num_classes=5 classes; got 1"),
    "gated": (lambda config: config.update(architecture="vit_giant_patch14_dinov2"), "gated layers or not"),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_what_no_part_of_ours_can_say_is_refused(what: str, case_of: CaseOf, tmp_path: Path) -> None:
    change, message = REFUSALS[what]
    with pytest.raises(CheckpointError, match=message):
        read_directory(rewritten(case_of(PLAIN).folder, tmp_path / "changed", change))


def test_tensors_must_be_those_of_the_architecture(case_of: CaseOf, tmp_path: Path) -> None:
    folder = rewritten(case_of(PLAIN).folder, tmp_path / "changed", lambda config: None)
    tensors = load_file(folder / "model.safetensors")
    del tensors["blocks.1.norm2.bias"]
    tensors["blocks.1.attn.q_norm.weight"] = torch.zeros(8)
    tensors["head.bias"] = torch.zeros(6)
    save_file(tensors, folder / "model.safetensors")
    message = "missing: blocks.1.norm2.bias; extra: blocks.1.attn.q_norm.weight; of another shape: head.bias"
    with pytest.raises(CheckpointError, match=message):
        read_directory(folder)


def test_class_names_come_along(case_of: CaseOf, rng: np.random.Generator, tmp_path: Path) -> None:
    names = ["bud", "leaf", "root", "stem", "seed"]
    folder = rewritten(case_of(PLAIN).folder, tmp_path / "named", lambda config: config.update(label_names=names))
    imported = read_directory(folder)
    (readout,) = imported.model.readouts
    assert readout.classes == tuple(names)
    write_directory(tmp_path / "back", imported.model.config, imported.tokenizer, imported.model, "timm")
    assert json.loads((tmp_path / "back/config.json").read_text())["label_names"] == names
    assert timm.create_model(f"local-dir:{tmp_path / 'back'}", pretrained=True).num_classes == 5


UNSAYABLE = {
    "eps": (lambda config: replace(config, norm=LayerNorm(eps=1e-12)), r"norm.eps=1e-12"),
    "positions": (lambda config: replace(config, position=Rotary(num_axes=2)), r"position.kind='Rotary'"),
    "pool": (lambda config: replace(config, pool=Prefix(has_mean=True)), r"pool.has_mean=True"),
    "biases": (
        lambda config: replace(config, attention=replace(config.attention, out_bias=False)),
        r"cannot have feedforward",
    ),
}


@pytest.mark.parametrize("what", UNSAYABLE)
def test_what_timm_cannot_say_is_not_exported(what: str, case_of: CaseOf, tmp_path: Path) -> None:
    change, message = UNSAYABLE[what]
    imported = case_of(PLAIN).imported
    architecture = change(imported.model.config)
    model = Model(architecture, specs((), imported.model.readouts))
    with pytest.raises(ConfigError, match=message):
        write_directory(tmp_path / "back", architecture, imported.tokenizer, model, "timm")
    assert not (tmp_path / "back").exists()


def test_a_label_with_a_pool_of_its_own_is_not_exported(case_of: CaseOf, tmp_path: Path) -> None:
    imported = case_of(PLAIN).imported
    (readout,) = imported.model.readouts
    model = Model(imported.model.config, specs((), [replace(readout, pool=Mean())]))
    with pytest.raises(ConfigError, match="label 'label' must read the model's own to be exported; its pool is Mean"):
        write_directory(tmp_path / "back", imported.model.config, imported.tokenizer, model, "timm")
