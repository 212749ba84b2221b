"""Positions are their formulas."""

import math

import numpy as np
import pytest
import torch

from meristem.model.config import BandScaling, BucketBias, LinearScaling, Rotary, Sinusoidal
from meristem.model.position import (
    RotaryLayer,
    SinusoidalLayer,
    distance_buckets,
    linear_slopes,
    rotary_frequencies,
)


def slow_rotation(x: np.ndarray, place: list[int], config: Rotary) -> np.ndarray:
    """One head at one place, pair by pair, in float64."""
    width = config.width or len(x)
    share = width // config.num_axes
    out = x.astype(np.float64).copy()
    pair = 0
    for axis in range(config.num_axes):
        for k in range(share // 2):
            angle = max(place[axis], 0) * config.base ** (-2 * k / share)
            a, b = (2 * pair, 2 * pair + 1) if config.is_interleaved else (pair, pair + width // 2)
            out[a] = x[a] * math.cos(angle) - x[b] * math.sin(angle)
            out[b] = x[b] * math.cos(angle) + x[a] * math.sin(angle)
            pair += 1
    return out[pairs_together(config, len(x))]


def pairs_together(config: Rotary, head_width: int) -> np.ndarray:
    """The order in which a rotation hands features on: the two of each pair as neighbours."""
    width = config.width or head_width
    order = np.arange(head_width)
    if not config.is_interleaved:
        order[:width] = order[:width].reshape(2, -1).T.ravel()
    return order


@pytest.mark.parametrize("num_axes", [1, 2, 3])
@pytest.mark.parametrize("is_interleaved", [False, True])
@pytest.mark.parametrize("width", [None, 12])
def test_pairs_turn_by_the_place_on_their_axis(
    num_axes: int, is_interleaved: bool, width: int | None, rng: np.random.Generator
) -> None:
    config = Rotary(base=100.0, num_axes=num_axes, is_interleaved=is_interleaved, width=width)
    layer = RotaryLayer(config, 24)
    x = rng.standard_normal((7, 2, 24)).astype(np.float32)
    places = rng.integers(-1, 30, (7, num_axes))
    got = layer.turn(torch.from_numpy(x), layer.tables(torch.from_numpy(places)))
    wanted = np.stack([[slow_rotation(head, list(place), config) for head in row] for row, place in zip(x, places)])
    np.testing.assert_allclose(got.numpy(), wanted, atol=2e-5)  # fp32 angles of up to 30


@pytest.mark.parametrize("mutant", [Rotary(base=100.0), Rotary(base=100.0, num_axes=2, is_interleaved=True)])
def test_another_rotation_is_seen(mutant: Rotary, rng: np.random.Generator) -> None:
    config = Rotary(base=100.0, num_axes=2)
    x = torch.randn(5, 1, 24)
    places = torch.from_numpy(rng.integers(1, 30, (5, 2)))
    wanted = RotaryLayer(config, 24).turn(x, RotaryLayer(config, 24).tables(places))
    layer = RotaryLayer(mutant, 24)
    assert not torch.allclose(layer.turn(x, layer.tables(places[:, : mutant.num_axes])), wanted, atol=1e-2)


def test_scaled_frequencies_are_those_of_their_formulas() -> None:
    plain = rotary_frequencies(Rotary(base=5e5), 64)
    torch.testing.assert_close(rotary_frequencies(Rotary(base=5e5, scaling=LinearScaling(factor=4.0)), 64), plain / 4)
    scaling = BandScaling(factor=8.0, low=1.0, high=4.0, original_tokens=8192)
    got = rotary_frequencies(Rotary(base=5e5, scaling=scaling), 64).tolist()
    kinds = set()
    for frequency, scaled in zip(plain.tolist(), got):
        turns = 8192 * frequency / (2 * math.pi)  # waves within the length the model was trained to
        if turns > 4:
            kinds.add("short")
            wanted = frequency
        elif turns < 1:
            kinds.add("long")
            wanted = frequency / 8
        else:
            kinds.add("between")
            share = (turns - 1) / 3
            wanted = (1 - share) * frequency / 8 + share * frequency
        assert scaled == pytest.approx(wanted, rel=1e-5)
    assert kinds == {"short", "between", "long"}


@pytest.mark.parametrize("width", [16, 15])
def test_sinusoids_are_those_of_the_paper(width: int) -> None:
    got = SinusoidalLayer(Sinusoidal(), width)(torch.tensor([[0], [1], [37], [-1]]))
    for row, place in enumerate([0, 1, 37]):
        for feature in range(width):
            angle = place / 10000 ** (2 * (feature // 2) / width)
            wanted = math.cos(angle) if feature % 2 else math.sin(angle)
            assert got[row, feature].item() == pytest.approx(wanted, abs=1e-5)
    assert not got[3].any()  # a row without a place


def test_slopes_halve_from_head_to_head_and_fill_up_between() -> None:
    assert linear_slopes(8).tolist() == [2.0**-k for k in range(1, 9)]
    twelve = linear_slopes(12).tolist()
    assert twelve[:8] == [2.0**-k for k in range(1, 9)]
    assert twelve[8:] == pytest.approx([2 ** (-k / 2) for k in (1, 3, 5, 7)])


@pytest.mark.parametrize("is_two_sided", [True, False])
def test_buckets_grow_with_distance(is_two_sided: bool) -> None:
    config = BucketBias(num_buckets=32, max_distance=128, is_two_sided=is_two_sided)
    distances = torch.arange(-300, 301)
    buckets = dict(zip(distances.tolist(), distance_buckets(config, distances[None])[0].tolist()))
    side = 16 if is_two_sided else 32
    for distance in range(side // 2):
        assert buckets[-distance] == distance
    assert buckets[-127] == side - 1 or buckets[-127] == side - 2
    assert buckets[-128] == buckets[-300] == side - 1
    before = [buckets[-distance] for distance in range(301)]
    assert before == sorted(before)
    assert set(before) == set(range(side))
    if is_two_sided:
        assert all(buckets[distance] == 16 + buckets[-distance] for distance in range(1, 301))
    else:
        assert all(buckets[distance] == 0 for distance in range(301))


@pytest.mark.parametrize("is_even", [True, False])
def test_a_row_turns_alike_wherever_it_stands(is_even: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, with two threads whose shares would meet within a row; in one call for all it is not so."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        if not is_even:
            monkeypatch.setattr("meristem.model.exact.multiply_rows", lambda x, table: x * table)
        layer, x = RotaryLayer(Rotary(), 16), torch.randn(4567, 5, 16)
        tables = layer.tables(torch.arange(4567)[:, None])
        with torch.inference_mode():
            together = layer.turn(x, tables)
            alone = [layer.turn(x[i : i + 1], tuple(t[i : i + 1] for t in tables)) for i in range(2200, 2400)]
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(together[2200:2400], torch.cat(alone)) == is_even
