"""What an objective does to tokens before the trunk sees them: pure functions of (tokens, generator)."""

from dataclasses import replace
from typing import Any

import numpy as np

from meristem.types import IGNORE, Tokens


def mask_tokens(
    ids: np.ndarray,
    is_maskable: np.ndarray,
    rng: np.random.Generator,
    *,
    rate: float,
    mask_id: int,
    random_ids: np.ndarray,
    mask_frac: float = 0.8,
    random_frac: float = 0.1,
    mean_span: float = 1,
) -> tuple[np.ndarray, np.ndarray]:
    """Hide some tokens, replace some by others, keep some; all of them are to be predicted.

    The number of targets is `rate` times the maskable tokens, rounded up or down at random so that it is
    exact on average, and at least 1 where anything is maskable. (BERT, Devlin et al. 2019, section 3.1,
    draws that number from a binomial: the same mean, more noise.)

    Args:
        ids: `[n]` symbols; not changed.
        is_maskable: `[n]` whether a token may become a target: not the special ones, as a rule.
        rate: fraction of the maskable tokens that become targets, in (0, 1].
        random_ids: symbols to replace a token by, drawn uniformly; the token's own is among them.
        mask_frac: fraction of the targets that are hidden.
        random_frac: fraction of the targets that are replaced; the rest stays as it is.
        mean_span: targets lie in spans of geometric length with this mean (cut where a token is not
            maskable or is taken, and where the number of targets is reached); 1 scatters them.

    Returns:
        `[n]` corrupted symbols and `[n]` targets: the original symbol, or `IGNORE` where unscored.
    """
    assert 0 < rate <= 1
    assert mask_frac >= 0
    assert random_frac >= 0
    assert mask_frac + random_frac <= 1
    assert mean_span >= 1
    ids = np.array(ids, dtype=np.int64)  # a copy
    targets = np.full(len(ids), IGNORE, np.int64)
    maskable = np.flatnonzero(is_maskable)
    if not len(maskable):
        return ids, targets
    count = min(len(maskable), max(1, _rounded_at_random(rate * len(maskable), rng)))
    if mean_span > 1:
        chosen = _choose_spans(maskable, count, mean_span, rng)
    else:
        chosen = rng.choice(maskable, count, replace=False, shuffle=False)
    chosen = np.sort(chosen)
    targets[chosen] = ids[chosen]
    fate = rng.random(count)
    ids[chosen[fate < mask_frac]] = mask_id
    replaced = chosen[(fate >= mask_frac) & (fate < mask_frac + random_frac)]
    if len(replaced):
        ids[replaced] = random_ids[rng.integers(0, len(random_ids), len(replaced))]
    return ids, targets


def draw_spans(length: int, rng: np.random.Generator, *, rate: float, mean_span: float, most: int) -> np.ndarray:
    """Where spans of a sequence are cut out, never two side by side (Raffel 2020, arXiv 1910.10683, section 3.1.4).

    `rate * length` tokens lie in spans, rounded to the nearest (halves to even) and 1 at least; where there is more
    than one token, one at least lies in none. There are `tokens in spans / mean_span` spans, rounded so too: 1 at
    least, and no more than fit. Lengths and places are drawn uniformly from all there are. (The published code of T5
    always keeps the first token and cuts the last one; here no token is special.)

    Args:
        rate: fraction of the tokens that lie in spans, in (0, 1].
        mean_span: tokens of a span on average; 1 or more.
        most: spans at most, as each needs a symbol of its own; they are then longer.

    Returns:
        `[spans, 2]` first token of each span and the one behind its last, in order; none where there is no token.
    """
    assert 0 < rate <= 1
    assert mean_span >= 1
    assert most >= 1
    if not length:
        return np.zeros((0, 2), np.int64)
    num_cut = min(max(round(rate * length), 1), max(length - 1, 1))
    num_kept = length - num_cut
    num_spans = min(max(round(num_cut / mean_span), 1), num_cut, num_kept + 1, most)
    inner = np.sort(rng.choice(num_cut - 1, num_spans - 1, replace=False)) + 1
    lengths = np.diff(inner, prepend=0, append=num_cut)
    # a span stands before the k-th kept token, or behind the last one; no two at one place
    kept_before = np.sort(rng.choice(num_kept + 1, num_spans, replace=False))
    starts = kept_before + np.cumsum(lengths) - lengths
    return np.stack([starts, starts + lengths], axis=1)


