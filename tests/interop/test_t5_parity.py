"""T5, T5 v1.1 and the encoder alone give the numbers and gradients of `transformers`, and mutants are caught."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import T5Config, T5EncoderModel, T5ForConditionalGeneration, T5Model

from meristem.interop.families.t5 import T5, T5_ENCODER
from meristem.interop.family import Family
from meristem.model.model import Model
from meristem.model.position import BetweenLayer
from parity_checks import Case
from references import PlainIds, redraw, save

SMALL = {
    "vocab_size": 64,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    # sources of 46 tokens reach the last bucket of both stacks
    "relative_attention_num_buckets": 16,
    "relative_attention_max_distance": 32,
}

ODD = {
    **SMALL,
    "vocab_size": 53,
    "d_model": 30,
    "d_kv": 7,
    "d_ff": 23,
    "num_decoder_layers": 3,
    "num_heads": 3,
    "relative_attention_num_buckets": 12,
    "relative_attention_max_distance": 21,
    # so large that a foreign one shows
    "layer_norm_epsilon": 1e-3,
}

V1_1 = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}

SILU = {"feed_forward_proj": "gated-silu"}

SHAPES: dict[str, tuple[Any, Family, dict[str, Any]]] = {
    "T5, 2 + 2 layers of 32": (T5ForConditionalGeneration, T5, SMALL),
    "T5, 2 + 3 layers of 30, heads of 7": (T5ForConditionalGeneration, T5, ODD),
    "v1.1, 2 + 2 layers of 32": (T5ForConditionalGeneration, T5, {**SMALL, **V1_1}),
    "v1.1, 2 + 3 layers of 30, heads of 7": (T5ForConditionalGeneration, T5, {**ODD, **V1_1}),
    "gated SiLU, tied, not scaled": (
        T5ForConditionalGeneration,
        T5,
        {**ODD, **V1_1, "feed_forward_proj": "gated-silu"},
    ),
    "no head": (T5Model, T5, ODD),
    "the encoder, 2 layers of 32": (T5EncoderModel, T5_ENCODER, SMALL),
    "the encoder, 2 layers of 30, heads of 7": (T5EncoderModel, T5_ENCODER, ODD),
}

PLAIN, ODD_V1_1, ENCODER = (name for name in SHAPES if "of 7" in name)

CaseOf = Callable[[str], Case]


def make(shape: str, folder: Path, rng: np.random.Generator, **settings: object) -> Path:
    """A directory of a redrawn model; v1.1 has a head that is not its embedding, whatever the library ties."""
    kind, _, values = SHAPES[shape]
    model = kind(T5Config(**{**values, **settings}))
    if shape.startswith("v1.1"):
        model.lm_head.weight = nn.Parameter(torch.empty_like(model.lm_head.weight))
        model.config.tie_word_embeddings = False
    # scores are not divided by sqrt(head width): they are sharp as they are
    return save(redraw(model, rng, sharp=0.8), folder)


@pytest.fixture(scope="session")
def case_of(tmp_path_factory: pytest.TempPathFactory) -> CaseOf:
    """Each shape, read by both libraries once a session."""
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    print(f"reference seed={seed}")

    @cache
    def read(shape: str) -> Case:
        folder = make(shape, tmp_path_factory.mktemp("t5") / "hf", np.random.default_rng(seed))
        _, family, values = SHAPES[shape]
        return Case.of(folder, family, PlainIds(values["vocab_size"], suffix=(1,), reserved=(0,)))

    return read


@pytest.mark.parametrize("shape", SHAPES)
def test_layers_and_logits_are_those_of_the_reference(
    shape: str, case_of: CaseOf, rng: np.random.Generator, parity_row: Callable[..., None]
) -> None:
    largest = case_of(shape).check_forward(rng)
    parity_row("T5", shape, library="transformers", forward=largest)


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_are_those_of_the_reference(
    shape: str, case_of: CaseOf, rng: np.random.Generator, tmp_path: Path, parity_row: Callable[..., None]
) -> None:
    largest = case_of(shape).check_gradients(rng, tmp_path)
    parity_row("T5", shape, gradients=largest)


@pytest.mark.parametrize("shape", SHAPES)
def test_exported_models_load_in_transformers_and_give_the_same(
    shape: str, case_of: CaseOf, rng: np.random.Generator, tmp_path: Path, parity_row: Callable[..., None]
) -> None:
    case = case_of(shape)
    parity_row("T5", shape, export=case.check_export(rng, tmp_path))
    _, info = SHAPES[shape][0].from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(info.values()), info


def stacks(model: Model) -> list[Any]:
    trunk = model.trunk
    return [trunk.encoder, trunk.decoder] if model.config.num_decoder_layers else [trunk]


def divide_scores(model: Model) -> None:
    attention = stacks(model)[0].blocks[-1].attention
    attention.config = replace(attention.config, scale=None)


def divide_scores_of_source(model: Model) -> None:
    cross = model.trunk.decoder.blocks[0].cross
    cross.config = replace(cross.config, scale=None)


def take_exact_gelu(model: Model) -> None:
    for block in stacks(model)[-1].blocks:
        block.feedforward.activation = F.gelu


def take_gelu(model: Model) -> None:
    stacks(model)[-1].blocks[0].feedforward.activation = F.gelu


def swap_gate_and_value(model: Model) -> None:
    up = stacks(model)[0].blocks[0].feedforward.up
    up.weight.data = torch.cat(list(up.weight.data.chunk(2))[::-1])


def look_both_ways_in_decoder(model: Model) -> None:
    position = model.trunk.decoder.positions[0]
    position.config = replace(position.config, is_two_sided=True)


def look_back_in_encoder(model: Model) -> None:
    position = stacks(model)[0].positions[0]
    position.config = replace(position.config, is_two_sided=False)


def keep_buckets_to_first_layer(model: Model) -> None:
    """The table of the first layer, which the others do not share."""
    stack = stacks(model)[-1]
    stack.positions.append(BetweenLayer())
    for block in stack.blocks[1:]:
        block.attention.position = 1


def share_buckets_between_stacks(model: Model) -> None:
    model.trunk.decoder.positions[0].table = model.trunk.encoder.positions[0].table


def bound_one_off(model: Model) -> None:
    position = stacks(model)[0].positions[0]
    position.config = replace(position.config, max_distance=position.config.max_distance - 4)


def see_the_future(model: Model) -> None:
    attention = model.trunk.decoder.blocks[-1].attention
    attention.config = model.trunk.encoder.blocks[0].attention.config


def swap_norms(model: Model) -> None:
    block = stacks(model)[-1].blocks[0]
    block.attention_norm, block.feedforward_norm = block.feedforward_norm, block.attention_norm


def take_norm_of_attention_for_source(model: Model) -> None:
    block = model.trunk.decoder.blocks[-1]
    block.cross_norm = block.attention_norm


def take_away_means(model: Model) -> None:
    """A layer norm in the place of the last RMS norm."""
    stack, width = stacks(model)[-1], model.config.width
    norm = nn.LayerNorm(width, eps=stack.final_norm.eps, bias=False)
    norm.weight = stack.final_norm.weight
    stack.final_norm = norm


def take_foreign_epsilon(model: Model) -> None:
    for module in model.modules():
        if isinstance(module, nn.RMSNorm):
            module.eps = 1e-6


def drop_final_norm_of_encoder(model: Model) -> None:
    stacks(model)[0].final_norm = nn.Identity()


def swap_keys_and_values_of_source(model: Model) -> None:
    kv = model.trunk.decoder.blocks[0].cross.kv
    kv.weight.data = torch.cat(list(kv.weight.data.chunk(2))[::-1])


def scale_rows_otherwise(model: Model) -> None:
    """Rows are scaled before a head where they should not be, and the other way round."""
    head = model.heads["tokens"]
    head.config = replace(head.config, scale=1.0 if head.config.scale != 1.0 else model.config.width**-0.5)


def tie_head(model: Model) -> None:
    model.heads["tokens"].out.weight = model.trunk.embedding.symbols.weight


def scale_embedding(model: Model) -> None:
    model.trunk.embedding.config = replace(model.trunk.embedding.config, scale=model.config.width**0.5)


EVERYWHERE = [
    divide_scores,
    look_back_in_encoder,
    keep_buckets_to_first_layer,
    bound_one_off,
    swap_norms,
    take_away_means,
    take_foreign_epsilon,
    drop_final_norm_of_encoder,
    scale_embedding,
]

WITH_DECODER = [
    divide_scores_of_source,
    look_both_ways_in_decoder,
    share_buckets_between_stacks,
    see_the_future,
    take_norm_of_attention_for_source,
    swap_keys_and_values_of_source,
    scale_rows_otherwise,
]

MUTANTS = [
    *((shape, mutate) for shape in (PLAIN, ODD_V1_1, ENCODER) for mutate in EVERYWHERE),
    *((shape, mutate) for shape in (PLAIN, ODD_V1_1) for mutate in WITH_DECODER),
    *((ODD_V1_1, mutate) for mutate in (take_exact_gelu, swap_gate_and_value, tie_head)),
    *((shape, take_gelu) for shape in (PLAIN, ENCODER)),
]


@pytest.mark.parametrize(
    ("shape", "mutate"), MUTANTS, ids=lambda value: value if isinstance(value, str) else value.__name__
)
def test_a_mutant_is_caught(
    shape: str, mutate: Callable[[Model], None], case_of: CaseOf, rng: np.random.Generator
) -> None:
    case_of(shape).check_mutant(rng, mutate)
