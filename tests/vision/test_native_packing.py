"""Pictures of many sizes in one pack, at native resolution: a vector is what the picture alone would have given."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from meristem.api import LoadedModel
from meristem.inference import engine
from meristem.model import attention, pool
from meristem.model.config import (
    Attention,
    AttentionPool,
    Embedding,
    FeedForward,
    LayerNorm,
    Mean,
    Pool,
    Position,
    Prefix,
    Rotary,
    SinCos2D,
    TransformerConfig,
)
from meristem.model.kernels import Packed
from meristem.model_directory import ModelCard
from meristem.types import Layout, PackedBatch
from meristem_domains.vision import domain

POSITIONS = {
    "sines and cosines": SinCos2D(),
    "the other convention": SinCos2D(reaches_base=True),
    "rotary of two axes": Rotary(num_axes=2),
}
POOLS = {
    "class": (Prefix(), "own"),
    "class, a map": (Prefix(is_dense=True), "own"),
    "mean, a norm": (Mean(is_normed=True), "own"),
    "attention": (AttentionPool(num_heads=4, feedforward_width=48), "own"),
    "mean": (None, "mean"),
    "maximum": (None, "max"),
    "one a patch": (None, "none"),
}
PATCH_PX, MAX_PATCHES = 8, 300


def native_model(position: Position, own: Pool | None, num_registers: int = 2) -> LoadedModel:
    """A small model of pictures of any size, every parameter redrawn."""
    tokenizer = domain.tokenizer(image_px=None, patch_px=PATCH_PX, num_registers=num_registers, max_patches=MAX_PATCHES)
    config = TransformerConfig(
        width=48,
        num_layers=2,
        embedding=Embedding(vocab_size=len(tokenizer.vocab), patch_features=tokenizer.num_features),
        position=position,
        attention=Attention(num_heads=4),
        feedforward=FeedForward(width=100),
        norm=LayerNorm(eps=1e-6),
        pool=own,
    )
    card = ModelCard(config, tokenizer, domain="vision")
    model = card.build().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            drawn = torch.randn_like(parameter)
            parameter.copy_(drawn * 1.5 * parameter.shape[-1] ** -0.5 if drawn.ndim > 1 else parameter + 0.3 * drawn)
    return LoadedModel(card, model, "cpu")


def drawn(rng: np.random.Generator, count: int, least: int = 8, most: int = 200) -> list[np.ndarray]:
    """Pictures whose height and width know nothing of each other."""
    return [rng.integers(0, 256, (*rng.integers(least, most, 2), 3)).astype(np.uint8) for _ in range(count)]


def embed(model: LoadedModel, pictures: list[np.ndarray], how: str, budget: int) -> list[np.ndarray]:
    return list(model.embed(pictures, pool=how, tokens_per_batch=budget, precision="fp32"))


@pytest.mark.parametrize("position", POSITIONS.values(), ids=POSITIONS.keys())
@pytest.mark.parametrize("named", POOLS.values(), ids=POOLS.keys())
@settings(max_examples=3, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(2, 9), budget=st.sampled_from([150, 700, 100_000]))
def test_a_picture_gives_the_same_alone_and_packed_with_others_of_other_sizes(
    position: Position, named: tuple[Pool | None, str], seed: int, count: int, budget: int
) -> None:
    rng, (own, how) = np.random.default_rng(seed), named
    torch.manual_seed(seed)
    model = native_model(position, own)
    pictures = drawn(rng, count)
    alone = [embed(model, [picture], how, 1)[0] for picture in pictures]
    order = rng.permutation(count)
    for got, i in zip(embed(model, [pictures[i] for i in order], how, budget), order, strict=True):
        # on a CPU in fp32 bit for bit: each row and each sequence goes through the same arithmetic
        assert np.array_equal(got, alone[i]), f"{pictures[i].shape}: {np.abs(got - alone[i]).max():.1e} apart"


def distance(model: LoadedModel, pictures: list[np.ndarray], how: str) -> float:
    """How far vectors of a pack lie from those alone, by their root mean square."""
    alone = [embed(model, [picture], how, 1)[0] for picture in pictures]
    packed = embed(model, pictures, how, 100_000)
    scale = float(np.sqrt(np.mean(np.concatenate([vector.ravel() for vector in alone]) ** 2)))
    return max(float(np.abs(a - b).max()) for a, b in zip(alone, packed, strict=True)) / scale


def as_one_sequence(packed: Packed) -> Packed:
    device = packed.q_THE.device
    layouts = (Layout((len(rows),), device=device) for rows in (packed.q_THE, packed.k_UKE))
    return Packed(packed.q_THE, packed.k_UKE, packed.v_UKE, *layouts)


def see_all_of_the_pack(monkeypatch: pytest.MonkeyPatch) -> None:
    attend = attention.attend

    monkeypatch.setattr(attention, "attend", lambda packed, scoring: attend(as_one_sequence(packed), scoring))


def count_places_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second picture's first patch is the one behind the last of the first picture."""
    lay = engine.pack_column

    def lay_through(*arguments: Any, **options: Any) -> PackedBatch:
        batch = lay(*arguments, **options)
        before = np.cumsum([0, *batch.layout.lengths])[:-1].repeat(batch.layout.lengths)
        moved = batch.positions[: len(before)] + torch.from_numpy(before)[:, None]
        positions = batch.positions.clone()
        positions[: len(before)] = torch.where(positions[: len(before)] < 0, -1, moved)
        return replace(batch, positions=positions)

    monkeypatch.setattr(engine, "pack_column", lay_through)


