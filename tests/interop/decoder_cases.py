"""Decoders at random weights in both libraries, and the mutants that more than one of their families must catch."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F

from meristem.interop.family import Family
from meristem.model.config import BandScaling, Both, Full, LinearScaling, NoScaling, Pattern, Rotary, Window
from meristem.model.model import Model
from parity_checks import Case
from references import PlainIds, redraw, save

CaseOf = Callable[[str], Case]
Shapes = Mapping[str, tuple[Family, str, dict[str, Any]]]
"""By name: the family, its foreign class, and the settings of its foreign config."""


def cases(shapes: Shapes, tmp_path_factory: pytest.TempPathFactory) -> CaseOf:
    """Cases by shape name, each made once, every parameter redrawn."""
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    print(f"reference seed={seed}")

    @cache
    def make(shape: str) -> Case:
        family, name, settings = shapes[shape]
        foreign = getattr(transformers, name)
        sharp = 2.0 if settings.get("scale_attn_weights", True) else 1.0
        model = redraw(foreign(foreign.config_class(**settings)), np.random.default_rng(seed), sharp)
        sharpen(model)
        folder: Path = save(model, tmp_path_factory.mktemp(shape.replace(" ", "_")) / "hf")
        return Case.of(folder, family, PlainIds(settings["vocab_size"]))

    return make


def row_of(case: Case) -> tuple[str, str]:
    """Family and shape, as the page of parity has them."""
    config = case.imported.model.config
    heads, keys, width = config.attention.num_heads, config.num_kv_heads, config.head_width
    words = [f"{config.num_layers} layers of {config.width}", f"{heads} heads of {width}"]
    words += [f"{keys} for keys"] if keys != heads else []
    parts = [config.layer(layer) for layer in range(config.num_layers)]
    windows = sum(isinstance(part.attention.pattern, Both) for part in parts)
    words += [f"a window in {windows}"] if windows else []
    words += [f"{config.feedforward.activation}", f"{config.embedding.vocab_size} symbols"]
    if isinstance(config.position, Rotary):
        turned, scaling = config.position.width, config.position.scaling
        words += [f"{turned} of {width} features turned"] if turned else []
        words += (
            [{LinearScaling: "linear scaling", BandScaling: "scaling by bands"}[type(scaling)]]
            if (scaling != NoScaling())
            else []
        )
    return case.family.name, ", ".join(words)


def sharpen(model: nn.Module) -> None:
    """Norms of queries and keys undo what their maps were drawn with."""
    for name, parameter in model.named_parameters():
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            parameter.data *= 2


def drop_qkv_bias(model: Model) -> None:
    model.trunk.blocks[1].attention.qkv.bias = None


def drop_out_bias(model: Model) -> None:
    model.trunk.blocks[-1].attention.out.bias = None


def drop_up_bias(model: Model) -> None:
    model.trunk.blocks[0].feedforward.up.bias = None


def drop_down_bias(model: Model) -> None:
    model.trunk.blocks[1].feedforward.down.bias = None


def swap_norms(model: Model) -> None:
    block = model.trunk.blocks[1]
    block.attention_norm, block.feedforward_norm = block.feedforward_norm, block.attention_norm


def drop_final_norm(model: Model) -> None:
    model.trunk.final_norm = nn.Identity()


def take_another_epsilon(model: Model) -> None:
    for module in model.modules():
        if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
            module.eps = 1e-3


def take_exact_gelu(model: Model) -> None:
    for block in model.trunk.blocks:
        block.feedforward.activation = F.gelu


def take_tanh_gelu(model: Model) -> None:
    for block in model.trunk.blocks:
        block.feedforward.activation = lambda x: F.gelu(x, approximate="tanh")


def take_quick_gelu(model: Model) -> None:
    for block in model.trunk.blocks:
        block.feedforward.activation = lambda x: x * torch.sigmoid(1.702 * x)


def swap_gate_and_value(model: Model) -> None:
    weight = model.trunk.blocks[1].feedforward.up.weight
    weight.data = torch.cat(weight.data.chunk(2)[::-1])


def swap_keys_and_values(model: Model) -> None:
    attention = model.trunk.blocks[1].attention
    keys = attention.num_kv_heads * attention.head_width
    for tensor in attention.qkv.parameters():
        query, key, value = tensor.data.split([len(tensor) - 2 * keys, keys, keys])
        tensor.data = torch.cat([query, value, key])


def take_neighbouring_head(model: Model) -> None:
    """Keys of one head serve the queries of the next."""
    attention = model.trunk.blocks[0].attention
    keys, width = attention.num_kv_heads * attention.head_width, attention.head_width
    for tensor in attention.qkv.parameters():
        query, key, value = tensor.data.split([len(tensor) - 2 * keys, keys, keys])
        tensor.data = torch.cat([query, key.roll(width, 0), value])


def change_pattern(model: Model, layer: int, change: Callable[[Pattern], Pattern]) -> None:
    attention = model.trunk.blocks[layer].attention
    attention.config = replace(attention.config, pattern=change(attention.config.pattern))


def see_the_future(model: Model) -> None:
    change_pattern(model, 1, lambda pattern: Full())


def reach(more: int) -> Callable[[Pattern], Pattern]:
    def change(pattern: Pattern) -> Pattern:
        assert isinstance(pattern, Both), pattern
        return Both(parts=tuple(replace(p, left=p.left + more) if isinstance(p, Window) else p for p in pattern.parts))

    return change


def windowed_layer(model: Model) -> int:
    """The last layer that has a window."""
    windowed = [i for i, b in enumerate(model.trunk.blocks) if isinstance(b.attention.config.pattern, Both)]
    return windowed[-1]


def see_one_more(model: Model) -> None:
    change_pattern(model, windowed_layer(model), reach(1))


def see_one_less(model: Model) -> None:
    change_pattern(model, windowed_layer(model), reach(-1))


def take_standard_scale(model: Model) -> None:
    attention = model.trunk.blocks[-1].attention
    attention.config = replace(attention.config, scale=None)


def change_rotation(model: Model, **changes: object) -> None:
    for position in model.trunk.positions:
        position.config = replace(position.config, **changes)
        position.width = position.config.width or position.head_width


def rotate_the_other_way(model: Model) -> None:
    """Interleaved for halves, and halves for interleaved."""
    for position in model.trunk.positions:
        position.config = replace(position.config, is_interleaved=not position.config.is_interleaved)


def rotate_two_more(model: Model) -> None:
    change_rotation(model, width=model.trunk.positions[0].width + 2)


def rotate_two_less(model: Model) -> None:
    change_rotation(model, width=model.trunk.positions[0].width - 2)


def take_another_base(model: Model) -> None:
    change_rotation(model, base=1.02 * model.trunk.positions[0].config.base)


def drop_scaling(model: Model) -> None:
    change_rotation(model, scaling=NoScaling())


def shift_positions(model: Model) -> None:
    position = model.trunk.embedding.position
    position.config = replace(position.config, offset=1)


def drop_symbol_bias(model: Model) -> None:
    model.heads["tokens"].bias = None


def swap_query_and_key_norms(model: Model) -> None:
    attention = model.trunk.blocks[1].attention
    attention.q_norm, attention.k_norm = attention.k_norm, attention.q_norm


def drop_query_norm(model: Model) -> None:
    model.trunk.blocks[1].attention.q_norm = nn.Identity()
