"""ESM-C gives the numbers of `transformers`, and its mutants are caught."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import EsmcConfig, EsmcForMaskedLM, EsmcModel, EsmcTokenizer

from meristem.errors import ConfigError
from meristem.interop.directory import read_directory, write_directory
from meristem.interop.families.esmc import ESMC, SYMBOLS
from meristem.interop.runners import load_transformers
from meristem.model.model import Model
from parity_checks import Case
from references import redraw, save

TOLERANCE = 2e-5
"""The same operations in fp32; pre-norm sums grow over the layers, and the last norm brings them back."""

SHAPES: dict[str, dict[str, Any]] = {
    "4 layers of 48, 4 heads": {"hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4},
    "3 layers of 50, 5 heads, biases, 71 symbols, base 500": {
        "hidden_size": 50,
        "num_hidden_layers": 3,
        "num_attention_heads": 5,
        "vocab_size": 71,
        "attention_bias": True,
        "mlp_bias": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    },
}
FIRST, ODD = SHAPES


def model_of(shape: str, rng: np.random.Generator, kind: type = EsmcForMaskedLM) -> nn.Module:
    return redraw(kind(EsmcConfig(**{"intermediate_size": 70, **SHAPES[shape]})), rng, symbols=3.0)


def esmc(shape: str, folder: Path, rng: np.random.Generator, kind: type = EsmcForMaskedLM) -> Case:
    return Case.of(save(model_of(shape, rng, kind), folder / "hf", {"vocab.txt": "\n".join(SYMBOLS)}), ESMC)


@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_gradients_and_export_are_those_of_the_reference(
    shape: str, tmp_path: Path, rng: np.random.Generator, parity_row: Callable[..., None]
) -> None:
    case = esmc(shape, tmp_path, rng)
    forward = case.check_forward(rng, TOLERANCE)
    gradients = case.check_gradients(rng, tmp_path, ignore=("trunk.final_norm.bias",))
    export = case.check_export(rng, tmp_path, TOLERANCE)
    parity_row("ESM-C", shape, library="transformers", forward=forward, gradients=gradients, export=export)


def test_a_trunk_saved_alone_comes_and_goes(tmp_path: Path, rng: np.random.Generator) -> None:
    case = esmc(FIRST, tmp_path, rng, EsmcModel)
    assert list(case.imported.model.heads) == []
    case.check_forward(rng, TOLERANCE)
    case.check_export(rng, tmp_path, TOLERANCE)
    assert type(load_transformers(tmp_path / "back")) is EsmcModel


def test_ids_are_those_of_the_reference_s_tokenizer(tmp_path: Path, rng: np.random.Generator) -> None:
    folder = save(model_of(FIRST, rng), tmp_path / "hf")
    theirs = EsmcTokenizer()
    theirs.save_pretrained(folder)
    imported = read_directory(folder)
    assert imported.tokenizer.vocab == SYMBOLS
    for sequence in ("MKTAYIAKQRX", "ACDE|FGHIK", "LAGVSERTIDPKQNFYMHWCXBUZO.-"):
        assert imported.tokenizer.encode(sequence).ids.tolist() == theirs(sequence)["input_ids"]
    # and of a directory that we wrote
    write_directory(tmp_path / "back", imported.model.config, imported.tokenizer, imported.model)
    back = EsmcTokenizer.from_pretrained(tmp_path / "back")
    assert back("MKT|A")["input_ids"] == theirs("MKT|A")["input_ids"]
    assert read_directory(tmp_path / "back").tokenizer == imported.tokenizer


def test_a_last_norm_with_a_bias_is_not_exported(tmp_path: Path, rng: np.random.Generator) -> None:
    """The reference has no place for it: an imported model that was trained on has one."""
    imported = esmc(FIRST, tmp_path, rng).imported
    imported.model.trunk.final_norm.bias.data[3] = 0.1
    with pytest.raises(ConfigError, match=r"no place for trunk\.final_norm\.bias, which must be zero"):
        write_directory(tmp_path / "back", imported.model.config, imported.tokenizer, imported.model)


class HeadNorm(nn.Module):
    """Norms each head by itself, with the weights of a norm over all of them."""

    def __init__(self, wide: nn.LayerNorm, num_heads: int):
        super().__init__()
        self.wide, self.num_heads = wide, num_heads

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = x.reshape(len(x), self.num_heads, -1)
        normed = nn.functional.layer_norm(heads, heads.shape[-1:], eps=self.wide.eps).reshape(len(x), -1)
        return (normed * self.wide.weight).view_as(x)


def norm_each_head(model: Model) -> None:
    for block in model.trunk.blocks:
        block.attention.q_norm = HeadNorm(block.attention.q_norm, block.attention.num_heads)


def drop_key_norm(model: Model) -> None:
    model.trunk.blocks[1].attention.k_norm = nn.Identity()


def add_branches_as_they_are(model: Model) -> None:
    for block in model.trunk.blocks:
        block.residual = replace(block.residual, scale=1.0)


def swap_gate_and_value(model: Model) -> None:
    up = model.trunk.blocks[2].feedforward.up.weight.data
    up.copy_(torch.cat(up.chunk(2)[::-1]))


def drop_norm_bias(model: Model) -> None:
    model.trunk.blocks[0].attention_norm.bias = None


@pytest.mark.parametrize(
    "mutate", [norm_each_head, drop_key_norm, add_branches_as_they_are, swap_gate_and_value, drop_norm_bias]
)
def test_a_mutant_is_caught(mutate: Callable[[Model], None], tmp_path: Path, rng: np.random.Generator) -> None:
    esmc(FIRST, tmp_path, rng).check_mutant(rng, mutate)
