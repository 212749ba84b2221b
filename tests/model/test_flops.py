"""FLOPs a token are those that torch counts in a forward pass."""

from typing import Any

import numpy as np
import pytest
from packs import config, random_pack
from torch.utils.flop_counter import FlopCounterMode

from meristem.model.config import Attention, Experts, FeedForward, Residual, TokenHead
from meristem.model.flops import flops_per_token, num_idle_parameters
from meristem.model.model import Model
from model_runs import outputs_of, specs


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attention": Attention(num_heads=6, num_kv_heads=2, head_width=10)},
        {"feedforward": FeedForward(width=48, is_gated=True), "num_layers": 3},
        {"head": TokenHead(is_tied=False)},
        {"head": TokenHead(activation=None), "residual": Residual(placement="parallel")},
    ],
)
@pytest.mark.parametrize("length", [16, 40])
def test_flops_a_token_are_those_that_torch_counts(
    changes: dict[str, Any], length: int, rng: np.random.Generator
) -> None:
    architecture = config(**changes)
    model = Model(architecture, specs(("tokens",))).eval()
    batch = random_pack(rng, [length])
    with FlopCounterMode(display=False) as counter:
        outputs_of(model, batch)
    assert counter.get_total_flops() == length * flops_per_token(architecture, length)


@pytest.mark.parametrize("is_gated", [False, True])
def test_idle_parameters_are_those_of_the_experts_that_a_token_does_not_pass(is_gated: bool) -> None:
    part = FeedForward(width=48, is_gated=is_gated)
    alone, several = (config(feedforward=part, experts=experts) for experts in (None, Experts(count=5, top_k=2)))
    num_alone, num_several = (
        sum(p.numel() for name, p in Model(c).named_parameters() if "router" not in name) for c in (alone, several)
    )
    # a token that passes two experts passes one more feed-forward layer in each block
    one = sum(p.numel() for p in Model(alone).trunk.blocks[0].feedforward.parameters())
    assert num_several - num_idle_parameters(several) == num_alone + 2 * one
    assert num_idle_parameters(alone) == 0
