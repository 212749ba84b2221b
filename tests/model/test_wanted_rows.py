"""A trunk whose last block makes only the rows that are read gives these as they are, gradient and all."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from packs import VOCAB, config, random_pack

from meristem.model.attention import KeptRows, first_rows
from meristem.model.config import (
    Attention,
    BucketBias,
    Causal,
    Embedding,
    LinearBias,
    Mean,
    NoPosition,
    Prefix,
    Residual,
    Rotary,
    TransformerConfig,
)
from meristem.model.heads import Readout
from meristem.model.model import Model
from meristem.model.outputs import Wanted
from meristem.model.transformer import Encoder
from meristem.types import Layout
from model_runs import specs

CONFIGS = {
    "pre-norm, rotary": config(position=Rotary()),
    "post-norm, no position": config(position=NoPosition(), residual=Residual(placement="after"), final_norm=False),
    "parallel, layer scale": config(residual=Residual(placement="parallel", layer_scale=0.5)),
    "grouped heads, queries and keys normed": config(attention=Attention(num_heads=4, num_kv_heads=2, qk_norm="head")),
}
LENGTHS = {"many": [5, 5, 9, 30, 30, 30], "one": [7]}


def _trunk(made: TransformerConfig) -> Encoder:
    torch.manual_seed(0)
    trunk = Encoder(replace(made, embedding=Embedding(vocab_size=VOCAB)))
    for parameter in trunk.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return trunk


def _differ(made: TransformerConfig, lengths: list[int], rng, choose: Callable[[Layout, int], KeptRows]) -> float:
    """Largest difference of the first two rows, and of the gradients that they give, from those of a whole pass."""
    trunk, batch = _trunk(made), random_pack(rng, lengths)
    num = 2 * len(lengths)
    whole = trunk(batch).final[first_rows(batch.layout, 2).rows[:num]]
    some = trunk(batch, last_rows=choose(batch.layout, 2))
    assert some.layout.lengths == (2,) * len(lengths)
    weights, grads = torch.randn_like(whole), []
    for rows in (whole, some.final[:num]):
        trunk.zero_grad()
        (rows * weights).sum().backward()
        grads.append([parameter.grad.clone() for parameter in trunk.parameters()])
    scale = max(float(grad.abs().max()) for grad in grads[0])
    worst = float((whole - some.final[:num]).detach().abs().max())
    return max(worst, *(float((a - b).abs().max()) / scale for a, b in zip(*grads)))


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("made", CONFIGS.values(), ids=CONFIGS)
def test_rows_that_are_wanted_are_those_of_a_whole_pass(made, lengths, rng):
    assert _differ(made, lengths, rng, first_rows) < 1e-5  # rounding of products of other numbers of rows


def test_rows_that_stand_one_further_are_caught(rng):
    """Mutant: the second and third row of each sequence."""

    def one_further(layout: Layout, count: int) -> KeptRows:
        wanted = first_rows(layout, count)
        return replace(wanted, rows=(wanted.rows + 1) % layout.num_rows)

    assert _differ(CONFIGS["pre-norm, rotary"], LENGTHS["many"], rng, one_further) > 1e-2


@pytest.mark.parametrize(
    "made",
    [
        config(attention=Attention(num_heads=4, pattern=Causal())),
        config(position=LinearBias()),
        config(position=BucketBias()),
    ],
    ids=["causal", "slopes", "buckets"],
)
def test_a_query_that_sees_by_where_it_stands_is_never_made_alone(made, rng):
    trunk, batch = _trunk(made), random_pack(rng, LENGTHS["many"])
    assert not trunk.may_leave_rows
    with pytest.raises(AssertionError):
        trunk(batch, last_rows=first_rows(batch.layout, 1))


def test_the_last_block_makes_no_rows_that_nobody_reads(rng):
    readouts = [
        Readout(name="first", classes=("a", "b"), pool=Prefix()),
        Readout(name="two", classes=("a", "b"), pool=Prefix(count=2)),
        Readout(name="both", classes=("a", "b"), pool=Prefix(has_mean=True)),
        Readout(name="mean", classes=("a", "b"), pool=Mean()),
        Readout(name="own", classes=("a", "b"), pool=None),
        Readout(name="each", classes=("a", "b"), level="token"),
    ]
    model = Model(config(pool=Prefix()), specs((), readouts))
    batch = random_pack(rng, [20, 30])

    def lengths(model, *names, **options):
        return model(batch, Wanted(names, **options)).hidden.layout.lengths

    assert lengths(model, "first", "own", num_first=0) == (1, 1)
    assert lengths(model, "first", "two", num_first=0) == (2, 2)
    assert lengths(model, "first", "two", num_first=5) == (5, 5)
    assert lengths(model, is_pooled=True, num_first=0) == (1, 1)
    for other in ("both", "mean", "each"):
        assert lengths(model, "first", other, num_first=0) == (20, 30)
    for options in ({"layers": (1,)}, {"attentions": (0,)}, {"num_first": None}):
        assert lengths(model, "first", **{"num_first": 0, **options}) == (20, 30)
    biased = Model(config(position=LinearBias()), specs((), readouts[:1]))
    assert lengths(biased, "first", num_first=0) == (20, 30)
