"""Corruption: what is scored, what is seen, and how often, against the stated rates."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meristem.data.corrupt import crop_window, cut_spans, delete_tokens, draw_spans, infill_tokens, mask_tokens
from meristem.types import IGNORE, Tokens

MASK = 32
RANDOM = np.arange(4, 24)


def corrupt(ids, is_maskable, rng, **options):
    options = {"rate": 0.15, "mask_id": MASK, "random_ids": RANDOM, **options}
    return mask_tokens(ids, is_maskable, rng, **options)


@given(
    st.integers(0, 10_000),
    st.lists(st.booleans(), min_size=1, max_size=80),
    st.floats(0.01, 1),
    st.sampled_from([1, 1.5, 4]),
)
@settings(deadline=None)
def test_targets_are_the_original_symbols_exactly_where_scored(seed, is_maskable, rate, mean_span):
    rng = np.random.default_rng(seed)
    is_maskable = np.array(is_maskable)
    before = rng.integers(4, 24, len(is_maskable))
    ids, targets = corrupt(before.copy(), is_maskable, rng, rate=rate, mean_span=mean_span)
    is_scored = targets != IGNORE
    assert (targets[is_scored] == before[is_scored]).all()
    assert not is_scored[~is_maskable].any()
    assert (ids[~is_scored] == before[~is_scored]).all()
    expected = rate * is_maskable.sum()
    if is_maskable.any():
        assert max(1, np.floor(expected)) <= is_scored.sum() <= max(1, np.ceil(expected))
    assert set(ids[is_scored]) <= {MASK, *RANDOM}


def test_same_generator_gives_the_same_masks_and_the_input_is_left_alone(rng):
    before = rng.integers(4, 24, 300)
    kept = before.copy()
    for mean_span in (1, 3):
        first = corrupt(before, np.ones(300, bool), np.random.default_rng(5), mean_span=mean_span)
        again = corrupt(before, np.ones(300, bool), np.random.default_rng(5), mean_span=mean_span)
        other = corrupt(before, np.ones(300, bool), np.random.default_rng(6), mean_span=mean_span)
        assert all((a == b).all() for a, b in zip(first, again))
        assert (first[1] != other[1]).any()
    assert (before == kept).all()


@pytest.mark.parametrize("mean_span", [1, 3])
def test_fates_and_rate_are_as_stated(rng, mean_span):
    n, repeats = 2_000, 40
    before = rng.integers(4, 24, n)
    masked = replaced = kept = scored = 0
    for _ in range(repeats):
        ids, targets = corrupt(before, np.ones(n, bool), rng, mean_span=mean_span)
        at = targets != IGNORE
        scored += at.sum()
        masked += (ids[at] == MASK).sum()
        replaced += ((ids[at] != MASK) & (ids[at] != before[at])).sum()
        kept += (ids[at] == before[at]).sum()
    assert abs(scored / repeats / n - 0.15) < 0.001  # the number of targets is exact but for rounding
    # 5 standard deviations of a binomial over 12,000 targets
    for got, expected in [(masked, 0.8), (replaced, 0.1 * 19 / 20), (kept, 0.1 + 0.1 / 20)]:
        assert abs(got / scored - expected) < 5 * np.sqrt(expected * (1 - expected) / scored)


def test_every_token_is_scored_equally_often(rng):
    n, repeats = 60, 4_000
    hits = np.zeros(n)
    for _ in range(repeats):
        hits += corrupt(np.full(n, 5), np.ones(n, bool), rng)[1] != IGNORE
    # 6 standard deviations of a binomial, 60 tokens looked at
    assert (np.abs(hits / repeats - 0.15) < 6 * np.sqrt(0.15 * 0.85 / repeats)).all()


def test_spans_have_the_stated_mean_length(rng):
    def mean_run(mean_span: float) -> float:
        is_scored = corrupt(np.full(40_000, 5), np.ones(40_000, bool), rng, rate=0.02, mean_span=mean_span)[1] > 0
        return is_scored.sum() / (np.diff(is_scored.astype(int)) == 1).sum()

    # at a rate of 2 % few spans touch; the standard deviation over 160 spans of mean 5 is 0.35
    assert abs(mean_run(5) - 5) < 2
    assert mean_run(1) < 1.1


def test_at_least_one_target_where_anything_is_maskable(rng):
    is_maskable = np.array([False, True, False])
    _, targets = corrupt(np.array([0, 9, 2]), is_maskable, rng, rate=1e-6)
    assert targets.tolist() == [IGNORE, 9, IGNORE]
    ids, targets = corrupt(np.array([0, 2]), np.zeros(2, bool), rng)
    assert ids.tolist() == [0, 2]
    assert (targets == IGNORE).all()


@given(st.integers(0, 10_000), st.integers(3, 50), st.integers(0, 60), st.integers(0, 1), st.integers(0, 1))
@settings(deadline=None)
def test_a_window_is_a_stretch_of_the_payload_between_the_special_tokens(seed, max_tokens, body, before, behind):
    n = before + body + behind
    places = np.arange(n)
    is_special = (places < before) | (places >= n - behind)
    spans = np.stack([places, places + 1], 1) - before
    whole = Tokens(places[:, None], ids=places + 100, spans=spans, is_special=is_special)
    window = crop_window(whole, max_tokens, np.random.default_rng(seed))
    assert len(window) == min(n, max_tokens)
    assert window.positions[:, 0].tolist() == list(range(len(window)))
    own = window.ids[before : len(window) - behind]
    assert (np.diff(own) == 1).all()
    assert set(own) <= set(whole.ids[before : n - behind])
    assert window.ids[:before].tolist() == whole.ids[:before].tolist()
    assert window.ids[len(window) - behind :].tolist() == whole.ids[n - behind :].tolist()
    assert (window.spans[:, 0] + before + 100 == window.ids).all()
    assert window.is_special.tolist() == is_special[window.ids - 100].tolist()


def test_every_window_is_equally_likely(rng):
    places = np.arange(12)
    whole = Tokens(places[:, None], ids=places, is_special=np.isin(places, [0, 11]))
    starts = [crop_window(whole, 9, rng).ids[1] for _ in range(4_000)]
    counts = np.bincount(starts, minlength=5)[1:]
    # 5 standard deviations of a binomial
    assert (np.abs(counts - 1_000) < 5 * np.sqrt(4_000 * 0.25 * 0.75)).all()
    assert len(counts) == 4


SENTINELS = np.arange(1099, 999, -1)


def restore(source: list[int], target: list[int]) -> list[int] | None:
    """The slow oracle of `cut_spans`: read the target into a dictionary, fill each sentinel in; None if it fails."""
    spans: dict[int, list[int]] = {}
    for symbol in target:
        if symbol in SENTINELS:
            spans[symbol] = current = []
        else:
            current.append(symbol)
    _, ending = spans.popitem()
    restored: list[int] = []
    for symbol in source:
        if symbol in SENTINELS and symbol not in spans:
            return None
        restored += spans.pop(symbol) if symbol in SENTINELS else [symbol]
    return None if spans or ending else restored


@given(st.integers(0, 10_000), st.integers(1, 300), st.floats(0.01, 1), st.sampled_from([1, 1.7, 3, 8]))
@settings(deadline=None)
def test_source_and_target_of_cut_spans_make_the_whole_again(seed, length, rate, mean_span):
    rng = np.random.default_rng(seed)
    ids = rng.integers(4, 24, length)
    before = ids.copy()
    spans = draw_spans(length, rng, rate=rate, mean_span=mean_span, most=len(SENTINELS) - 2)
    source, target = cut_spans(ids, spans, SENTINELS)
    assert restore(source.tolist(), target.tolist()) == before.tolist()
    assert (ids == before).all()
    assert (spans[:, 1] > spans[:, 0]).all()
    assert (spans[1:, 0] > spans[:-1, 1]).all()  # two side by side would be one
    assert [symbol for symbol in source if symbol in SENTINELS] == SENTINELS[: len(spans)].tolist()
    assert [symbol for symbol in target if symbol in SENTINELS] == SENTINELS[: len(spans) + 1].tolist()
    # the mutant: sentinels off by one in the target
    mutant = cut_spans(ids, spans, SENTINELS[1:])[1]
    assert restore(source.tolist(), mutant.tolist()) != before.tolist()


@given(st.integers(0, 10_000), st.integers(1, 2_000), st.floats(0.01, 0.6), st.sampled_from([1, 2, 3, 5]))
@settings(deadline=None)
def test_tokens_in_spans_and_spans_are_as_many_as_stated(seed, length, rate, mean_span):
    spans = draw_spans(length, np.random.default_rng(seed), rate=rate, mean_span=mean_span, most=10_000)
    num_cut = max(1, min(round(length * rate), length - 1))
    assert np.diff(spans).sum() == num_cut
    fit = length - num_cut + 1  # a kept token between each two
    assert len(spans) == min(max(1, round(num_cut / mean_span)), fit)
    few = draw_spans(length, np.random.default_rng(seed), rate=rate, mean_span=mean_span, most=3)
    assert len(few) == min(3, len(spans))
    assert np.diff(few).sum() == num_cut


def test_a_text_of_512_tokens_has_the_77_noise_tokens_in_26_spans_of_the_paper(rng):
    spans = draw_spans(512, rng, rate=0.15, mean_span=3, most=99)
    assert (np.diff(spans).sum(), len(spans)) == (77, 26)


def test_every_placement_of_spans_is_equally_likely(rng):
    # 5 tokens, 3 of them in 2 spans: lengths 1 + 2 or 2 + 1, at 2 of 3 gaps around the 2 kept tokens
    repeats = 6_000
    drawn = [tuple(draw_spans(5, rng, rate=0.6, mean_span=1.5, most=9).ravel()) for _ in range(repeats)]
    counts = np.array([drawn.count(placement) for placement in set(drawn)])
    assert len(counts) == 6
    # 5 standard deviations of a binomial
    assert (np.abs(counts - repeats / 6) < 5 * np.sqrt(repeats * 5 / 36)).all()


@given(st.integers(0, 10_000), st.integers(1, 200), st.floats(0, 1), st.sampled_from([0.5, 3]))
@settings(deadline=None)
def test_infilling_hides_the_stated_tokens_and_keeps_the_others_in_order(seed, length, rate, mean_span):
    ids = np.arange(length) + 100
    source = infill_tokens(ids, np.random.default_rng(seed), rate=rate, mean_span=mean_span, mask_id=MASK)
    kept = source[source != MASK]
    assert (np.diff(kept) > 0).all()
    assert set(kept) <= set(ids)
    assert np.floor(rate * length) <= length - len(kept) <= np.ceil(rate * length)
    # what is missing shows as a mask, though a mask may stand for nothing
    pairs = [(a, b) for a, b in itertools.pairwise(source) if a != MASK and b != MASK]
    assert all(b == a + 1 for a, b in pairs)
    assert source[0] in (MASK, ids[0])
    assert source[-1] in (MASK, ids[-1])


def test_lengths_behind_a_mask_are_poisson(rng):
    n, mean_span = 30_000, 3.0
    source = infill_tokens(np.arange(n) + 100, rng, rate=0.3, mean_span=mean_span, mask_id=MASK)
    num_masks = int((source == MASK).sum())
    # 0.3 * n tokens in spans of mean 3: their number has the standard deviation sqrt(0.3 n / 3) / sqrt(3)
    assert abs(num_masks - 0.3 * n / mean_span) < 6 * np.sqrt(0.3 * n / mean_span / mean_span)


@given(st.integers(0, 10_000), st.integers(0, 200), st.floats(0, 0.99))
@settings(deadline=None)
def test_deletion_leaves_the_stated_number_in_order(seed, length, rate):
    kept = delete_tokens(np.arange(length) + 100, np.random.default_rng(seed), rate=rate)
    assert (np.diff(kept) > 0).all()
    assert len(kept) >= min(length, 1)
    assert length - np.ceil(rate * length) <= len(kept) <= max(length - np.floor(rate * length), 1 if length else 0)
