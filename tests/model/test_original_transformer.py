"""The original Transformer (Vaswani 2017) is a config, with the numbers and gradients of `torch.nn.Transformer`."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from meristem.data.pack import pack
from meristem.model.attention import Context
from meristem.model.config import (
    Attention,
    Causal,
    Embedding,
    FeedForward,
    Full,
    LayerNorm,
    LayerRule,
    Residual,
    Sinusoidal,
    TokenHead,
    TransformerConfig,
)
from meristem.model.model import SYMBOLS, Model
from meristem.model.position import SinusoidalLayer
from meristem.types import SOURCE, Hidden, PackedBatch, Tokens
from model_runs import outputs_of, specs

# of the reference's path for inference, which an odd number of heads cannot take
pytestmark = pytest.mark.filterwarnings("ignore:enable_nested_tensor")

TOLERANCE = 1e-12
"""Of rows and logits of about 1 and of gradients relative to their largest entry, in fp64: 15 draws of each shape
reach 2e-14."""

FP32_TOLERANCE = 5e-5
"""Of logits in fp32; 400 draws of the first shape reach 1.3e-5. Gradients have no such bound: where a row before a ReLU
is 0 but for rounding, one of the two may pass nothing on (in one draw of 400 they differ by 3e-2)."""


Padded = tuple[torch.Tensor, torch.Tensor]
"""Symbols, and a mask that is true where they are no padding."""


@dataclass(frozen=True)
class Shape:
    """Of one model and the sequences it is asked about: source and target lengths in pairs."""

    vocab_size: int
    width: int
    num_heads: int
    feedforward_width: int
    num_layers: int
    num_decoder_layers: int
    lengths: tuple[tuple[int, int], ...]


ODD = "1 + 3 layers of 30, heads of 10"

SHAPES = {
    "2 + 2 layers of 32": Shape(32, 32, 4, 64, 2, 2, ((9, 9), (12, 5), (4, 17), (9, 9))),
    # three heads of 10, a vocabulary of a prime, a feed-forward layer narrower than the trunk, stacks of two depths
    ODD: Shape(41, 30, 3, 23, 1, 3, ((1, 1), (37, 3), (5, 40), (2, 11), (21, 11))),
}


def original(shape: Shape, **changes: object) -> TransformerConfig:
    """Post-norm, ReLU, sinusoids on embeddings times sqrt(D), one table for source, target and output.

    The paper has no norm after the last block; `torch.nn.Transformer` adds one to both stacks.
    """
    attention = Attention(num_heads=shape.num_heads)
    values = {
        "width": shape.width,
        "num_layers": shape.num_layers,
        "num_decoder_layers": shape.num_decoder_layers,
        "embedding": Embedding(vocab_size=shape.vocab_size, scale=math.sqrt(shape.width)),
        "attention": attention,
        "feedforward": FeedForward(width=shape.feedforward_width, activation="relu"),
        "position": Sinusoidal(),
        "norm": LayerNorm(eps=1e-5),
        "residual": Residual(placement="after"),
        "layers": (LayerRule(start=shape.num_layers, attention=replace(attention, pattern=Causal())),),
        "final_norm": True,
        "head": TokenHead(activation=None, is_tied=True, bias=False),
    }
    return TransformerConfig(**{**values, **changes})


def paper_table(num_places: int, width: int) -> torch.Tensor:
    """Section 3.5, one entry after the other."""
    table = np.zeros((num_places, width))
    for place in range(num_places):
        for i in range(width // 2):
            angle = place / 10000 ** (2 * i / width)
            table[place, 2 * i : 2 * i + 2] = math.sin(angle), math.cos(angle)
    return torch.from_numpy(table).float()


class Reference(nn.Module):
    """`torch.nn.Transformer` between an embedding, our table of positions and a tied output, over padded batches."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.width = shape.width
        self.symbols = nn.Embedding(shape.vocab_size, shape.width)
        self.core = nn.Transformer(
            d_model=shape.width,
            nhead=shape.num_heads,
            num_encoder_layers=shape.num_layers,
            num_decoder_layers=shape.num_decoder_layers,
            dim_feedforward=shape.feedforward_width,
            dropout=0.0,
            activation="relu",
            batch_first=True,
            norm_first=False,
        )

    def forward(self, source: Padded, target: Padded) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Logits, the encoder's rows and the decoder's."""
        (source_ids, source_mask), (target_ids, target_mask) = source, target
        memory = self.core.encoder(self._embed(source_ids), src_key_padding_mask=~source_mask)
        length = target_ids.shape[1]
        out = self.core.decoder(
            self._embed(target_ids),
            memory,
            tgt_mask=torch.ones(length, length, dtype=torch.bool).triu(1),
            tgt_key_padding_mask=~target_mask,
            memory_key_padding_mask=~source_mask,
        )
        return F.linear(out, self.symbols.weight), memory, out

    def _embed(self, ids: torch.Tensor) -> torch.Tensor:
        table = SinusoidalLayer(Sinusoidal(), self.width)(torch.arange(ids.shape[1])[:, None])
        return self.symbols(ids) * math.sqrt(self.width) + table


def redraw(reference: Reference, rng: np.random.Generator) -> Reference:
    """Leave no parameter at its initial value (biases 0, norms 1), and make attention sharp."""
    for name, parameter in reference.named_parameters():
        draw = torch.from_numpy(rng.standard_normal(parameter.shape, dtype=np.float32))
        if parameter.ndim == 1:
            parameter.data = 1 + 0.3 * draw if "norm" in name and name.endswith("weight") else 0.3 * draw
        else:
            parameter.data = draw * (2.0 if "in_proj" in name else 1.0) / parameter.shape[1] ** 0.5
    return reference


def as_ours(theirs: Mapping[str, torch.Tensor], shape: Shape) -> dict[str, torch.Tensor]:
    """Tensors of the reference, parameters or gradients, under our names."""
    ours = {"trunk.embedding.symbols.weight": theirs["symbols.weight"]}
    for stack, depth in (("encoder", shape.num_layers), ("decoder", shape.num_decoder_layers)):
        has_cross = stack == "decoder"
        for kind in ("weight", "bias"):
            ours[f"trunk.{stack}.final_norm.{kind}"] = theirs[f"core.{stack}.norm.{kind}"]
            for layer in range(depth):
                own, foreign = f"trunk.{stack}.blocks.{layer}", f"core.{stack}.layers.{layer}"
                parts = {
                    "attention_norm": f"norm1.{kind}",
                    "attention.qkv": f"self_attn.in_proj_{kind}",
                    "attention.out": f"self_attn.out_proj.{kind}",
                    "feedforward.up": f"linear1.{kind}",
                    "feedforward.down": f"linear2.{kind}",
                    "feedforward_norm": f"norm3.{kind}" if has_cross else f"norm2.{kind}",
                }
                if has_cross:
                    parts |= {"cross_norm": f"norm2.{kind}", "cross.out": f"multihead_attn.out_proj.{kind}"}
                    cross = theirs[f"{foreign}.multihead_attn.in_proj_{kind}"]
                    ours[f"{own}.cross.q.{kind}"] = cross[: shape.width]
                    ours[f"{own}.cross.kv.{kind}"] = cross[shape.width :]
                ours |= {f"{own}.{name}.{kind}": theirs[f"{foreign}.{other}"] for name, other in parts.items()}
    return ours


@dataclass(frozen=True)
class Distances:
    """Largest differences: absolute ones of rows, and of each gradient relative to its largest entry."""

    memory: float
    decoded: float
    logits: float
    gradients: Mapping[str, float]


def compare(model: Model, reference: Reference, shape: Shape, rng: np.random.Generator) -> Distances:
    """The same pairs through both, here packed, there padded; and the gradients of the same weighing of logits."""
    pairs = [tuple(rng.integers(0, shape.vocab_size, n) for n in lengths) for lengths in shape.lengths]
    batch = pack_pairs(pairs)
    hidden = model.trunk(batch)
    ours = by_record(batch, outputs_of(model, batch))

    source, target = pad([s for s, _ in pairs]), pad([t for _, t in pairs])
    logits, memory, decoded = reference(source, target)
    theirs = dict(enumerate(cut(logits, target[1])))
    weights = {i: torch.from_numpy(rng.standard_normal(theirs[i].shape, dtype=np.float32)) for i in theirs}
    for rows in (ours, theirs):
        sum((weights[i] * rows[i]).sum() for i in weights).backward()
    wanted = as_ours({name: p.grad for name, p in reference.named_parameters()}, shape)
    got = {name: p.grad for name, p in model.named_parameters()}
    assert set(got) <= set(wanted)
    return Distances(
        memory=largest(by_record(batch.source, hidden.source.final), dict(enumerate(cut(memory, source[1])))),
        decoded=largest(by_record(batch, hidden.final), dict(enumerate(cut(decoded, target[1])))),
        logits=largest(ours, theirs),
        gradients={
            name: float("inf") if got.get(name) is None else float((got[name] - g).abs().max() / g.abs().max())
            for name, g in wanted.items()
        },
    )


def refuse_distance(distances: Distances) -> None:
    """The check that both shapes must pass and no mutant may."""
    rows = {name: getattr(distances, name) for name in ("memory", "decoded", "logits")}
    for name, distance in {**rows, **{f"the gradient of {n}": d for n, d in distances.gradients.items()}}.items():
        assert distance <= TOLERANCE, f"{name} differs by {distance:.1e}"


def pack_pairs(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> PackedBatch:
    """Sources and targets of the pairs as one pack."""

    def tokens(ids: np.ndarray, side: str) -> Tokens:
        return Tokens(positions=np.arange(len(ids))[:, None], ids=ids, side=side)

    sequences = [tokens(ids, side) for pair in pairs for ids, side in zip(pair, (SOURCE, ""), strict=True)]
    return pack(sequences, [i for i in range(len(pairs)) for _ in range(2)])


def by_record(batch: PackedBatch, rows: torch.Tensor) -> dict[int, torch.Tensor]:
    parts = rows[: batch.layout.num_tokens].split(list(batch.layout.lengths))
    return dict(zip(batch.records, parts, strict=True))


def pad(sequences: Sequence[np.ndarray]) -> Padded:
    lengths = torch.tensor([len(ids) for ids in sequences])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    padded = torch.zeros(mask.shape, dtype=torch.long)
    padded[mask] = torch.from_numpy(np.concatenate(sequences))
    return padded, mask


def cut(rows: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
    return [row[kept] for row, kept in zip(rows, mask, strict=True)]


def largest(ours: Mapping[int, torch.Tensor], theirs: Mapping[int, torch.Tensor]) -> float:
    return max(float((ours[i] - theirs[i]).detach().abs().max()) for i in theirs)


@pytest.fixture
def make(rng: np.random.Generator) -> Callable[..., tuple[Model, Reference]]:
    """Our model and the reference with the same weights, in fp64 unless said otherwise."""

    def build(shape: Shape, dtype: torch.dtype = torch.float64, **changes: object) -> tuple[Model, Reference]:
        reference = redraw(Reference(shape), rng).to(dtype)
        model = Model(original(shape, **changes), specs([SYMBOLS])).to(dtype)
        weights = as_ours(dict(reference.named_parameters()), shape)
        model.load_state_dict({name: weights[name].detach().clone() for name in model.state_dict()}, strict=True)
        return model, reference

    return build


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_logits_and_gradients_are_those_of_the_reference(
    shape: str, make: Callable[..., tuple[Model, Reference]], rng: np.random.Generator, parity_row: Callable[..., None]
) -> None:
    refuse_distance(compare(*make(SHAPES[shape]), SHAPES[shape], rng))
    fp32 = compare(*make(SHAPES[shape], torch.float32), SHAPES[shape], rng)
    assert fp32.logits <= FP32_TOLERANCE
    gradients = max(fp32.gradients.values())
    parity_row("the original Transformer", shape, library="torch", forward=fp32.logits, gradients=gradients)


def test_evaluation_gives_the_rows_of_training_without_dropout(
    make: Callable[..., tuple[Model, Reference]], rng: np.random.Generator
) -> None:
    model, _ = make(SHAPES[ODD])
    batch = pack_pairs([tuple(rng.integers(0, 41, n) for n in lengths) for lengths in SHAPES[ODD].lengths])
    trained = model.trunk(batch).final.detach()
    with torch.inference_mode():
        evaluated = model.eval().trunk(batch).final
    # kernels may differ where no gradient is asked for
    assert float((trained - evaluated).abs()[: batch.layout.num_tokens].max()) <= TOLERANCE


@pytest.mark.parametrize("width", [6, 30, 64])
def test_the_table_of_positions_is_that_of_the_paper(width: int) -> None:
    layer = SinusoidalLayer(Sinusoidal(), width)
    # in fp32 a frequency, and its product with a place below 600, are each rounded by up to 600 / 2**24 = 3.6e-5
    assert float((layer(torch.arange(600)[:, None]) - paper_table(600, width)).abs().max()) <= 1e-4


def norm_before(model: Model) -> None:
    for block in (*model.trunk.encoder.blocks, *model.trunk.decoder.blocks):
        block.residual = replace(block.residual, placement="before")


def drop_norm_of_encoder(model: Model) -> None:
    model.trunk.encoder.final_norm = nn.Identity()


def drop_norm_of_decoder(model: Model) -> None:
    model.trunk.decoder.final_norm = nn.Identity()


def see_the_future(model: Model) -> None:
    attention = model.trunk.decoder.blocks[-1].attention
    attention.config = replace(attention.config, pattern=Full())


def hide_the_future_of_the_source(model: Model) -> None:
    model.trunk.encoder.blocks[0].attention.config = model.trunk.decoder.blocks[0].attention.config


def change_source(model: Model, change: Callable[[torch.Tensor, Context], Hidden]) -> None:
    """Let the first cross-attention see another source, made of its rows and context."""
    cross = model.trunk.decoder.blocks[0].cross
    forward = cross.forward
    cross.forward = lambda x, context: forward(x, SimpleNamespace(**vars(context) | {"source": change(x, context)}))


def attend_one_row_off(model: Model) -> None:
    """The first row of a source is the last one of the sequence before."""
    change_source(model, lambda _, context: replace(context.source, final=context.source.final.roll(1, dims=0)))


def attend_to_itself(model: Model) -> None:
    change_source(model, lambda x, context: Hidden(x, context.layout))


def drop_embedding_scale(model: Model) -> None:
    model.trunk.embedding.config = replace(model.trunk.embedding.config, scale=1.0)


def sines_then_cosines(model: Model) -> None:
    layer = model.trunk.embedding.position
    forward = layer.forward
    layer.forward = lambda positions: torch.cat([forward(positions)[:, 0::2], forward(positions)[:, 1::2]], dim=1)


def take_gelu(model: Model) -> None:
    model.trunk.decoder.blocks[0].feedforward.activation = F.gelu


def swap_norms(model: Model) -> None:
    block = model.trunk.decoder.blocks[0]
    block.cross_norm, block.feedforward_norm = block.feedforward_norm, block.cross_norm


def drop_cross_bias(model: Model) -> None:
    bias = model.trunk.decoder.blocks[0].cross.kv.bias.data
    bias[len(bias) // 2 :] = 0


MUTANTS = [
    norm_before,
    drop_norm_of_encoder,
    drop_norm_of_decoder,
    see_the_future,
    hide_the_future_of_the_source,
    attend_one_row_off,
    attend_to_itself,
    drop_embedding_scale,
    sines_then_cosines,
    take_gelu,
    swap_norms,
    drop_cross_bias,
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mutate", MUTANTS, ids=lambda mutate: mutate.__name__)
def test_a_mutant_is_caught(
    shape: str,
    mutate: Callable[[Model], None],
    make: Callable[..., tuple[Model, Reference]],
    rng: np.random.Generator,
) -> None:
    model, reference = make(SHAPES[shape])
    mutate(model)
    distances = compare(model, reference, SHAPES[shape], rng)
    with pytest.raises(AssertionError, match="differs"):
        refuse_distance(distances)


def test_a_mutant_of_the_gradient_is_caught(
    make: Callable[..., tuple[Model, Reference]], rng: np.random.Generator
) -> None:
    model, reference = make(SHAPES[ODD])
    change_source(model, lambda _, context: replace(context.source, final=context.source.final.detach()))
    distances = compare(model, reference, SHAPES[ODD], rng)
    assert distances.logits <= TOLERANCE
    with pytest.raises(AssertionError, match=r"the gradient of .* differs"):
        refuse_distance(distances)
