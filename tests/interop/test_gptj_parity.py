"""GPT-J and CodeGen give the numbers of `transformers`, and mutants of them are caught."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from decoder_cases import (
    CaseOf,
    cases,
    drop_down_bias,
    drop_final_norm,
    drop_symbol_bias,
    drop_up_bias,
    rotate_the_other_way,
    rotate_two_less,
    rotate_two_more,
    row_of,
    see_the_future,
    swap_keys_and_values,
    take_another_epsilon,
    take_exact_gelu,
    take_neighbouring_head,
    take_quick_gelu,
)

from meristem.interop.directory import read_directory
from meristem.interop.families.gptj import CODEGEN, GPTJ, TABLE
from meristem.model.model import Model
from parity_checks import refuse_distance

SHAPE = {"vocab_size": 64, "n_positions": 60, "n_embd": 32, "n_layer": 3, "n_head": 4, "rotary_dim": 4}
ODD = {"vocab_size": 61, "n_positions": 54, "n_embd": 30, "n_layer": 3, "n_head": 3, "rotary_dim": 6, "n_inner": 51}
ODD_SHARES = {**ODD, "n_embd": 80, "n_head": 8}

SHAPES = {
    "GPT-J": (GPTJ, "GPTJForCausalLM", SHAPE),
    "GPT-J odd": (GPTJ, "GPTJForCausalLM", {**ODD, "tie_word_embeddings": True, "activation_function": "quick_gelu"}),
    "CodeGen": (CODEGEN, "CodeGenForCausalLM", SHAPE),
    "CodeGen odd": (CODEGEN, "CodeGenForCausalLM", {**ODD_SHARES, "activation_function": "gelu"}),
    "CodeGen whole heads": (CODEGEN, "CodeGenForCausalLM", {**SHAPE, "rotary_dim": 8}),
}

every_shape = pytest.mark.parametrize("shape", list(SHAPES))


@pytest.fixture(scope="module")
def case_of(tmp_path_factory: pytest.TempPathFactory) -> CaseOf:
    return cases(SHAPES, tmp_path_factory)


@every_shape
def test_layers_and_logits_are_those_of_the_reference(
    shape: str, case_of: CaseOf, rng: np.random.Generator, parity_row: Callable[..., None]
) -> None:
    case = case_of(shape)
    parity_row(*row_of(case), library="transformers", forward=case.check_forward(rng))


@every_shape
def test_gradients_are_those_of_the_reference(
    shape: str, case_of: CaseOf, rng: np.random.Generator, tmp_path: Path, parity_row: Callable[..., None]
) -> None:
    case = case_of(shape)
    parity_row(*row_of(case), gradients=case.check_gradients(rng, tmp_path))


@every_shape
def test_an_exported_directory_gives_the_same_in_the_reference(
    shape: str, case_of: CaseOf, rng: np.random.Generator, tmp_path: Path, parity_row: Callable[..., None]
) -> None:
    case = case_of(shape)
    parity_row(*row_of(case), export=case.check_export(rng, tmp_path))


def read_shares_as_queries_keys_values(model: Model) -> None:
    """As if a share held its maps in the order that every other family has."""
    weight = model.trunk.blocks[1].attention.qkv.weight
    query, key, value = weight.data.chunk(3)
    weight.data = torch.cat([query, value, key])


def read_as_one_share(model: Model) -> None:
    """As if the maps of all heads came one after the other: queries, values, keys."""
    weight = model.trunk.blocks[1].attention.qkv.weight
    query, key, value = weight.data.unflatten(0, (3, 4, -1)).unbind(0)
    stored = torch.stack([query, value, key], dim=1).flatten(0, 2)
    query, value, key = stored.chunk(3)
    weight.data = torch.cat([query, key, value])


def feed_before_attention(model: Model) -> None:
    """One branch after the other, with the same norm, where the family has both at once."""
    block = model.trunk.blocks[1]
    block.feedforward_norm, block.residual = block.attention_norm, type(block.residual)(placement="before")


COMMON = [
    drop_up_bias,
    drop_down_bias,
    drop_symbol_bias,
    drop_final_norm,
    swap_keys_and_values,
    rotate_the_other_way,
    rotate_two_more,
    rotate_two_less,
    feed_before_attention,
    see_the_future,
    take_exact_gelu,
    take_another_epsilon,
]
MUTANTS = [
    *(("GPT-J", mutant) for mutant in (*COMMON, take_neighbouring_head)),
    *(("CodeGen", mutant) for mutant in (*COMMON, read_shares_as_queries_keys_values, read_as_one_share)),
    *(("CodeGen odd", mutant) for mutant in (read_shares_as_queries_keys_values, read_as_one_share, take_quick_gelu)),
]


@pytest.mark.parametrize(("shape", "mutant"), MUTANTS, ids=lambda v: v if isinstance(v, str) else v.__name__)
def test_a_mutant_is_caught(
    shape: str, mutant: Callable[[Model], None], case_of: CaseOf, rng: np.random.Generator
) -> None:
    case_of(shape).check_mutant(rng, mutant)


def test_shares_of_codegen_hold_queries_values_and_keys_of_a_quarter_of_the_heads(
    case_of: CaseOf, rng: np.random.Generator
) -> None:
    """Head by head, from the stored matrix, as its layout is described."""
    case = case_of("CodeGen odd")
    width, heads, head_width = 80, 8, 10
    stored = case.reference.transformer.h[1].attn.qkv_proj.weight.detach()
    ours = case.imported.model.trunk.blocks[1].attention.qkv.weight.view(3, heads, head_width, width)
    place = {"query": 0, "value": 1, "key": 2}
    for head in range(heads):
        share, within = divmod(head, heads // 4)
        for index, kind in enumerate(("query", "key", "value")):
            first = share * 3 * width // 4 + place[kind] * width // 4 + within * head_width
            assert torch.equal(ours[index, head], stored[first : first + head_width])


def test_codegen_is_gpt_j_with_its_maps_in_shares(case_of: CaseOf, tmp_path: Path) -> None:
    """One architecture: a model of the one can be written as the other."""
    imported = case_of("CodeGen").imported
    tensors = imported.model.state_dict()
    foreign = TABLE.write(tensors, imported.model.config)
    assert {name for name in foreign if ".attn." in name and ".0." in name} == {
        f"transformer.h.0.attn.{name}_proj.weight" for name in ("q", "k", "v", "out")
    }
    assert GPTJ.read_config(GPTJ.write_config(imported.model.config, None), {}) == imported.model.config


@every_shape
def test_a_trunk_saved_alone_has_no_head(shape: str, case_of: CaseOf, rng: np.random.Generator, tmp_path: Path) -> None:
    case = case_of(shape)
    case.reference.transformer.save_pretrained(tmp_path / "trunk")
    imported = read_directory(tmp_path / "trunk", case.family)
    assert not imported.model.heads
    refuse_distance(case.compare(imported.model, case.family.runner.load(tmp_path / "trunk"), rng))
