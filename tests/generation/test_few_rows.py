"""Reordered weights change no result, round a row alike among however many, and follow the parameters."""

import gc
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from small_decoders import CONFIGS, VOCAB, decoder, random_prompts, redrawn, slow_logits
from torch.nn import functional as F

from meristem.generation.few_rows import for_few_rows, min_rows_of
from meristem.generation.options import GenerateOptions
from meristem.generation.sample import sample
from meristem.generation.steps import Steps
from meristem.model.config import Attention, Causal, Experts, FeedForward, LayerNorm, TokenHead
from meristem.model.exact import MIN_REORDERED_ROWS
from meristem.model.model import Model
from meristem.model.reordered import ReorderedLinear
from meristem.types import MIN_ROWS

WIDE = decoder(
    width=640,
    attention=Attention(num_heads=10, pattern=Causal()),
    feedforward=FeedForward(width=1300, activation="gelu_tanh"),
    norm=LayerNorm(),
)
"""Where MKL rounds a row by how many there are, below 16."""

HEADS = {
    "tied": TokenHead(activation=None, bias=False),
    "untied, with a bias": TokenHead(activation=None, is_tied=False),
    "dense": TokenHead(activation="gelu", is_tied=False, bias=False),
    "scaled": TokenHead(activation=None, bias=False, scale=0.3),
}


def is_reordered(model: Model) -> bool:
    return any(isinstance(layer, ReorderedLinear) for layer in model.modules())


@pytest.mark.parametrize("shape", [(640, 640), (2304, 768), (96, 3072), (37, 32), (1, 1300), (1000, 65)])
def test_a_row_is_rounded_alike_among_however_many(shape: tuple[int, int]) -> None:
    with torch.inference_mode():
        weight, bias, rows = torch.randn(shape), torch.randn(shape[0]), torch.randn(600, shape[1])
        layer = ReorderedLinear(weight, bias)
        wanted = layer(rows)
        # sums of at most some thousand products in another order, in fp32
        torch.testing.assert_close(wanted, F.linear(rows, weight, bias), atol=1e-5 * shape[1] ** 0.5, rtol=1e-5)
        for count in (*range(MIN_REORDERED_ROWS, 40), 64, 100, 257):
            first = int(torch.randint(0, 600 - count, ()))
            assert torch.equal(layer(rows[first : first + count].clone()), wanted[first : first + count]), count


def by_number_of_rows(self: ReorderedLinear, x: torch.Tensor) -> torch.Tensor:
    """The mutant: a product that rounds by how many rows there are."""
    return real_forward(self, x) * (1 + 2.0**-20 * (len(x) % 7))


real_forward = ReorderedLinear.forward


def test_a_product_that_rounds_by_the_number_of_rows_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_reordered(for_few_rows(redrawn(WIDE)))
    monkeypatch.setattr(ReorderedLinear, "forward", by_number_of_rows)
    model = redrawn(WIDE)
    assert for_few_rows(model) is model
    assert min_rows_of(model) == MIN_ROWS


def alone_and_together(model: Model, rng: np.random.Generator) -> list[bool]:
    """Whether each prompt gives the same bits alone as among others."""
    prompts = random_prompts(rng, 5, high=40)
    options = GenerateOptions(max_new_tokens=6, temperature=0.0)
    together = sample(model, prompts, options)
    return [sample(model, [prompt], options)[0] == made for prompt, made in zip(prompts, together)]


def test_wide_models_give_the_same_alone_as_among_others(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = for_few_rows(redrawn(WIDE))
    assert min_rows_of(model) == MIN_REORDERED_ROWS
    assert all(alone_and_together(model, rng))
    monkeypatch.setattr(ReorderedLinear, "forward", by_number_of_rows)
    assert not all(all(alone_and_together(model, rng)) for _ in range(5)), "greedy symbols of few prompts may be equal"


@pytest.mark.parametrize("head", HEADS)
def test_every_head_gives_the_logits_that_it_gave(head: str, rng: np.random.Generator) -> None:
    model = redrawn(decoder(head=HEADS[head]))
    fast = for_few_rows(model)
    assert is_reordered(fast)
    prompts = random_prompts(rng, 4)
    with torch.inference_mode():
        logits = Steps(fast, prompts).logits
    for got, prompt in zip(logits, prompts):
        # fp32 sums in another order
        torch.testing.assert_close(got, slow_logits(model, prompt, []), atol=1e-5, rtol=1e-5)


def test_experts_stay_as_they_are_and_keep_their_rows(rng: np.random.Generator) -> None:
    model = redrawn(decoder(experts=Experts(count=4, top_k=2, num_shared=1)))
    fast = for_few_rows(model)
    assert is_reordered(fast)
    assert min_rows_of(fast) == MIN_ROWS
    assert all(alone_and_together(fast, rng))


def test_weights_of_another_precision_stay_as_they_are() -> None:
    model = redrawn(decoder()).bfloat16()
    assert for_few_rows(model) is model


def test_parameters_are_shared_and_the_model_is_left_as_it_was() -> None:
    model = redrawn(CONFIGS["encoder-decoder"])
    before = {name: (id(one), one.data_ptr()) for name, one in model.named_parameters()}
    fast = for_few_rows(model)
    assert {name: (id(one), one.data_ptr()) for name, one in model.named_parameters()} == before
    assert not is_reordered(model)
    assert {id(one) for one in fast.parameters()} <= {ident for ident, _ in before.values()}


def test_it_is_made_once_and_anew_when_parameters_change(rng: np.random.Generator) -> None:
    model = redrawn(decoder())
    fast = for_few_rows(model)
    assert for_few_rows(model) is fast
    with torch.no_grad():
        model.trunk.blocks[0].attention.out.weight.mul_(-1.0)
    [prompt] = random_prompts(rng, 1)
    with torch.inference_mode():
        got = Steps(for_few_rows(model), [prompt]).logits[0]
        stale = Steps(fast, [prompt]).logits[0]
    wanted = slow_logits(model, prompt, [])
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
    assert (stale - wanted).abs().max() > 1e-3


def test_it_lives_no_longer_than_the_model() -> None:
    model = redrawn(decoder())
    left = weakref.ref(for_few_rows(model))
    del model
    gc.collect()
    assert left() is None


def test_a_torch_without_the_product_makes_sequences_as_before(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    model = redrawn(decoder())
    assert for_few_rows(model) is model
    made: Any = sample(model, [rng.integers(0, VOCAB, 3)], GenerateOptions(max_new_tokens=3))
    assert len(made[0][0].ids) == 3
