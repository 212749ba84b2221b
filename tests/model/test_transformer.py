"""What the trunk promises whatever the weights: no leak between sequences, no future, and the formulas of its parts."""

import numpy as np
import pytest
import torch
from packs import MASK, VOCAB, config, random_pack, tokens
from torch import nn
from torch.nn import functional as F

from meristem.data.pack import pack
from meristem.errors import ConfigError, DataError
from meristem.model.attention import AttentionLayer, Context, Placed
from meristem.model.config import (
    Attention,
    Causal,
    Embedding,
    FeedForward,
    Init,
    LayerNorm,
    Learned,
    NoPosition,
    Position,
    Residual,
    RMSNorm,
    Rotary,
    TokenHead,
    TransformerConfig,
)
from meristem.model.feedforward import FeedForwardLayer
from meristem.model.heads import Readout
from meristem.model.model import Model
from meristem.model.outputs import Wanted
from meristem.model.position import BetweenLayer, LearnedLayer, RotaryLayer
from meristem.model.transformer import Encoder
from meristem.types import Layout, PackedBatch
from model_runs import specs


def redraw(module: nn.Module) -> nn.Module:
    """No parameter at its initial value: biases of 0 and norms of 1 would hide what is dropped."""
    for parameter in module.parameters():
        draw = torch.randn_like(parameter)
        parameter.data = draw / parameter.shape[-1] ** 0.5 if parameter.ndim > 1 else 1 + 0.3 * draw
    return module.eval()


def rows_of(hidden: torch.Tensor, batch: PackedBatch, record: int) -> torch.Tensor:
    place = batch.records.index(record)
    start = batch.layout.starts[place]
    return hidden[start : start + batch.layout.lengths[place]]


@pytest.mark.parametrize("position", [Rotary(), Learned(max_positions=40), NoPosition()])
@pytest.mark.parametrize(
    "attention", [Attention(num_heads=4), Attention(num_heads=4, num_kv_heads=2, pattern=Causal())]
)
def test_no_token_of_one_sequence_sees_another(
    position: object, attention: Attention, rng: np.random.Generator
) -> None:
    trunk = redraw(Encoder(config(position=position, attention=attention)))
    lengths = [int(n) for n in rng.integers(2, 30, 6)] + [11, 11]
    sequences = [tokens(rng.integers(0, VOCAB, n)) for n in lengths]
    changed = int(rng.integers(len(sequences)))
    others = [*sequences]
    others[changed] = tokens((sequences[changed].ids + 1) % VOCAB)
    with torch.inference_mode():
        batches = [pack(these, range(len(these))) for these in (sequences, others)]
        before, after = (trunk(batch).final for batch in batches)
    for record in range(len(sequences)):
        same = torch.equal(rows_of(before, batches[0], record), rows_of(after, batches[1], record))
        assert same == (record != changed)


def test_a_causal_trunk_sees_no_future(rng: np.random.Generator) -> None:
    attention = Attention(num_heads=4, pattern=Causal())
    # token dropout counts the masks of the whole sequence, and would tell of the future
    trunk = redraw(Encoder(config(attention=attention, embedding=Embedding(vocab_size=VOCAB))))
    ids = rng.integers(0, VOCAB, 24)
    place = int(rng.integers(1, 24))
    other = ids.copy()
    other[place:] = (other[place:] + 1) % VOCAB
    with torch.inference_mode():
        before, after = (trunk(pack([tokens(these)], [0])).final for these in (ids, other))
    # a row takes part in sums of the same order and length in both
    assert torch.equal(before[:place], after[:place])
    assert not torch.isclose(before[place:24], after[place:24]).all(1).any()


@pytest.mark.parametrize("position", [Rotary(), Learned(max_positions=40, offset=2)])
def test_a_sequence_does_not_depend_on_its_batch_mates(position: object, rng: np.random.Generator) -> None:
    trunk = redraw(Encoder(config(position=position)))
    sequences = [tokens(rng.integers(0, VOCAB, int(n))) for n in rng.integers(1, 38, 9)]
    together = pack(sequences, range(9))
    with torch.inference_mode():
        all_rows = trunk(together).final
        for record, sequence in enumerate(sequences):
            alone = pack([sequence], [record])
            assert torch.equal(rows_of(trunk(alone).final, alone, record), rows_of(all_rows, together, record))


