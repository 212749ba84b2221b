"""Whether the types fit what is no protein: images of patches, and two sides that attend across.

A test domain of 8 x 8 digits (patches with two position axes and a class row) and a toy cross-attention batch go
through the same `Tokens`, packs, trunk, objective, embedding and `attend` as proteins do.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from sklearn.datasets import load_digits
from torch.nn import functional as F

from labelled import ready
from meristem.data.pack import pack, pack_column
from meristem.data.parts import Part, RunData
from meristem.data.reading.reader import Reader
from meristem.data.records import PAYLOAD, ReadOptions, Source, batch_of, record_at
from meristem.data.tokenizer import Tokenizer
from meristem.domain import Domain
from meristem.inference.dedupe import Seen
from meristem.inference.engine import TrunkRunner
from meristem.model.config import Attention, Embedding, FeedForward, Full, Learned, TransformerConfig
from meristem.model.kernels import Packed, Scoring, attend, attend_reference
from meristem.model.model import Model
from meristem.objectives.supervised import Supervised, Target
from meristem.types import SOURCE, TokenColumn, Tokens

# --- a domain of images in fifty lines -------------------------------------------------------------------------

PATCH, GRID = 2, 4


class DigitTokenizer(Tokenizer):
    """An image of 8 x 8 bytes to a class row and 16 patches of 2 x 2."""

    kind = "digit patches"
    vocab = ("<class>",)
    num_special = (1, 0)
    mask_id = None
    random_ids = np.zeros(0, np.int64)

    def encode(self, payload: bytes) -> Tokens:
        return self.tokens_at(self.encode_column(pa.array([payload], pa.large_binary())), 0)

    def encode_column(self, payloads: pa.Array) -> TokenColumn:
        images = np.stack([np.frombuffer(payload.as_py(), np.uint8) for payload in payloads])
        patches = images.reshape(-1, GRID, PATCH, GRID, PATCH).swapaxes(2, 3).reshape(-1, GRID**2, PATCH**2)
        features = np.pad(patches.astype(np.float32) / 16, ((0, 0), (1, 0), (0, 0)))
        places = np.concatenate([[[-1, -1]], np.argwhere(np.ones((GRID, GRID)))])  # the class row has no place
        count, length = features.shape[:2]
        return TokenColumn(
            ids=np.tile(np.where(np.arange(length) == 0, 0, -1), count),
            offsets=np.arange(count + 1) * length,
            features=features.reshape(count * length, -1),
            positions=np.tile(places, (count, 1)),
            is_special=np.tile(np.arange(length) == 0, count),
        )

    def decode(self, tokens: Tokens) -> bytes:
        patches = (tokens.features[1:] * 16).astype(np.uint8).reshape(GRID, GRID, PATCH, PATCH)
        return patches.swapaxes(1, 2).tobytes()

    def to_json(self) -> dict[str, Any]:
        return {}


class DigitReader(Reader):
    def read(self, source: Source, options: ReadOptions) -> Iterator[pa.RecordBatch]:
        digits = load_digits()
        payloads = pa.array([image.astype(np.uint8).tobytes() for image in digits.images], pa.large_binary())
        ids, lines = pa.array([str(i) for i in range(len(payloads))]), range(1, len(payloads) + 1)
        yield batch_of(ids, payloads, source.name, lines, {"label:digit": pa.array(digits.target)})


TINY = TransformerConfig(
    width=32,
    num_layers=2,
    embedding=Embedding(vocab_size=1, patch_features=PATCH**2),
    position=Learned(max_positions=GRID**2, grid=(GRID, GRID)),
    attention=Attention(num_heads=4),
    feedforward=FeedForward(width=64),
)
domain = Domain("digits", DigitReader(), DigitTokenizer, {"tiny": TINY}, Path("digits"))

# ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def batch_of_records() -> pa.RecordBatch:
    [batch] = domain.reader.read(Source("digits"), ReadOptions(label_columns=("digit",)))
    return batch


def test_an_image_comes_back_from_its_tokens(batch_of_records: pa.RecordBatch) -> None:
    tokenizer = domain.tokenizer()
    for row in range(20):
        payload = record_at(batch_of_records, row).payload
        tokens = tokenizer.encode(payload)
        assert tokens.positions.shape == (17, 2)
        assert tokenizer.decode(tokens) == payload


def final_loss(batch_of_records: pa.RecordBatch, rng: np.random.Generator, is_blank: bool = False) -> float:
    """Cross-entropy of 128 images after sixty steps on them (1.75 at most for 100 draws of the weights)."""
    tokenizer = domain.tokenizer()
    records = [record_at(batch_of_records, row) for row in range(128)]
    objective = Supervised([Target(name="digit", pool="cls")])
    objective.bind(RunData(tokenizer, {"train": Part.of(records)}))
    payloads = [bytes(64) if is_blank else record.payload for record in records]
    prepared = [objective.prepare(r, ready(tokenizer.encode(p)), rng)[0] for r, p in zip(records, payloads)]
    batch = pack(prepared, range(len(prepared)))
    assert batch.features is not None
    assert batch.positions.shape[1] == 2
    model = Model(domain.presets["tiny"], objective.heads)
    extra = objective.build(model.config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(60):
        [term] = objective.loss_of(model, extra, batch).terms.values()
        loss = term.sum / term.count
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


@pytest.fixture(scope="module")
def label_entropy(batch_of_records: pa.RecordBatch) -> float:
    """Nats; no model that sees nothing of the images has a lower loss on these records."""
    labels = batch_of_records.column("label:digit").slice(0, 128).to_numpy()
    shares = np.unique(labels, return_counts=True)[1] / len(labels)
    return float(-(shares * np.log(shares)).sum())


def test_images_learn_by_the_objective_of_proteins(
    batch_of_records: pa.RecordBatch, label_entropy: float, rng: np.random.Generator
) -> None:
    assert final_loss(batch_of_records, rng) < label_entropy - 0.1


def test_blank_images_teach_nothing(
    batch_of_records: pa.RecordBatch, label_entropy: float, rng: np.random.Generator
) -> None:
    """The mutant: what reaches the trunk is not the image. The bar of the test above must refuse it."""
    assert final_loss(batch_of_records, rng, is_blank=True) > label_entropy - 1e-3  # fp32 sums of 128


def test_a_column_of_images_packs_as_its_tokens_do(batch_of_records: pa.RecordBatch, rng: np.random.Generator) -> None:
    tokenizer = domain.tokenizer()
    payloads = batch_of_records.column(PAYLOAD).slice(0, 30)
    column = tokenizer.encode_column(payloads)
    rows = rng.permutation(30)[:11]
    by_column = pack_column(column, rows, rows.tolist())
    by_tokens = pack([tokenizer.encode(payloads[int(row)].as_py()) for row in rows], rows.tolist())
    assert by_column.records == by_tokens.records
    assert by_column.layout == by_tokens.layout
    for name in ("ids", "positions", "features"):
        assert torch.equal(getattr(by_column, name), getattr(by_tokens, name)), name


def test_an_embedding_of_an_image_does_not_depend_on_its_batch_mates(batch_of_records: pa.RecordBatch) -> None:
    tokenizer = domain.tokenizer()
    column = tokenizer.encode_column(batch_of_records.column(PAYLOAD).slice(0, 12))
    model = Model(TINY)
    rows = {}
    for budget in (17, 17 * 5, 10_000):
        runner = TrunkRunner(model, tokens_per_batch=budget)
        found = {}
        for part in runner.run(column):
            for start, length, record in zip(part.layout.starts, part.layout.lengths, part.records):
                found[record] = part.values[start : start + length]
        rows[budget] = torch.stack([found[record] for record in range(12)])
    assert torch.equal(rows[17], rows[10_000])
    assert torch.equal(rows[17 * 5], rows[10_000])
    assert not torch.equal(rows[17][0], rows[17][1])


def test_images_that_differ_are_never_taken_for_equal(batch_of_records: pa.RecordBatch) -> None:
    """All images have the same symbols; their patches tell them apart."""
    payloads = batch_of_records.column(PAYLOAD).slice(0, 9).to_pylist()
    column = domain.tokenizer().encode_column(pa.array([*payloads, payloads[3]], pa.large_binary()))
    sources = Seen().look_up(0, column)
    assert sources.rows.tolist() == [*range(9), 3]
    assert sources.new_rows.tolist() == list(range(9))


def test_a_source_and_a_target_side_attend_across_as_padded_torch_does(rng: np.random.Generator) -> None:
    """Source and target side of an encoder-decoder, packed each for itself, sequence for sequence."""
    sides = [(5, 9), (4, 2), (1, 30), (1, 7), (3, 9)]  # targets, sources

    def tokens(length: int, side: str) -> Tokens:
        ids = rng.integers(0, 50, length)
        return Tokens(positions=np.arange(length)[:, None], ids=ids, side=side)

    sequences = [tokens(length, side) for pair in sides for length, side in zip(pair, ("", SOURCE))]
    batch = pack(sequences, [record for record in range(len(sides)) for _ in range(2)])
    assert batch.source is not None
    assert batch.records == batch.source.records
    assert batch.layout.num_spare != batch.source.layout.num_spare
    table = torch.randn(50, 24)
    num_heads, num_kv_heads, width = 6, 2, 8
    q = (table[batch.ids] @ torch.randn(24, num_heads * width)).unflatten(1, (num_heads, width)).requires_grad_()
    kv = (table[batch.source.ids] @ torch.randn(24, 2 * num_kv_heads * width)).unflatten(1, (2, num_kv_heads, width))
    k, v = kv.unbind(1)
    layouts = (batch.layout, batch.source.layout)
    got = attend(Packed(q, k, v, *layouts), Scoring(Full()))
    by_reference, weights = attend_reference(Packed(q, k, v, *layouts), Scoring(Full()))
    torch.testing.assert_close(got, by_reference, atol=2e-5, rtol=1e-4)

    for index, record in enumerate(batch.records):
        m, n = sides[record]
        assert weights[index].shape == (num_heads, m, n)
    # the same in torch: padded on both sides, with a mask
    longest = max(max(pair) for pair in sides)
    padded = torch.zeros(3, len(sides), longest, num_heads, width)
    is_seen = torch.zeros(len(sides), 1, longest, longest, dtype=torch.bool)
    share = num_heads // num_kv_heads
    for index in range(len(sides)):
        q_rows, kv_rows = (
            slice(layout.starts[index], layout.starts[index] + layout.lengths[index]) for layout in layouts
        )
        padded[0, index, : layouts[0].lengths[index]] = q[q_rows].detach()
        padded[1, index, : layouts[1].lengths[index]] = k[kv_rows].repeat_interleave(share, 1)
        padded[2, index, : layouts[1].lengths[index]] = v[kv_rows].repeat_interleave(share, 1)
        is_seen[index, 0, :, : layouts[1].lengths[index]] = True
    out = F.scaled_dot_product_attention(*padded.transpose(2, 3), attn_mask=is_seen).transpose(1, 2)
    for index, length in enumerate(layouts[0].lengths):
        start = layouts[0].starts[index]
        torch.testing.assert_close(got[start : start + length], out[index, :length], atol=2e-5, rtol=1e-4)

    got[: batch.layout.num_tokens].sum().backward()
    assert torch.isfinite(q.grad).all()
