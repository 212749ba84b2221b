"""FLOPs a token are those that torch counts in a forward pass."""

from typing import Any

import numpy as np
import pytest
from packs import config, random_pack
from torch.utils.flop_counter import FlopCounterMode

from meristem.model.config import Attention, FeedForward, TokenHead
from meristem.model.flops import flops_per_token
from meristem.model.model import Model


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attention": Attention(num_heads=6, num_kv_heads=2, head_width=10)},
        {"feedforward": FeedForward(width=48, is_gated=True), "num_layers": 3},
        {"head": TokenHead(is_tied=False)},
    ],
)
@pytest.mark.parametrize("length", [16, 40])
def test_flops_a_token_are_those_that_torch_counts(
    changes: dict[str, Any], length: int, rng: np.random.Generator
) -> None:
    architecture = config(**changes)
    model = Model(architecture, ("tokens",)).eval()
    batch = random_pack(rng, [length])
    with FlopCounterMode(display=False) as counter:
        model.symbol_logits(model.trunk(batch))
    assert counter.get_total_flops() == length * flops_per_token(architecture, length)