@pytest.mark.parametrize("is_before", [True, False])
def test_a_stack_equals_that_of_torch_in_forward_and_gradient(is_before: bool, rng: np.random.Generator) -> None:
    """`torch.nn.TransformerEncoderLayer` is the oracle of both placements of the norm, with ReLU."""
    ours = Encoder(
        config(
            position=NoPosition(),
            embedding=Embedding(vocab_size=VOCAB),
            feedforward=FeedForward(width=64, activation="relu"),
            residual=Residual(placement="before" if is_before else "after"),
            final_norm=is_before,
        )
    )
    redraw(ours)
    theirs = [nn.TransformerEncoderLayer(32, 4, 64, 0.0, F.relu, batch_first=True, norm_first=is_before) for _ in "ab"]
    for block, layer in zip(ours.blocks, theirs):
        for mine, its in (
            (block.attention.qkv.weight, layer.self_attn.in_proj_weight),
            (block.attention.qkv.bias, layer.self_attn.in_proj_bias),
            (block.attention.out.weight, layer.self_attn.out_proj.weight),
            (block.attention.out.bias, layer.self_attn.out_proj.bias),
            (block.feedforward.up.weight, layer.linear1.weight),
            (block.feedforward.up.bias, layer.linear1.bias),
            (block.feedforward.down.weight, layer.linear2.weight),
            (block.feedforward.down.bias, layer.linear2.bias),
            (block.attention_norm.weight, layer.norm1.weight),
            (block.attention_norm.bias, layer.norm1.bias),
            (block.feedforward_norm.weight, layer.norm2.weight),
            (block.feedforward_norm.bias, layer.norm2.bias),
        ):
            its.data = mine.data.clone()
    batch = random_pack(rng, [3, 8, 17])
    got = ours(batch).final
    # one padded batch with a mask, as others have it
    padded = torch.zeros(3, 17, dtype=torch.long)
    is_pad = torch.ones(3, 17, dtype=torch.bool)
    for row, (start, length) in enumerate(zip(batch.layout.starts, batch.layout.lengths)):
        padded[row, :length] = batch.ids[start : start + length]
        is_pad[row, :length] = False
    x = ours.embedding.symbols(padded)
    for layer in theirs:
        x = layer.train()(x, src_key_padding_mask=is_pad)
    wanted = (ours.final_norm(x))[~is_pad]
    got = got[: batch.layout.num_tokens]
    torch.testing.assert_close(got, wanted, atol=2e-5, rtol=1e-5)  # fp32 sums in another order
    weights = torch.randn_like(got)
    mine = torch.autograd.grad((got * weights).sum(), [ours.blocks[0].attention.qkv.weight])[0]
    its = torch.autograd.grad((wanted * weights).sum(), [theirs[0].self_attn.in_proj_weight])[0]
    torch.testing.assert_close(mine, its, atol=2e-4, rtol=1e-4)  # sums over 28 rows


@pytest.mark.parametrize("activation", ["gelu", "relu", "silu"])
def test_a_gated_feedforward_is_activation_of_gate_times_value(activation: str, rng: np.random.Generator) -> None:
    layer = redraw(FeedForwardLayer(32, FeedForward(width=24, activation=activation, is_gated=True)))
    x = torch.randn(7, 32, dtype=torch.float64)
    layer.double()
    gate, value = layer.up.weight[:24], layer.up.weight[24:]
    z = x @ gate.T + layer.up.bias[:24]
    turned = {
        "gelu": z * 0.5 * (1 + torch.erf(z / 2**0.5)),
        "relu": z.clamp(min=0),
        "silu": z / (1 + torch.exp(-z)),
    }[activation]
    wanted = (turned * (x @ value.T + layer.up.bias[24:])) @ layer.down.weight.T + layer.down.bias
    torch.testing.assert_close(layer(x), wanted)


def test_grouped_queries_equal_repeated_keys_and_values(rng: np.random.Generator) -> None:
    grouped = redraw(AttentionLayer(config(attention=Attention(num_heads=6, num_kv_heads=2, head_width=8)).layer(0)))
    plain = AttentionLayer(config(attention=Attention(num_heads=6, head_width=8)).layer(0)).eval()
    for mine, its in ((plain.qkv.weight, grouped.qkv.weight), (plain.qkv.bias, grouped.qkv.bias)):
        query, key, value = its.data.split([48, 16, 16])
        repeat = [x.unflatten(0, (2, 8)).repeat_interleave(3, 0).flatten(0, 1) for x in (key, value)]
        mine.data = torch.cat([query, *repeat])
    plain.out.load_state_dict(grouped.out.state_dict())
    layout = Layout.of([5, 9, 9])
    context = Context(layout, (Placed(BetweenLayer(), (), None),))
    x = torch.randn(layout.num_rows, 32)
    torch.testing.assert_close(grouped(x, context), plain(x, context), atol=1e-5, rtol=1e-5)


