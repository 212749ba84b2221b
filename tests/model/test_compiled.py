"""Compiled blocks give the numbers of those that are not; without a compiler a line says so."""

import copy
import logging
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from meristem.data.pack import pack
from meristem.model import compiler
from meristem.model.attention import first_rows
from meristem.model.block import compile_blocks
from meristem.model.config import Attention, Embedding, Experts, FeedForward, Residual, Rotary, TransformerConfig
from meristem.model.transformer import build_trunk
from meristem.types import SOURCE, PackedBatch, Tokens


def built(**changes: object) -> nn.Module:
    parts = {
        "width": 16,
        "num_layers": 2,
        "embedding": Embedding(vocab_size=9),
        "position": Rotary(),
        "attention": Attention(num_heads=2),
        "feedforward": FeedForward(width=32),
    }
    trunk = build_trunk(TransformerConfig(**(parts | changes))).eval()
    for parameter in trunk.parameters():
        nn.init.normal_(parameter, std=0.5)
    return trunk


@pytest.fixture
def trunk() -> nn.Module:
    return built()


def random_pack(rng: np.random.Generator, lengths: list[int]) -> PackedBatch:
    sequences = [Tokens(np.arange(n)[:, None], rng.integers(0, 9, n)) for n in lengths]
    return pack(sequences, range(len(lengths)))


compiler_only = pytest.mark.skipif(shutil.which("g++") is None, reason="compiling for a CPU needs g++")


def num_graphs() -> int:
    """Since the fixture `fresh`."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.fixture
def fresh() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


@pytest.mark.slow
@compiler_only
@pytest.mark.usefixtures("fresh")
def test_compiled_blocks_give_the_same_numbers_for_packs_of_any_size(
    trunk: nn.Module, rng: np.random.Generator
) -> None:
    packs = [random_pack(rng, rng.integers(2, 40, count).tolist()) for count in (3, 4, 2, 9, 12, 5)]
    firsts = [first_rows(batch.layout, 1) for batch in packs]
    with torch.inference_mode():
        wanted = [(trunk(batch).final, trunk(batch, last_rows=first).final) for batch, first in zip(packs, firsts)]
        names = list(trunk.state_dict())
        assert compile_blocks(trunk, "cpu")
        counts = []
        for batch, first, (want, want_first) in zip(packs, firsts, wanted):
            torch.testing.assert_close(trunk(batch).final, want, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(trunk(batch, last_rows=first).final, want_first, atol=1e-5, rtol=1e-5)
            counts.append(num_graphs())
    assert list(trunk.state_dict()) == names
    assert counts[0] > 0, "nothing was compiled"
    assert counts[1] == counts[-1], "packs are compiled anew"


@pytest.mark.slow
@compiler_only
@pytest.mark.usefixtures("fresh")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # read by the compiler itself
@pytest.mark.parametrize(
    "changes",
    [
        {"residual": Residual(drop_path=0.3)},
        {"experts": Experts(count=3, top_k=1)},
        {"num_decoder_layers": 2},
    ],
    ids=["drop path", "experts", "two stacks"],
)
def test_a_step_of_compiled_blocks_is_that_of_others(changes: dict[str, object], rng: np.random.Generator) -> None:
    """Experts, the source of a decoder and dropped branches are left as they stand; no pack is compiled anew."""
    trunk = built(**changes)
    twin = copy.deepcopy(trunk)
    assert compile_blocks(twin, "cpu")
    counts = []
    for count in (3, 4, 2, 9, 5):
        batch = random_pack(rng, rng.integers(2, 40, count).tolist())
        batch = replace(batch, sides={SOURCE: batch})
        for one in (trunk, twin):
            torch.manual_seed(count)
            one.train().zero_grad()
            one(batch).final.square().sum().backward()
        for own, other in zip(trunk.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(own.grad, other.grad, atol=1e-3, rtol=1e-3)
        counts.append(num_graphs())
    assert counts[0] > 0, "nothing was compiled"
    assert counts[1] == counts[-1], "packs are compiled anew"


@pytest.mark.gpu
@pytest.mark.usefixtures("fresh")
@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor", "ignore::DeprecationWarning", "ignore::UserWarning"
)
def test_on_a_gpu_compiled_blocks_give_the_gradients_of_others(rng: np.random.Generator) -> None:
    trunk = built().cuda().train()
    twin = copy.deepcopy(trunk)
    assert compile_blocks(twin, "cuda")
    counts = []
    for count in (3, 4, 2, 9, 5):
        batch = random_pack(rng, rng.integers(2, 40, count).tolist()).to("cuda")
        for one in (trunk, twin):
            one.zero_grad()
            one(batch).final.square().sum().backward()
        for own, other in zip(trunk.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(own.grad, other.grad, atol=1e-3, rtol=1e-3)
        counts.append(num_graphs())
    assert counts[1] == counts[-1] > 0


def test_without_a_compiler_a_line_says_so(
    trunk: nn.Module, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no g++ here\nand more")

    monkeypatch.setattr(compiler, "_probe", fail)
    with caplog.at_level(logging.WARNING):
        assert not compile_blocks(trunk, "cpu")
    assert "no compiler that works here: no g++ here" in caplog.text.replace("\n", " ")
    assert trunk(random_pack(rng, [7])).final.isfinite().all()
