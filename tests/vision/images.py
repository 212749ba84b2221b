"""Models of images at random weights, in folders as their libraries save them, and models that are not quite theirs."""

from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from meristem.model.model import Model
from references import redraw


def redraw_image_model(model: nn.Module, rng: np.random.Generator) -> Any:
    """As `redraw`, with factors of branches that may turn a sign, and latent queries as large as rows."""
    model = redraw(model, rng)
    for name, parameter in model.named_parameters():
        if name.endswith((".gamma", ".lambda1", ".latent")):
            parameter.data = torch.from_numpy(rng.standard_normal(parameter.shape, dtype=np.float32))
    return model


def take_tanh_gelu(model: Model) -> None:
    for block in model.trunk.blocks:
        block.feedforward.activation = lambda x: F.gelu(x, approximate="tanh")


def take_erf_gelu(model: Model) -> None:
    for block in model.trunk.blocks:
        block.feedforward.activation = F.gelu


def take_foreign_epsilon(model: Model) -> None:
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-2 if module.eps < 1e-3 else 1e-5


def shift_positions(model: Model) -> None:
    table = model.trunk.embedding.position.table
    table.weight.data = table.weight.data.roll(1, 0)


def turn_grid(model: Model) -> None:
    """Places are numbered column after column."""
    position = model.trunk.embedding.position
    rows, columns = position.config.grid
    order = torch.arange(rows * columns).view(rows, columns).t().flatten()
    position.table.weight.data = position.table.weight.data[order]


def drop_layer_scale(model: Model) -> None:
    model.trunk.blocks[0].attention_scale = None


def swap_layer_scales(model: Model) -> None:
    block = model.trunk.blocks[-1]
    block.attention_scale, block.feedforward_scale = block.feedforward_scale, block.attention_scale


def put_channels_last(model: Model) -> None:
    """Features of a patch are ordered by (row, column, channel)."""
    patches = model.trunk.embedding.patches
    channels = 3
    order = torch.arange(patches.in_features).view(channels, -1).t().flatten()
    patches.weight.data = patches.weight.data[:, order]


def swap_norms(model: Model) -> None:
    block = model.trunk.blocks[1]
    block.attention_norm, block.feedforward_norm = block.feedforward_norm, block.attention_norm


def drop_value_bias(model: Model) -> None:
    model.trunk.blocks[0].attention.qkv.bias.data[-2:] = 0


def swap_special_tokens(model: Model) -> None:
    """The first two symbols change places."""
    symbols = model.trunk.embedding.symbols.weight.data
    symbols[:2] = symbols[:2].flip(0)


def drop_final_norm(model: Model) -> None:
    model.trunk.final_norm = nn.Identity()


def swap_gate_and_value(model: Model) -> None:
    for block in model.trunk.blocks:
        weight = block.feedforward.up.weight
        weight.data = torch.cat(list(weight.data.chunk(2))[::-1])