def test_attention_maps_are_those_that_the_output_is_made_of(rng: np.random.Generator) -> None:
    trunk = redraw(Encoder(config()))
    batch = random_pack(rng, [4, 9, 15])
    with torch.inference_mode():
        fast, slow = trunk(batch), trunk(batch, Wanted(attentions=(0, 1)))
    torch.testing.assert_close(fast.final, slow.final, atol=1e-5, rtol=1e-5)
    for layer in (0, 1):
        assert [tuple(m.shape) for m in slow.attentions[layer]] == [(4, n, n) for n in (4, 9, 15)]
        for attention in slow.attentions[layer]:
            torch.testing.assert_close(attention.sum(-1), torch.ones_like(attention[..., 0]))


def test_token_dropout_is_counted_in_each_sequence(rng: np.random.Generator) -> None:
    trunk = Encoder(config(position=NoPosition()))
    table = trunk.embedding.symbols.weight
    sequences = [np.array([5, MASK, 6, 7]), np.array([5, 6]), np.array([MASK, MASK, 9, 9, 9])]
    batch = pack([tokens(ids) for ids in sequences], range(3))
    rows = trunk.embedding(batch)
    for record, num_masks in enumerate([1, 0, 2]):
        ids = torch.from_numpy(sequences[record])
        scale = 0.88 / (1 - num_masks / len(ids))
        wanted = table[ids] * scale * (ids != MASK)[:, None]
        torch.testing.assert_close(rows_of(rows, batch, record), wanted, atol=1e-7, rtol=1e-6)


def test_rotary_tables_are_fp32_whatever_the_precision_of_the_model() -> None:
    layer = RotaryLayer(Rotary(), 32).bfloat16()
    positions = torch.arange(4096)[:, None]
    cos, sin = layer.tables(positions)
    assert cos.dtype == sin.dtype == torch.float32
    frequencies = 10000.0 ** (-torch.arange(0, 32, 2, dtype=torch.float64) / 32)
    angles = positions.double() * frequencies
    # fp32 angles of up to 4096 are good to 2.4e-4
    torch.testing.assert_close(cos[:, 0].double(), angles.cos(), atol=5e-4, rtol=0)
    x = torch.randn(4096, 2, 32).bfloat16()
    turned = layer.turn(x, (cos, sin))
    assert turned.dtype == torch.bfloat16
    exact = layer.turn(x.float(), (cos, sin))
    assert ((turned.float() - exact).pow(2).mean().sqrt() / exact.pow(2).mean().sqrt()) < 0.003  # one rounding to bf16
    coarse = layer.turn(x.float(), tuple(t.float() for t in _tables_in_bf16(positions)))
    assert ((coarse - exact).pow(2).mean().sqrt() / exact.pow(2).mean().sqrt()) > 0.1  # the mutant is seen


