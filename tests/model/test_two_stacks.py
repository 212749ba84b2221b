"""An encoder-decoder keeps the promises of one stack: no leak, no future, no batch mates; and what joins branches."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from packs import VOCAB, config, random_pack, tokens
from torch import nn

from meristem.data.pack import pack
from meristem.errors import ConfigError
from meristem.model.attention import Context
from meristem.model.block import Block
from meristem.model.config import (
    Attention,
    AttentionPool,
    BucketBias,
    Causal,
    Embedding,
    Experts,
    LayerRule,
    Mean,
    Prefix,
    Residual,
    TransformerConfig,
)
from meristem.model.heads import Readout
from meristem.model.model import Model
from meristem.model.outputs import Wanted
from meristem.model.transformer import Decoder, Encoder, EncoderDecoder, build_trunk
from meristem.types import SOURCE, Layout, PackedBatch, Tokens
from model_runs import specs


def two_stacks(**changes: object) -> TransformerConfig:
    attention = Attention(num_heads=4)
    one_sided = BucketBias(num_buckets=8, max_distance=16, is_two_sided=False)
    values = {
        "num_decoder_layers": 2,
        "embedding": Embedding(vocab_size=VOCAB),
        "position": BucketBias(num_buckets=8, max_distance=16),
        "layers": (LayerRule(start=2, attention=replace(attention, pattern=Causal()), position=one_sided),),
    }
    return config(**{**values, **changes})


def redraw(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        draw = torch.randn_like(parameter)
        parameter.data = draw / parameter.shape[-1] ** 0.5 if parameter.ndim > 1 else 1 + 0.3 * draw
    return module.eval()


Pairs = list[tuple[np.ndarray, np.ndarray]]


def pack_pairs(pairs: Pairs) -> PackedBatch:
    sequences: list[Tokens] = []
    for source, target in pairs:
        sequences += [replace(tokens(source), side=SOURCE), tokens(target)]
    return pack(sequences, [i for i in range(len(pairs)) for _ in range(2)])


def rows(trunk: nn.Module, pairs: Pairs) -> list[torch.Tensor]:
    batch = pack_pairs(pairs)
    with torch.inference_mode():
        final = trunk(batch).final
    parts = final[: batch.layout.num_tokens].split(list(batch.layout.lengths))
    return [parts[batch.records.index(record)] for record in range(len(pairs))]


def random_pairs(rng: np.random.Generator, count: int) -> Pairs:
    return [tuple(rng.integers(0, VOCAB, int(n)) for n in rng.integers(1, 30, 2)) for _ in range(count)]


@pytest.mark.parametrize("changes", [{}, {"experts": Experts(count=3, capacity=4)}])
def test_a_pair_does_not_depend_on_its_batch_mates(changes: dict[str, object], rng: np.random.Generator) -> None:
    trunk = redraw(EncoderDecoder(two_stacks(**changes)))
    pairs = random_pairs(rng, 7)
    together = rows(trunk, pairs)
    for index, pair in enumerate(pairs):
        assert torch.equal(rows(trunk, [pair])[0], together[index])


@pytest.mark.parametrize("side", [0, 1])
def test_no_side_of_one_pair_is_seen_by_another(side: int, rng: np.random.Generator) -> None:
    trunk = redraw(EncoderDecoder(two_stacks()))
    pairs = random_pairs(rng, 6)
    changed = int(rng.integers(6))
    others = [list(pair) for pair in pairs]
    others[changed][side] = (others[changed][side] + 1) % VOCAB
    before, after = rows(trunk, pairs), rows(trunk, [tuple(pair) for pair in others])
    for index in range(6):
        assert torch.equal(before[index], after[index]) == (index != changed)


def test_a_target_sees_its_whole_source_and_no_future(rng: np.random.Generator) -> None:
    trunk = redraw(EncoderDecoder(two_stacks()))
    source, target = rng.integers(0, VOCAB, 12), rng.integers(0, VOCAB, 20)
    place = int(rng.integers(1, 20))
    other = np.r_[target[:place], (target[place:] + 1) % VOCAB]
    [before], [after] = rows(trunk, [(source, target)]), rows(trunk, [(source, other)])
    assert torch.equal(before[:place], after[:place])
    assert not torch.isclose(before[place:], after[place:]).all(1).any()
    last = np.r_[source[:-1], (source[-1] + 1) % VOCAB]
    assert not torch.isclose(rows(trunk, [(last, target)])[0], before).all(1).any()


def test_layers_of_both_sides_are_kept(rng: np.random.Generator) -> None:
    trunk = redraw(EncoderDecoder(two_stacks()))
    batch = pack_pairs(random_pairs(rng, 3))
    hidden = trunk(batch, Wanted(layers=(0, 1, 2), attentions=(0, 1)))
    assert hidden.source is not None
    assert torch.equal(hidden.layers[2], hidden.final)
    assert torch.equal(hidden.source.layers[2], hidden.source.final)
    assert hidden.source.final.shape[0] == batch.source.layout.num_rows
    for side, layout in ((hidden, batch.layout), (hidden.source, batch.source.layout)):
        for layer in (0, 1):
            assert [tuple(m.shape) for m in side.attentions[layer]] == [(4, n, n) for n in layout.lengths]
    torch.testing.assert_close(trunk(batch).final, hidden.final, atol=1e-5, rtol=1e-5)


def test_the_trunk_is_what_the_config_describes() -> None:
    assert type(build_trunk(config())) is Encoder
    assert type(build_trunk(config(attention=Attention(num_heads=4, pattern=Causal())))) is Decoder
    assert type(build_trunk(two_stacks())) is EncoderDecoder


def test_drop_path_leaves_out_branches_of_whole_sequences(rng: np.random.Generator) -> None:
    parts = config(num_layers=2, residual=Residual(drop_path=0.5)).layer(1)
    block = Block(parts).train()
    layout = Layout.of([3] * 2000)
    context = Context(layout, ())
    branch = torch.ones(layout.num_rows, 32)
    joined = block._join(branch, None, context)[: layout.num_tokens].view(2000, 3, 32)
    assert set(joined.unique().tolist()) == {0.0, 2.0}  # what stays is scaled, so that the mean is that of evaluation
    assert (joined == joined[:, :1, :1]).all()
    assert abs(joined.mean().item() - 1) < 0.12  # five standard errors of 2,000 draws
    assert torch.equal(block.eval()._join(branch, None, context), branch)


def test_layer_scale_and_scale_are_factors_of_a_branch(rng: np.random.Generator) -> None:
    plain = redraw(Encoder(config()))
    scaled = Encoder(config(residual=Residual(layer_scale=0.3, scale=0.5))).eval()
    state = {name: tensor for name, tensor in scaled.state_dict().items() if name.endswith("_scale")}
    assert len(state) == 4
    assert all((tensor == 0.3).all() for tensor in state.values())
    scaled.load_state_dict({**plain.state_dict(), **state})
    for block in plain.blocks:  # the same by weights: a branch ends in a linear map
        for way_out in (block.attention.out, block.feedforward.down):
            way_out.weight.data *= 0.15
            way_out.bias.data *= 0.15
    batch = random_pack(rng, [4, 9])
    torch.testing.assert_close(scaled(batch).final, plain(batch).final, atol=1e-5, rtol=1e-5)


POOLS = [Mean(is_normed=True), Prefix(is_dense=True), Prefix(count=2), AttentionPool(num_heads=4, feedforward_width=24)]


@pytest.mark.parametrize("pool", POOLS, ids=lambda pool: type(pool).__name__)
def test_a_label_by_the_models_own_pool_does_not_depend_on_batch_mates(pool: object, rng: np.random.Generator) -> None:
    readout = Readout(name="place", classes=("in", "out"), pool=None)
    model = redraw(Model(config(pool=pool, embedding=Embedding(vocab_size=VOCAB)), specs((), (readout,))))
    sequences = [tokens(rng.integers(0, VOCAB, int(n))) for n in rng.integers(3, 30, 7)]

    def outputs(records: list[int]) -> dict[int, torch.Tensor]:
        batch = pack([sequences[record] for record in records], records)
        with torch.inference_mode():
            vectors = model(batch, Wanted(is_pooled=True)).pooled
        return dict(zip(batch.records, vectors))

    together = outputs(list(range(7)))
    for record in range(7):
        # the head's own rows are few; what it reads must be equal, to the last digits of a product of few rows
        torch.testing.assert_close(outputs([record])[record], together[record], atol=1e-6, rtol=1e-6)
    assert not torch.allclose(together[0], together[1], atol=1e-3)


def test_a_label_cannot_take_a_pool_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match=r"takes the model's own pool .*, and it has none"):
        Model(config(), specs((), (Readout(name="place", classes=("in", "out"), pool=None),)))
