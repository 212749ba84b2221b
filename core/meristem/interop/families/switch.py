"""Switch (Fedus 2021, arXiv 2101.03961): T5 in which some layers have experts, and the encoder alone.

As Hugging Face keeps it (`SwitchTransformersForConditionalGeneration`): one expert a token, so many tokens of each
sequence for an expert; a token that finds no room goes on by the residual alone.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from meristem.data.tokenizer import Tokenizer
from meristem.errors import CheckpointError, ConfigError, require
from meristem.interop.families import t5
from meristem.interop.family import ForeignConfig, Tensors, classes_by_head, symbols_by_class
from meristem.interop.runners import SEQUENCES
from meristem.interop.settings import Settings
from meristem.interop.table import KeyTable, Rename, Row, Transform
from meristem.model.config import Experts, LayerRule, TransformerConfig
from meristem.shapes import Tensor

SWITCH_DEFAULTS = {
    **t5.DEFAULTS,
    "num_decoder_layers": 12,
    "dense_act_fn": "relu",
    "num_experts": 8,
    "expert_capacity": 64,
    "num_sparse_encoder_layers": 3,
    "num_sparse_decoder_layers": 3,
    "router_jitter_noise": 0.01,
    "router_aux_loss_coef": 0.001,
    "router_z_loss_coef": 0.001,
}


def read_config(config: ForeignConfig, tensors: Tensors) -> TransformerConfig:
    # router_ignore_padding_tokens changes nothing in the reference, and a pack has no padding
    found = Settings("a Switch", config, t5.FIELDS, SWITCH_DEFAULTS, t5.ALIASES)
    found.require(router_bias=False, router_dtype="float32", is_gated_act=False)
    head = t5.read_head(found, tensors, is_scaled=bool(found["tie_word_embeddings"]), is_always_tied=False)
    architecture = t5.read_stacks(found, is_gated=False, head=head)
    experts = Experts(
        count=found["num_experts"],
        capacity=found["expert_capacity"],
        jitter=found["router_jitter_noise"],
        balance_weight=found["router_aux_loss_coef"],
        z_weight=found["router_z_loss_coef"],
    )
    rules = list(architecture.layers)
    for side, first, depth in _stacks(architecture):
        step = _sparse_step(found, side, depth)
        places = _places(step, depth)
        if places:
            start, stop = first + places[0], first + places[-1] + 1
            rules.append(LayerRule(start=start, stop=stop, step=step if len(places) > 1 else 1, experts=experts))
    return replace(architecture, layers=tuple(rules))


def _sparse_step(found: Settings, side: str, depth: int) -> int:
    """Layers from one with experts to the next, as the reference has it: 0 for none.

    Where it is to have none, it takes the depth, and so has experts in the second layer.
    """
    step = found.get(f"{side}_sparse_step")
    if step is None:
        count = found[f"num_sparse_{side}_layers"]
        step = depth // count if count > 0 else depth
    return int(step)


def write_config(architecture: TransformerConfig, tokenizer: Tokenizer, num_stacks: int = 2) -> dict[str, Any]:
    layers = [architecture.layer(layer).experts for layer in range(architecture.total_layers)]
    experts = next((part for part in layers if part is not None), None)
    if experts is None:
        raise ConfigError("a Switch model must have experts; got none")
    values: dict[str, Any] = {}
    for side, first, depth in _stacks(architecture):
        places = [layer for layer in range(depth) if layers[first + layer] is not None]
        values[f"num_sparse_{side}_layers"] = len(places)
        steps = [step for step in range(depth + 1) if places == _places(step, depth)]
        require(bool(steps), "layers with experts must be all, or the second and every n-th after it", places)
        values[f"{side}_sparse_step"] = steps[0]
    return {
        "model_type": "switch_transformers",
        **t5.write_stacks(architecture, tokenizer, num_stacks),
        **values,
        "num_experts": experts.count,
        "expert_capacity": experts.capacity,
        "router_bias": False,
        "router_dtype": "float32",
        "router_jitter_noise": experts.jitter,
        "router_aux_loss_coef": experts.balance_weight,
        "router_z_loss_coef": experts.z_weight,
    }


def _stacks(architecture: TransformerConfig) -> list[tuple[str, int, int]]:
    """Name, first layer and depth of each stack."""
    depth = architecture.num_layers
    return [("encoder", 0, depth), ("decoder", depth, architecture.num_decoder_layers)]


def _places(step: int, depth: int) -> list[int]:
    return [layer for layer in range(depth) if step > 0 and (step == 1 or layer % step == 1)]


def _read_repeated(tensors: Sequence[Tensor], _: TransformerConfig) -> Tensor:
    first, *others = tensors
    if not first.is_meta and not all(torch.equal(first, other) for other in others):
        raise CheckpointError("both stacks must have one embedding, shared.weight; got several")
    return first


REPEATED = Transform(_read_repeated, lambda tensor, _: [tensor, tensor.clone(), tensor.clone()])
"""One tensor of ours, three times there."""


def table(architecture: TransformerConfig, *_: object) -> KeyTable:
    """Key table of a Switch transformer. The reference shares the embedding only where the head is tied to it too."""
    symbols = Rename("trunk.embedding.symbols", "shared")
    if architecture.head is not None and not architecture.head.is_tied:
        symbols = Row("trunk.embedding.symbols", ("shared", *t5.COPIES[:2]), REPEATED)
    return t5.build_table(architecture, "mlp", symbols)


SWITCH = replace(
    t5.T5,
    name="Switch",
    recognises=lambda config: config.get("model_type") == "switch_transformers" and not t5.is_encoder(config),
    read_config=read_config,
    write_config=write_config,
    table=table,
    read_heads=symbols_by_class("SwitchTransformersForConditionalGeneration"),
    name_class=classes_by_head("SwitchTransformersForConditionalGeneration", "SwitchTransformersModel"),
)

SWITCH_ENCODER = replace(
    SWITCH,
    name="the encoder of Switch",
    recognises=lambda config: config.get("model_type") == "switch_transformers" and t5.is_encoder(config),
    write_config=partial(write_config, num_stacks=1),
    read_heads=t5.T5_ENCODER.read_heads,
    name_class=lambda heads: "SwitchTransformersEncoderModel",
    runner=SEQUENCES,
)