def _tables_in_bf16(positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    frequencies = (10000.0 ** (-torch.arange(0, 32, 2) / 32)).bfloat16()
    angles = (positions.bfloat16() * frequencies)[:, None]
    return angles.cos(), angles.sin()


def test_rotary_scores_depend_on_distance_alone(rng: np.random.Generator) -> None:
    layer = RotaryLayer(Rotary(), 16)
    q, k = torch.randn(2, 1, 1, 16, dtype=torch.float64)
    scores = []
    for shift in (0, 5, 300):
        tables = layer.tables(torch.tensor([[7 + shift], [3 + shift]]))
        q_turned = layer.turn(q, tuple(t[:1] for t in tables))
        k_turned = layer.turn(k, tuple(t[1:] for t in tables))
        scores.append((q_turned * k_turned).sum())
    torch.testing.assert_close(torch.stack(scores), scores[0].expand(3), atol=1e-4, rtol=1e-4)  # fp32 angles
    still = (q * k).sum()
    assert not torch.isclose(scores[0], still)


def test_rows_without_a_place_get_no_position() -> None:
    learned = LearnedLayer(Learned(max_positions=20, offset=3, grid=(4, 4)), 8)
    rows = learned(torch.tensor([[-1, -1], [0, 0], [2, 1]]))
    assert torch.equal(
        rows, torch.stack([torch.zeros(8), learned.table.weight[3], learned.table.weight[3 + 2 * 4 + 1]])
    )
    rotary = RotaryLayer(Rotary(), 8)
    q = torch.randn(1, 2, 8)
    assert torch.equal(rotary.turn(q, rotary.tables(torch.tensor([[-1]]))), q[..., [0, 4, 1, 5, 2, 6, 3, 7]])


def test_a_sequence_longer_than_its_positions_is_refused(rng: np.random.Generator) -> None:
    trunk = Encoder(config(position=Learned(max_positions=12, offset=2)))
    trunk(random_pack(rng, [10, 3]))
    with pytest.raises(DataError, match="10 tokens or fewer, as its positions allow; got 11"):
        trunk(random_pack(rng, [11]))


def test_layers_count_from_both_ends(rng: np.random.Generator) -> None:
    trunk = redraw(Encoder(config(num_layers=3)))
    hidden = trunk(random_pack(rng, [5]), Wanted(layers=(0, 1, 2, 3, -1, -4)))
    assert torch.equal(hidden.layers[-1], hidden.final)
    assert torch.equal(hidden.layers[3], hidden.final)
    assert torch.equal(hidden.layers[-4], hidden.layers[0])
    assert not torch.equal(hidden.layers[1], hidden.layers[2])
    with pytest.raises(ConfigError, match=r"layer must be in 0\.\.3 or -4\.\.-1; got 4"):
        trunk(random_pack(rng, [5]), Wanted(layers=(4,)))


FULL = {
    "plain": config(),
    "gated, grouped, learned, RMS": config(
        attention=Attention(num_heads=4, num_kv_heads=2, qkv_bias=False, out_bias=False),
        feedforward=FeedForward(width=40, is_gated=True, in_bias=False, out_bias=False),
        norm=RMSNorm(),
        position=Learned(max_positions=64),
        head=TokenHead(is_tied=False, bias=False),
        init=Init(std=0.05, is_depth_scaled=True),
    ),
    "patches, embedding norm": config(
        embedding=Embedding(vocab_size=VOCAB, patch_features=12, is_normed=True), norm=LayerNorm(bias=False)
    ),
}
READOUTS = (Readout(name="place", classes=("in", "out"), hidden_width=16), Readout(name="fold", task="regression"))


@pytest.mark.parametrize("kind", FULL)
def test_every_parameter_gets_its_initial_value_of_the_table(kind: str) -> None:
    architecture: TransformerConfig = FULL[kind]
    with torch.device("meta"):
        model = Model(architecture, specs(("tokens", "contacts"), READOUTS))
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.constant_(parameter, 77.0)
    filled = Model(architecture, specs(("tokens", "contacts"), READOUTS))
    for name, parameter in filled.named_parameters():
        assert not (parameter == 77.0).any()
        if parameter.ndim == 1:
            is_norm = name.endswith("norm.weight") or (name.endswith(".weight") and "norm" in name)
            assert torch.all(parameter == (1.0 if is_norm else 0.0)), name
        else:
            std = architecture.init.std
            if architecture.init.is_depth_scaled and name.endswith(("attention.out.weight", "feedforward.down.weight")):
                std /= (2 * architecture.num_layers) ** 0.5
            assert parameter.abs().max() <= 2 * std, name
            # a normal cut at two deviations has .880 of the deviation; 5 standard errors of its estimate
            error = 5 / (2 * parameter.numel()) ** 0.5
            assert abs(parameter.std().item() / std - 0.880) < error + 0.01, name


def test_a_model_on_the_meta_device_costs_nothing() -> None:
    with torch.device("meta"):
        model = Model(
            config(width=16384, num_layers=20, attention=Attention(num_heads=128)), specs(("tokens", "contacts"))
        )
    assert all(parameter.is_meta for parameter in model.parameters())
    assert sum(parameter.numel() for parameter in model.parameters()) > 20e9


def test_dropout_of_attention_is_active_in_training_alone(rng: np.random.Generator) -> None:
    trunk = redraw(Encoder(config(attention=Attention(num_heads=4, dropout=0.5))))
    batch = random_pack(rng, [9, 9])
    assert torch.equal(trunk(batch).final, trunk(batch).final)
    trunk.train()
    assert not torch.equal(trunk(batch).final, trunk(batch).final)


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [[5, 30, 30, 77], [40, 40, 40]], ids=["ragged", "even"])
@pytest.mark.parametrize(
    "position", [NoPosition(), Rotary(), Rotary(is_interleaved=True)], ids=["none", "halves", "pairs"]
)
def test_a_trunk_in_bf16_on_the_gpu_is_that_of_the_cpu(
    position: Position, lengths: list[int], rng: np.random.Generator
) -> None:
    trunk = redraw(Encoder(config(width=128, attention=Attention(num_heads=4), position=position)))
    batch = random_pack(rng, lengths)
    with torch.inference_mode():
        wanted = trunk(batch).final[: batch.layout.num_tokens]
        got = trunk.cuda().bfloat16()(batch.to("cuda")).final.float().cpu()[: batch.layout.num_tokens]
    distance = (got - wanted).pow(2).mean().sqrt() / wanted.pow(2).mean().sqrt()
    assert distance < 0.05  # two layers of roundings to 8 bits