def cut_spans(ids: np.ndarray, spans: np.ndarray, sentinels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What an encoder reads and a decoder writes: each is the other's sentinels filled in.

    Args:
        spans: `[k, 2]` as `draw_spans` gives them.
        sentinels: `[k + 1]` or more symbols; the i-th stands for the i-th span, one more ends the target.

    Returns:
        The source, a sentinel in the place of each span; and the target: sentinel, span, sentinel, span ... sentinel.
    """
    assert len(sentinels) > len(spans)
    source: list[Any] = []
    target: list[Any] = []
    at = 0
    for (start, stop), sentinel in zip(spans.tolist(), sentinels):
        source += [ids[at:start], [sentinel]]
        target += [[sentinel], ids[start:stop]]
        at = stop
    source.append(ids[at:])
    target.append([sentinels[len(spans)]])
    return np.concatenate(source).astype(np.int64), np.concatenate(target).astype(np.int64)


def infill_tokens(
    ids: np.ndarray, rng: np.random.Generator, *, rate: float, mean_span: float, mask_id: int
) -> np.ndarray:
    """Replace spans by one mask each, so that their lengths are hidden too (BART, Lewis 2019, arXiv 1910.13461).

    Span lengths are Poisson; one of length 0 puts a mask where nothing is missing. Each span stands at a place drawn
    uniformly from all between kept tokens, so two masks may be neighbours.

    Args:
        ids: `[n]` symbols; not changed.
        rate: fraction of the tokens that are hidden, in [0, 1]; their number is rounded up or down at random.
        mean_span: mean of the Poisson distribution, in tokens.
    """
    assert 0 <= rate <= 1
    assert mean_span > 0
    left = _rounded_at_random(rate * len(ids), rng)
    lengths = []
    while left:
        lengths.append(min(left, int(rng.poisson(mean_span))))
        left -= lengths[-1]
    kept_before = np.sort(rng.integers(0, len(ids) - sum(lengths) + 1, len(lengths)))
    parts, at, num_kept = [], 0, 0
    for place, length in zip(kept_before.tolist(), lengths):
        parts += [ids[at : at + place - num_kept], [mask_id]]
        at += place - num_kept + length
        num_kept = place
    return np.concatenate([*parts, ids[at:]]).astype(np.int64)


def delete_tokens(ids: np.ndarray, rng: np.random.Generator, *, rate: float) -> np.ndarray:
    """Leave out some tokens without a trace, but never all (BART, Lewis 2019, section 2.2).

    Args:
        ids: `[n]` symbols; not changed.
        rate: fraction of the tokens that go, in [0, 1); their number is rounded up or down at random.
    """
    assert 0 <= rate < 1
    num_kept = max(len(ids) - _rounded_at_random(rate * len(ids), rng), min(len(ids), 1))
    return ids[np.sort(rng.choice(len(ids), num_kept, replace=False, shuffle=False))]


def crop_window(tokens: Tokens, max_tokens: int, rng: np.random.Generator) -> Tokens:
    """A random window of a sequence that is too long; the special tokens before and behind the payload stay.

    Positions count from 0 again, as if the window were all there is; spans still point into the whole
    payload. Each place is equally likely. The generator is drawn from only where something is cut.

    Args:
        tokens: before corruption: without targets.
        max_tokens: special tokens included; more than those.
    """
    if len(tokens) <= max_tokens:
        return tokens
    return crop_at(tokens, max_tokens, int(rng.integers(len(tokens) - max_tokens + 1)))


def crop_at(tokens: Tokens, max_tokens: int, first: int) -> Tokens:
    """As `crop_window`, from a given token on.

    Args:
        first: where the window begins, counted from the first token of the payload; where fewer tokens follow than a
            window holds, it is the last ones.
    """
    if len(tokens) <= max_tokens:
        return tokens
    assert not tokens.targets
    before, behind = tokens.frame
    start = before + min(first, len(tokens) - max_tokens)
    stop = start + max_tokens - before - behind
    kept = np.r_[:before, start:stop, len(tokens) - behind : len(tokens)]
    own = {name: getattr(tokens, name) for name in ("ids", "features", "spans", "is_special")}
    changed: Any = {name: None if values is None else values[kept] for name, values in own.items()}
    return replace(tokens, positions=tokens.positions[:max_tokens], **changed)


def _rounded_at_random(number: float, rng: np.random.Generator) -> int:
    """The whole number above or below, so that the mean is exact."""
    return int(number + rng.random())


def _choose_spans(maskable: np.ndarray, count: int, mean_span: float, rng: np.random.Generator) -> np.ndarray:
    """`count` of the maskable tokens, in spans: each starts at a free token and stops before a taken one."""
    is_free = np.zeros(maskable[-1] + 2, bool)
    is_free[maskable] = True
    left = count
    for start in rng.permutation(maskable):
        if left and is_free[start]:
            longest = min(left, int(rng.geometric(1 / mean_span)))
            window = is_free[start : start + longest]
            length = len(window) if window.all() else int(np.argmin(window))
            is_free[start : start + length] = False
            left -= length
        if not left:
            break
    return maskable[~is_free[maskable]]
