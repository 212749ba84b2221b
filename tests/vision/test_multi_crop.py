"""Crops of one picture: what is drawn, what is changed, and that nothing else is."""

from dataclasses import replace

import numpy as np
import pytest

from meristem.errors import ConfigError
from meristem_domains.vision.multi_crop import LUMA, MultiCrop, blur, random_part, resize, turn_hue

PLAIN = MultiCrop(
    global_px=16, local_px=8, num_local=3, flip_rate=0, jitter_rate=0, grey_rate=0, blur_rates=(0, 0, 0),
    solarise_rate=0,
)  # fmt: skip


def picture(rng: np.random.Generator, height: int = 24, width: int = 20, channels: int = 3) -> np.ndarray:
    return rng.integers(0, 256, (height, width, channels), dtype=np.uint8)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_crops_are_a_function_of_picture_and_generator(rng, channels):
    crops = MultiCrop(global_px=16, local_px=8, num_local=3, solarise_rate=1.0)
    pixels, seed = picture(rng, channels=channels), int(rng.integers(2**32))
    views, again, others = (crops.draw(pixels, np.random.default_rng(s)) for s in (seed, seed, seed + 1))
    assert [view.shape for view in views] == [(side, side, channels) for side in (16, 16, 8, 8, 8)]
    assert all(view.dtype == np.float32 and view.min() >= 0 and view.max() <= 1 for view in views)
    assert all(np.array_equal(a, b) for a, b in zip(views, again))
    assert not any(np.array_equal(a, b) for a, b in zip(views, others))
    # the mutant: one view for all
    assert not np.array_equal(views[0], views[1])


def test_values_of_16_bits_give_the_crops_of_8(rng):
    pixels = picture(rng)
    for a, b in zip(PLAIN.draw(pixels, np.random.default_rng(5)), PLAIN.draw(pixels / 255, np.random.default_rng(5))):
        # float64 divided and rounded to float32, or float32 divided
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_the_share_of_the_area_is_what_is_asked_for(rng):
    height, width, scale = 200, 150, (0.2, 0.5)
    places = np.arange(height * width).reshape(height, width, 1)
    shares, firsts = [], set()
    for _ in range(300):
        part = random_part(places, scale, rng)
        shares.append(part[..., 0].size / places.size)
        assert 0.7 < part.shape[1] / part.shape[0] < 1.4  # sides are rounded
        firsts.add(int(part[0, 0, 0]))
        assert np.array_equal(part[0, :, 0], part[0, 0, 0] + np.arange(part.shape[1]))
    # a side is rounded by half a pixel of 50 or more
    assert scale[0] - 0.02 < min(shares) < 0.23
    assert 0.47 < max(shares) < scale[1] + 0.02
    assert len(firsts) > 200


def test_a_stripe_gives_its_middle(rng):
    places = np.arange(400).reshape(4, 100, 1)
    part = random_part(places, (0.9, 1.0), rng)
    assert np.array_equal(part, places[:, 48:52])


def test_each_change_is_what_it_says(rng):
    pixels, seed = picture(rng), int(rng.integers(2**32))

    def views(**changes) -> list[np.ndarray]:
        return replace(PLAIN, **changes).draw(pixels, np.random.default_rng(seed))

    plain = views()
    assert all(np.array_equal(a[:, ::-1], b) for a, b in zip(plain, views(flip_rate=1)))
    for view, grey in zip(plain, views(grey_rate=1)):
        assert np.array_equal(grey, np.repeat((view @ LUMA)[..., None], 3, axis=2))
    solarised = views(solarise_rate=1)
    assert np.array_equal(solarised[1], np.where(plain[1] >= 0.5, 1 - plain[1], plain[1]))
    assert all(np.array_equal(plain[i], solarised[i]) for i in (0, 2, 3, 4))
    # before the second view is blurred nothing else is drawn, so the first two and no others are as they were
    blurred = views(blur_rates=(0, 1, 0), blur_px=(0.5, 1.0))
    assert np.array_equal(plain[0], blurred[0])
    assert blurred[1].std() < plain[1].std()


def test_a_hue_is_turned_and_brightness_is_kept(rng):
    values = rng.random((5, 6, 3), np.float32)
    turned = turn_hue(values, 0.3)
    # products of float32
    np.testing.assert_allclose(turned @ LUMA, values @ LUMA, atol=1e-5)
    np.testing.assert_allclose(turn_hue(turned, 0.7), values, atol=1e-5)
    assert np.abs(turned - values).max() > 0.1
    grey = np.repeat(values[..., :1], 3, axis=2)
    np.testing.assert_allclose(turn_hue(grey, 0.3), grey, atol=1e-5)


def test_a_blur_is_a_weighted_mean_of_neighbours(rng):
    values, sigma = rng.random((7, 9, 2), np.float32), float(rng.uniform(0.3, 2))
    expected = np.zeros_like(values)
    for i in range(7):
        for j in range(9):
            weights = np.array(
                [[np.exp(-((a - i) ** 2 + (b - j) ** 2) / (2 * sigma**2)) for b in range(9)] for a in range(7)]
            )
            expected[i, j] = (values * weights[..., None]).sum((0, 1)) / weights.sum()
    np.testing.assert_allclose(blur(values, sigma), expected, atol=1e-5)  # float32 sums of 63 values
    # a tiny deviation leaves all as it is
    np.testing.assert_allclose(blur(values, 0.05), values, atol=1e-6)


def test_resizing_is_none_at_the_same_size(rng):
    pixels = picture(rng, 12, 12)
    assert np.array_equal(resize(pixels, 12), pixels.astype(np.float32) / np.float32(255))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"local_px": 16}, r"objective\.crops\.local_px must be 1 or more and below global_px; got \[16, 16\]"),
        ({"num_local": -1}, "num_local must be 0 or more; got -1"),
        ({"global_scale": [0.5, 0.4]}, r"global_scale must rise, from above 0 to 1 at most; got \[0.5, 0.4\]"),
        ({"local_scale": [0.0, 0.4]}, "local_scale must rise"),
        ({"flip_rate": 1.5}, "every rate must be between 0 and 1"),
        ({"jitter": (0.4, 0.4, 0.2, 0.6)}, "of the hue between 0 and 0.5"),
        ({"jitter": (0.4, 0.4)}, "jitter must be 4 numbers"),
        ({"blur_px": (0, 1)}, "blur_px must rise, from above 0"),
    ],
)
def test_what_cannot_be_drawn_is_refused(changes, said):
    with pytest.raises(ConfigError, match=said):
        replace(PLAIN, **changes)
