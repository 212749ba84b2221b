"""Switch and its encoder alone give the numbers and gradients of `transformers`, dropped tokens included."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    SwitchTransformersConfig,
    SwitchTransformersEncoderModel,
    SwitchTransformersForConditionalGeneration,
    SwitchTransformersModel,
)

from meristem.data.pack import pack
from meristem.data.tokenizer import Tokenizer
from meristem.errors import CheckpointError, ConfigError
from meristem.interop.directory import read_model
from meristem.interop.families.switch import SWITCH, SWITCH_DEFAULTS, SWITCH_ENCODER, read_config, write_config
from meristem.interop.families.t5 import FIELDS, T5
from meristem.interop.family import Family
from meristem.interop.runners import PAIRS, SEQUENCES, Runner
from meristem.interop.settings import Settings
from meristem.model.experts import ExpertsLayer
from meristem.model.model import Model
from meristem.types import SOURCE, Hidden, Layout, Routing, Tokens
from parity_checks import Case
from references import PlainIds, redraw, save

MARGIN = 3e-4
"""Least difference of the two best logits of a router: ten times what layers differ by."""

SMALL = {
    "vocab_size": 64,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_sparse_encoder_layers": 1,
    "num_sparse_decoder_layers": 1,
    "num_heads": 4,
    "num_experts": 4,
    # sources of 46 tokens send an expert some 11
    "expert_capacity": 6,
    "relative_attention_num_buckets": 16,
    "relative_attention_max_distance": 32,
}

ODD = {
    **SMALL,
    "vocab_size": 53,
    "d_model": 30,
    "d_kv": 7,
    "d_ff": 23,
    # every second layer of the encoder, every one of the decoder
    "num_layers": 5,
    "num_decoder_layers": 3,
    "num_sparse_encoder_layers": 2,
    "num_sparse_decoder_layers": 3,
    "num_heads": 3,
    "num_experts": 3,
    "expert_capacity": 2,
    "relative_attention_num_buckets": 12,
    "relative_attention_max_distance": 21,
    "dense_act_fn": "gelu",
    "layer_norm_epsilon": 1e-3,
}

SHAPES: dict[str, tuple[Any, Family, dict[str, Any]]] = {
    "2 + 2 layers of 32, 4 experts": (SwitchTransformersForConditionalGeneration, SWITCH, SMALL),
    "5 + 3 layers of 30, heads of 7, 3 experts": (SwitchTransformersForConditionalGeneration, SWITCH, ODD),
    "no head": (SwitchTransformersModel, SWITCH, ODD),
    "the encoder, 5 layers of 30, heads of 7": (SwitchTransformersEncoderModel, SWITCH_ENCODER, ODD),
}

EVEN_SHAPE, ODD_SHAPE = (name for name in SHAPES if "experts" in name)

CaseOf = Callable[[str], Case]


def layers_of(hidden: Hidden) -> Mapping[int, Routing]:
    """What the routers of both stacks did."""
    return {**hidden.routing, **(hidden.source.routing if hidden.source is not None else {})}


def routings(model: Model, sequences: list[Tokens]) -> Mapping[int, Routing]:
    num_records = sum(tokens.side != SOURCE for tokens in sequences)
    with torch.inference_mode():
        batch = pack(sequences, [*range(num_records)] * (len(sequences) // num_records))
        return layers_of(model.trunk(batch))


def off_the_edge(runner: Runner) -> Runner:
    """Draws again where a token stands between two experts: rounding alone would send it to the one or the other."""

    def draw(model: Model, tokenizer: Tokenizer, rng: np.random.Generator) -> list[Tokens]:
        for _ in range(100):
            sequences = runner.draw(model, tokenizer, rng)
            best = [r.logits[: r.layout.num_tokens].topk(2).values for r in routings(model, sequences).values()]
            if min(float((two[:, 0] - two[:, 1]).min()) for two in best) > MARGIN:
                return sequences
        raise AssertionError("every draw has a token between two experts")

    return replace(runner, draw=draw)


def make(shape: str, folder: Path, rng: np.random.Generator, **settings: object) -> Path:
    kind, _, values = SHAPES[shape]
    # scores are not divided by sqrt(head width): they are sharp as they are
    model = redraw(kind(SwitchTransformersConfig(**{**values, **settings})), rng, sharp=0.8)
    for module in model.modules():
        if type(module).__name__ == "SwitchTransformersTop1Router":
            module.classifier.weight.data *= 2
    return save(model, folder)


@pytest.fixture(scope="session")
def case_of(tmp_path_factory: pytest.TempPathFactory) -> CaseOf:
    """Each shape, read by both libraries once a session."""
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    print(f"reference seed={seed}")

    @cache
    def read(shape: str) -> Case:
        folder = make(shape, tmp_path_factory.mktemp("switch") / "hf", np.random.default_rng(seed))
        _, family, values = SHAPES[shape]
        assert family.runner is not None
        family = replace(family, runner=off_the_edge(family.runner))
        return Case.of(folder, family, PlainIds(values["vocab_size"], suffix=(1,), reserved=(0,)))

    return read


@pytest.mark.parametrize("shape", SHAPES)
def test_layers_and_logits_are_those_of_the_reference(
    shape: str, case_of: CaseOf, rng: np.random.Generator, parity_row: Callable[..., None]
) -> None:
    largest = case_of(shape).check_forward(rng)
    parity_row("Switch", shape, library="transformers", forward=largest)


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_are_those_of_the_reference(
    shape: str, case_of: CaseOf, rng: np.random.Generator, tmp_path: Path, parity_row: Callable[..., None]
) -> None:
    largest = case_of(shape).check_gradients(rng, tmp_path)
    parity_row("Switch", shape, gradients=largest)


@pytest.mark.parametrize("shape", SHAPES)
def test_exported_models_load_in_transformers_and_give_the_same(
    shape: str, case_of: CaseOf, rng: np.random.Generator, tmp_path: Path, parity_row: Callable[..., None]
) -> None:
    parity_row("Switch", shape, export=case_of(shape).check_export(rng, tmp_path))
    _, info = SHAPES[shape][0].from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(info.values()), info


@pytest.mark.parametrize("shape", [EVEN_SHAPE, ODD_SHAPE])
def test_these_inputs_overflow_the_experts_and_choose_all_of_them(
    shape: str, case_of: CaseOf, rng: np.random.Generator
) -> None:
    case = case_of(shape)
    sequences = (SEQUENCES if case.family is SWITCH_ENCODER else PAIRS).draw(
        case.imported.model, case.imported.tokenizer, rng
    )
    num_chosen = []
    for layer, routing in routings(case.imported.model, sequences).items():
        rows = slice(routing.layout.num_tokens)
        assert not routing.is_taken[rows].all(), f"layer {layer} drops nothing"
        num_chosen.append(len(routing.chosen[rows].unique()))
    # a router of random weights may send all to one expert
    assert sum(count > 1 for count in num_chosen) > len(num_chosen) / 2, num_chosen


def test_an_untied_head_unties_the_copies_of_the_embedding_there(rng: np.random.Generator, tmp_path: Path) -> None:
    folder = make(EVEN_SHAPE, tmp_path / "hf", rng, tie_word_embeddings=False)
    tensors = load_file(folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="one embedding"):
        read_model(folder)
    copies = {name: tensors["shared.weight"].clone() for name in tensors if "embed_tokens" in name}
    assert len(copies) == 2
    save_file({**tensors, **copies}, folder / "model.safetensors", metadata={"format": "pt"})
    family = replace(SWITCH, runner=off_the_edge(PAIRS))
    case = Case.of(folder, family, PlainIds(64, suffix=(1,), reserved=(0,)))
    assert case.imported.model.config.head is not None
    assert not case.imported.model.config.head.is_tied
    case.check_forward(rng)
    case.check_export(rng, tmp_path)


def experts_of(model: Model) -> list[ExpertsLayer]:
    return [module for module in model.modules() if isinstance(module, ExpertsLayer)]


def lift_capacity(model: Model) -> None:
    for layer in experts_of(model):
        layer.config = replace(layer.config, capacity=None)


def take_one_more(model: Model) -> None:
    for layer in experts_of(model):
        layer.config = replace(layer.config, capacity=layer.config.capacity + 1)


def count_capacity_over_the_pack(model: Model) -> None:
    for layer in experts_of(model):
        count = layer._has_room
        layer._has_room = lambda chosen, layout, count=count: count(chosen, Layout((layout.num_rows,)))


def drop_router_probability(model: Model) -> None:
    for layer in experts_of(model):
        route = layer._route

        def unscaled(
            x: torch.Tensor, layout: Layout, route: Callable[..., Any] = route
        ) -> tuple[Routing, torch.Tensor]:
            routing, shares = route(x, layout)
            return routing, torch.ones_like(shares)

        layer._route = unscaled


def keep_the_last_tokens(model: Model) -> None:
    """Tokens at the end of a sequence go before those at its beginning."""
    for layer in experts_of(model):
        count = layer._has_room

        def turned(chosen: torch.Tensor, layout: Layout, count: Callable[..., torch.Tensor] = count) -> torch.Tensor:
            back = Layout(layout.segments[::-1])
            return count(chosen.flip(0), back).flip(0)

        layer._has_room = turned


def give_dropped_tokens_to_the_first_expert(model: Model) -> None:
    for layer in experts_of(model):
        forward = layer.forward

        def served(
            x: torch.Tensor, layout: Layout, layer: ExpertsLayer = layer, forward: Callable[..., Any] = forward
        ) -> tuple[torch.Tensor, Routing]:
            y, routing = forward(x, layout)
            first = layer.activation(x @ layer.up[0].t()) @ layer.down[0].t()
            return y + first * ~routing.is_taken, routing

        layer.forward = served


def swap_experts(model: Model) -> None:
    layer = experts_of(model)[-1]
    layer.down.data = layer.down.data.roll(1, dims=0)


def send_to_the_second_choice(model: Model) -> None:
    layer = experts_of(model)[0]
    layer.router.weight.data *= -1


def take_tanh_gelu(model: Model) -> None:
    for layer in experts_of(model):
        layer.activation = nn.GELU(approximate="tanh")


def divide_scores(model: Model) -> None:
    attention = model.trunk.decoder.blocks[0].attention
    attention.config = replace(attention.config, scale=None)


def look_both_ways_in_decoder(model: Model) -> None:
    position = model.trunk.decoder.positions[0]
    position.config = replace(position.config, is_two_sided=True)


def drop_scale_of_rows(model: Model) -> None:
    head = model.heads["tokens"]
    head.config = replace(head.config, scale=1.0)


MUTANTS = [
    lift_capacity,
    take_one_more,
    count_capacity_over_the_pack,
    drop_router_probability,
    keep_the_last_tokens,
    give_dropped_tokens_to_the_first_expert,
    swap_experts,
    send_to_the_second_choice,
    divide_scores,
    look_both_ways_in_decoder,
    drop_scale_of_rows,
]


@pytest.mark.parametrize(
    ("shape", "mutate"),
    [*((shape, mutate) for shape in (EVEN_SHAPE, ODD_SHAPE) for mutate in MUTANTS), (ODD_SHAPE, take_tanh_gelu)],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_a_mutant_is_caught(
    shape: str, mutate: Callable[[Model], None], case_of: CaseOf, rng: np.random.Generator
) -> None:
    case_of(shape).check_mutant(rng, mutate)


def test_a_config_that_leaves_settings_out_means_what_it_means_to_the_reference() -> None:
    theirs = SwitchTransformersConfig()
    for name, value in Settings("a Switch", {}, FIELDS, SWITCH_DEFAULTS).items():
        assert value == getattr(theirs, name), name
    least = {"vocab_size": 53, "d_model": 30, "d_ff": 23, "num_layers": 6, "num_heads": 3}
    assert read_config(least, {}) == read_config(SwitchTransformersConfig(**least).to_dict(), {})


@pytest.mark.parametrize("shape", SHAPES)
def test_a_config_written_and_read_is_the_same(shape: str) -> None:
    kind, _, values = SHAPES[shape]
    config = {**SwitchTransformersConfig(**values).to_dict(), "architectures": [kind.__name__]}
    architecture = read_config(config, {})
    num_stacks = 2 if architecture.num_decoder_layers else 1
    written = write_config(architecture, PlainIds(values["vocab_size"]), num_stacks)
    assert read_config(written, {}) == architecture
    # T5 has no experts
    assert T5.read_config(written, {}) != architecture
    with pytest.raises(ConfigError, match=f"a model must have {3 - num_stacks} stacks"):
        write_config(architecture, PlainIds(values["vocab_size"]), 3 - num_stacks)


def test_layers_with_experts_are_those_of_the_reference(rng: np.random.Generator) -> None:
    """Also where it is asked for none or for more than it can have."""
    for _ in range(12):
        depths = {"num_layers": int(rng.integers(1, 7)), "num_decoder_layers": int(rng.integers(1, 7))}
        sparse = {f"num_sparse_{side}_layers": int(rng.integers(0, 8)) for side in ("encoder", "decoder")}
        config = SwitchTransformersConfig(**{**SMALL, "vocab_size": 4, **depths, **sparse})
        with torch.device("meta"):
            theirs = SwitchTransformersForConditionalGeneration(config)
        wanted = [block.is_sparse for stack in (theirs.encoder, theirs.decoder) for block in stack.block]
        given = config.to_dict()
        for values in (given, {name: value for name, value in given.items() if not name.endswith("sparse_step")}):
            ours = read_config(values, {})
            assert [ours.layer(i).experts is not None for i in range(ours.total_layers)] == wanted, (depths, sparse)
        if any(wanted):
            back = SwitchTransformersConfig(**write_config(ours, PlainIds(4)))
            assert read_config(back.to_dict(), {}) == ours


NO_NUMBERS = {
    # of the file, of training, of generation
    *("transformers_version", "architectures", "dtype", "output_hidden_states", "return_dict", "use_cache"),
    *("chunk_size_feed_forward", "id2label", "label2id", "problem_type", "initializer_factor", "_name_or_path"),
    *("pad_token_id", "eos_token_id", "bos_token_id", "output_attentions", "model_type", "is_encoder_decoder"),
    # whether losses are given back, and attention to a source, which its stacks have whatever this says
    *("add_router_probs", "add_cross_attention"),
    # read nowhere in the reference
    "router_ignore_padding_tokens",
    # the steps have the last word, where they are there
    *("num_sparse_encoder_layers", "num_sparse_decoder_layers"),
}

REFUSED: dict[str, Any] = {
    "is_decoder": True,
    "router_bias": True,
    "router_dtype": "bfloat16",
    "dense_act_fn": "gelu_10",
    # gated layers, which older configs speak of, and the reference does not have
    "is_gated_act": True,
}


@pytest.mark.parametrize("name", sorted(set(SwitchTransformersConfig().to_dict()) - NO_NUMBERS - set(REFUSED)))
def test_every_setting_is_read(name: str) -> None:
    changes: dict[type, Callable[[Any], Any]] = {
        bool: lambda value: not value,
        int: lambda value: 2 * value,
        float: lambda value: value / 2,
    }
    values = SwitchTransformersConfig(**ODD).to_dict()
    changed = {**values, name: changes[type(values[name])](values[name])}
    assert read_config(changed, {}) != read_config(values, {})


@pytest.mark.parametrize("name", REFUSED)
def test_settings_that_no_part_can_say_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        read_config({**SwitchTransformersConfig(**ODD).to_dict(), name: REFUSED[name]}, {})
