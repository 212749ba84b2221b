"""Which weights the engine runs with: reordered ones in fp32 only where all rows round alike."""

import pytest
import torch
from packs import config

from meristem.inference.trunks import runnable_trunk
from meristem.model import reordered
from meristem.model.model import Model
from meristem.model.reordered import ReorderedLinear, can_reorder


def is_reordered(trunk: torch.nn.Module) -> bool:
    return any(isinstance(module, ReorderedLinear) for module in trunk.modules())


@pytest.mark.parametrize("rounds_alike", [True, False])
def test_in_fp32_rows_must_round_alike_and_in_bf16_need_not(
    rounds_alike: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model(config()).eval()
    if not can_reorder(model.trunk):
        pytest.skip("torch has no products of reordered weights here")
    monkeypatch.setattr(reordered, "rounds_alike", lambda *_: rounds_alike)
    assert is_reordered(runnable_trunk(model, torch.float32)) == rounds_alike
    assert is_reordered(runnable_trunk(model, torch.bfloat16))