def forget_the_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pack holds the shortest first, which is not the order of the caller."""
    lay = engine.pack_column

    def lay_sorted(*arguments: Any, **options: Any) -> PackedBatch:
        batch = lay(*arguments, **options)
        return replace(batch, records=tuple(sorted(batch.records)))

    monkeypatch.setattr(engine, "pack_column", lay_sorted)


def pool_the_pack(monkeypatch: pytest.MonkeyPatch) -> None:
    attend = pool.attend

    monkeypatch.setattr(pool, "attend", lambda packed, scoring: attend(as_one_sequence(packed), scoring))


MUTANTS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], str]] = {
    "attention over the pack": (see_all_of_the_pack, "mean"),
    "places go on": (count_places_through, "mean"),
    "order of the pack": (forget_the_order, "mean"),
    "the pool sees the pack": (pool_the_pack, "attention"),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_pictures_that_reach_into_each_other_are_caught(
    mutant: str, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, named = MUTANTS[mutant]
    own, how = POOLS[named]
    model, pictures = native_model(SinCos2D(), own), drawn(rng, 6)
    pictures.sort(key=lambda picture: -picture.size)
    assert distance(model, pictures, how) == 0
    change(monkeypatch)
    # some hundred times what another order of sums would give
    assert distance(model, pictures, how) > 1e-3


def test_no_picture_is_resized_but_for_the_limit(rng: np.random.Generator) -> None:
    """What is packed are the picture's own pixels: a vector at native resolution is no vector of a square."""
    model = native_model(SinCos2D(), None)
    pictures = [picture for picture in drawn(rng, 40) if picture.size // 3 // PATCH_PX**2 < MAX_PATCHES]
    column = model.card.tokenizer.encode_values(pictures)
    for row, picture in enumerate(pictures):
        height, width = (side - side % PATCH_PX for side in picture.shape[:2])
        assert column.lengths[row] == height * width // PATCH_PX**2 + 3
        if (height, width) == picture.shape[:2]:
            got = model.card.tokenizer.decode(model.card.tokenizer.tokens_at(column, row))
            assert np.array_equal((255 * got).round().astype(np.uint8), picture)


def test_budgets_cut_packs_and_change_nothing(rng: np.random.Generator) -> None:
    model, pictures = native_model(Rotary(num_axes=2), None), drawn(rng, 25)
    wanted = embed(model, pictures, "mean", 100_000)
    for budget in (1, 77, 400, 3000):
        assert all(np.array_equal(a, b) for a, b in zip(embed(model, pictures, "mean", budget), wanted, strict=True))


@pytest.mark.parametrize("named", ["class, a map", "attention"])
def test_a_pool_without_spare_rows_is_caught(
    named: str, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mutant: a map of few vectors rounds by how many there are, where its weights are not reordered."""
    monkeypatch.setattr(engine, "with_runnable_heads", lambda model: model)
    own, how = POOLS[named]
    model, pictures = native_model(SinCos2D(), own), drawn(rng, 11)
    assert distance(model, pictures, how) == 0
    monkeypatch.setattr(pool, "with_spare_rows", lambda rows: rows)
    found = distance(model, pictures, how)
    if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):  # other processors may round alike either way
        assert found > 0
