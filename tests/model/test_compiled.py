"""Compiled blocks give the numbers of those that are not; without a compiler a line says so."""

import logging
import shutil

import numpy as np
import pytest
import torch
from torch import nn

from meristem.data.pack import pack
from meristem.model import compiled
from meristem.model.compiled import compile_blocks
from meristem.model.config import Attention, Embedding, FeedForward, Rotary, TransformerConfig
from meristem.model.transformer import build_trunk
from meristem.types import PackedBatch, Tokens


@pytest.fixture
def trunk() -> nn.Module:
    config = TransformerConfig(
        width=16,
        num_layers=2,
        embedding=Embedding(vocab_size=9),
        position=Rotary(),
        attention=Attention(num_heads=2),
        feedforward=FeedForward(width=32),
    )
    built = build_trunk(config).eval()
    for parameter in built.parameters():
        nn.init.normal_(parameter, std=0.5)
    return built


def random_pack(rng: np.random.Generator, lengths: list[int]) -> PackedBatch:
    sequences = [Tokens(np.arange(n)[:, None], rng.integers(0, 9, n)) for n in lengths]
    return pack(sequences, range(len(lengths)))


@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling for a CPU needs g++")
def test_compiled_blocks_give_the_same_numbers_for_packs_of_any_size(
    trunk: nn.Module, rng: np.random.Generator
) -> None:
    packs = [random_pack(rng, lengths) for lengths in ([5, 20, 20], [40, 3, 9, 17], [61, 30], [8] * 9)]
    with torch.inference_mode():
        wanted = [trunk(batch).final for batch in packs]
        names = list(trunk.state_dict())
        assert compile_blocks(trunk, "cpu")
        torch._dynamo.utils.counters.clear()
        for batch, want in zip(packs, wanted):
            torch.testing.assert_close(trunk(batch).final, want, atol=1e-5, rtol=1e-5)
    assert list(trunk.state_dict()) == names
    num_graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert 0 < num_graphs <= 6  # none, had it not been compiled; more, had each pack been compiled anew


def test_without_a_compiler_a_line_says_so(
    trunk: nn.Module, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no g++ here\nand more")

    monkeypatch.setattr(compiled, "_probe", fail)
    with caplog.at_level(logging.WARNING):
        assert not compile_blocks(trunk, "cpu")
    assert "no compiler that works here: no g++ here" in caplog.text.replace("\n", " ")
    assert trunk(random_pack(rng, [7])).final.isfinite().all()
