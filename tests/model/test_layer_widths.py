"""A rule of layers may change the feed-forward part, as pruning leaves layers of several widths."""

from dataclasses import replace

import torch
from packs import VOCAB, config, random_pack

from meristem.inference.memory import bytes_per_token
from meristem.model.config import Embedding, FeedForward, LayerRule
from meristem.model.flops import flops_per_token
from meristem.model.model import Model
from meristem.model.outputs import Wanted
from meristem.model.plain import from_json, to_json

NARROW = FeedForward(width=8, activation="relu")
WIDE = config(embedding=Embedding(vocab_size=VOCAB))
PRUNED = replace(WIDE, layers=(LayerRule(start=1, feedforward=NARROW),))


def test_a_pruned_model_is_the_wide_one_without_the_features_that_were_cut(rng):
    """The oracle: the wide model with zeros where features were cut."""
    narrow = replace(WIDE.feedforward, width=8)
    pruned = Model(replace(WIDE, layers=(LayerRule(start=1, feedforward=narrow),)))
    wide, width = Model(WIDE), WIDE.feedforward.width
    kept = torch.from_numpy(rng.permutation(width)[:8])
    state = wide.state_dict()
    for name, value in pruned.state_dict().items():
        if value.shape != state[name].shape:
            dim = 1 if name.endswith("down.weight") else 0
            value.copy_(state[name].index_select(dim, kept))
        else:
            value.copy_(state[name])
    with torch.no_grad():
        cut = torch.ones(width, dtype=torch.bool).index_fill(0, kept, False)
        wide.trunk.blocks[1].feedforward.down.weight[:, cut] = 0
    batch = random_pack(rng, [3, 20])
    ours, slow = (model.eval()(batch, Wanted()).hidden.final for model in (pruned, wide))
    torch.testing.assert_close(ours, slow, atol=1e-5, rtol=1e-5)


def test_widths_of_layers_count_everywhere():
    assert PRUNED.layer(0).feedforward == WIDE.feedforward
    assert PRUNED.layer(1).feedforward == NARROW
    assert from_json(type(PRUNED), to_json(PRUNED)) == PRUNED
    lost = WIDE.feedforward.width - 8
    assert flops_per_token(WIDE, 10) - flops_per_token(PRUNED, 10) == 2 * 2 * WIDE.width * lost
    huge = replace(WIDE, layers=(LayerRule(start=1, feedforward=FeedForward(width=4096)),))
    assert bytes_per_token(huge, torch.float32) > 4 * 2 * 4096
    assert bytes_per_token(PRUNED, torch.float32) == bytes_per_token(WIDE, torch.float32), "the widest layer counts"
