"""What narrows a choice is what its definition says; draws follow the probabilities; wrong options are refused."""

from typing import Any

import numpy as np
import pytest
import torch

from meristem.errors import ConfigError
from meristem.generation.options import GenerateOptions
from meristem.generation.sample import choose, generator_of, narrow


def slow_shares(logits: np.ndarray, seen: set[int], options: GenerateOptions) -> np.ndarray:
    """Probabilities by the definitions, one token after the other, in float64."""
    values = logits.astype(np.float64)
    for token in seen:
        penalty = options.repetition_penalty
        values[token] = values[token] / penalty if values[token] > 0 else values[token] * penalty
    values = values / (options.temperature or 1.0)
    allowed = set(range(len(values)))
    by_rank = sorted(allowed, key=lambda token: -values[token])

    def shares() -> dict[int, float]:
        total = sum(np.exp(values[token]) for token in allowed)
        return {token: np.exp(values[token]) / total for token in allowed}

    if options.top_k:
        allowed = set(by_rank[: options.top_k])
    if options.top_p:
        known, kept, total = shares(), set(), 0.0
        for token in (token for token in by_rank if token in allowed):
            kept.add(token)
            total += known[token]
            if total >= options.top_p:
                break
        allowed = kept
    if options.min_p:
        known = shares()
        allowed = {token for token in allowed if known[token] >= options.min_p * max(known.values())}
    return np.array([shares().get(token, 0.0) for token in range(len(values))])


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": 0.7},
        {"top_k": 3},
        {"top_p": 0.6},
        {"min_p": 0.2},
        {"repetition_penalty": 1.4},
        {"temperature": 1.6, "top_k": 9, "top_p": 0.8, "min_p": 0.1, "repetition_penalty": 0.8},
        {"top_k": 500},
        {"top_p": 1e-9},
    ],
)
def test_the_choice_is_narrowed_as_defined(values: dict[str, Any], rng: np.random.Generator) -> None:
    options = GenerateOptions(**values)
    logits = 2 * rng.standard_normal((5, 23)).astype(np.float32)
    seen = [set(rng.choice(23, 6, replace=False).tolist()) for _ in range(5)]
    is_seen = torch.zeros(5, 23, dtype=torch.bool)
    for row, tokens in enumerate(seen):
        is_seen[row, list(tokens)] = True
    has_penalty = options.repetition_penalty != 1
    got = narrow(torch.from_numpy(logits), is_seen if has_penalty else None, options).softmax(-1)
    for row in range(5):
        wanted = slow_shares(logits[row], seen[row] if has_penalty else set(), options)
        np.testing.assert_allclose(got[row].numpy(), wanted, atol=1e-5)


def test_draws_follow_the_probabilities(rng: np.random.Generator) -> None:
    scaled = torch.tensor([[1.0, -torch.inf, 0.0, 2.0, -torch.inf]])
    wanted = scaled.softmax(-1)[0]
    generators = [generator_of(int(rng.integers(2**31)), np.arange(3), number) for number in range(4000)]
    drawn = choose(scaled.expand(4000, -1), generators, is_greedy=False)
    shares = torch.bincount(drawn, minlength=5) / 4000
    assert shares[1] == shares[4] == 0
    # five standard errors of a share among 4,000
    assert ((shares - wanted).abs() <= 5 * (wanted * (1 - wanted) / 4000).sqrt()).all()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be 1 or more; got 0"),
        ({"temperature": -1.0}, r"temperature must be 0 \(greedy\) or more"),
        ({"top_p": 1.2}, "top_p must be above 0 and at most 1"),
        ({"min_p": 0.0}, "min_p must be above 0"),
        ({"top_k": 0}, "top_k must be 1 or more"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be positive"),
        ({"stop": ("",)}, "stop must be texts with something in them"),
        ({"temperature": 0.0, "top_k": 4}, "top_k has no effect at temperature 0"),
        ({"temperature": 0.0, "num_samples": 2}, "num_samples has no effect at temperature 0"),
        ({"num_beams": 3, "top_p": 0.5}, "num_beams searches and draws nothing"),
        ({"num_beams": 2, "num_samples": 3}, "num_samples must be at most num_beams"),
        ({"length_penalty": 2.0}, "length_penalty has no effect without num_beams"),
    ],
)
def test_options_that_cannot_work_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        GenerateOptions(**values)
    assert "\n" not in str(error.value)
