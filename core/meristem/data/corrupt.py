"""What an objective does to tokens before the trunk sees them: pure functions of (tokens, generator)."""

from dataclasses import replace

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
        rng: the only source of randomness.
        rate: fraction of the maskable tokens that become targets, in (0, 1].
        mask_id: the symbol that hides a token.
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
    count = min(len(maskable), max(1, int(rate * len(maskable) + rng.random())))
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


def crop_window(tokens: Tokens, max_tokens: int, num_special: tuple[int, int], rng: np.random.Generator) -> Tokens:
    """A random window of a sequence that is too long; special tokens stay at its ends.

    Positions count from 0 again, as if the window were all there is; spans still point into the whole
    payload. The generator is drawn from only where something is cut.

    Args:
        tokens: before corruption: without targets.
        max_tokens: special tokens included; more than those.
        num_special: special tokens before and behind the payload's own.
        rng: decides where the window begins; each place is equally likely.
    """
    if len(tokens) <= max_tokens:
        return tokens
    assert not tokens.targets
    before, behind = num_special
    length = max_tokens - before - behind
    start = before + int(rng.integers(len(tokens) - before - behind - length + 1))
    kept = np.r_[:before, start : start + length, len(tokens) - behind : len(tokens)]
    return replace(
        tokens,
        positions=tokens.positions[:max_tokens],
        ids=tokens.ids[kept],
        features=None if tokens.features is None else tokens.features[kept],
        spans=None if tokens.spans is None else tokens.spans[kept],
    )


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
