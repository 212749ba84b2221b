"""A beam search finds what looking at every sequence finds, and each prompt is searched for itself."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from small_decoders import VOCAB, decoder, encoder_decoder, random_prompts, redrawn, slow_logits

from meristem.generation import beams
from meristem.generation.beams import search
from meristem.generation.options import GenerateOptions
from meristem.model.config import Embedding
from meristem.model.model import Model

STOP = 3


def all_sequences(model: Model, prompt: np.ndarray, length: int, penalty: float) -> list[tuple[float, tuple[int, ...]]]:
    """Every sequence that ends with STOP or at `length`, with its score, best first."""
    vocab_size = model.config.embedding.vocab_size
    found = []
    for n in range(1, length + 1):
        for ids in itertools.product(range(vocab_size), repeat=n):
            if STOP in ids[:-1] or (n < length and ids[-1] != STOP):
                continue
            total = 0.0
            for place, token in enumerate(ids):
                total += slow_logits(model, prompt, list(ids[:place])).log_softmax(-1)[token].item()
            found.append((total / n**penalty, ids))
    return sorted(found, reverse=True)


@pytest.mark.parametrize("make", [decoder, encoder_decoder])
@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_a_wide_search_finds_the_best_of_all_sequences(make: object, penalty: float, rng: np.random.Generator) -> None:
    model = redrawn(make(embedding=Embedding(vocab_size=5)))
    prompts = [rng.integers(0, 5, 4), rng.integers(0, 5, 2)]
    # 64 beams hold every prefix of two tokens, so nothing is cut; a search may end early only where all beams ended
    options = GenerateOptions(max_new_tokens=3, num_beams=64, length_penalty=penalty, num_samples=3)
    made = search(model, prompts, options, [STOP], start_id=0)
    for prompt, samples in zip(prompts, made):
        wanted = all_sequences(model, prompt, 3, penalty)[:3]
        for one, (score, ids) in zip(samples, wanted, strict=True):
            assert one.ids == ids
            assert abs(one.score - score) < 1e-4
            assert one.reason == ("stop" if ids[-1] == STOP else "length")


def test_each_prompt_is_searched_for_itself(rng: np.random.Generator) -> None:
    model = redrawn(decoder())
    prompts = random_prompts(rng, 5)
    options = GenerateOptions(max_new_tokens=10, num_beams=4, num_samples=2)
    together = search(model, prompts, options, [STOP, 8])
    for index, prompt in enumerate(prompts):
        assert search(model, [prompt], options, [STOP, 8]) == [together[index]]


def test_more_beams_never_end_with_a_worse_best_at_fixed_length(rng: np.random.Generator) -> None:
    model = redrawn(decoder())
    prompts = random_prompts(rng, 3)
    scores = [
        [made[0].score for made in search(model, prompts, GenerateOptions(max_new_tokens=2, num_beams=n))]
        for n in (2, VOCAB)
    ]
    for few, many in zip(*scores):
        assert many >= few - 1e-5


def test_a_parent_that_is_not_followed_is_caught(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant: every beam goes on from the cache of the beam of its own number."""
    real = beams._Beam.then
    monkeypatch.setattr(
        beams._Beam, "then", lambda self, token, total, parent: replace(real(self, token, total, parent), parent=0)
    )
    model = redrawn(decoder())
    prompts = random_prompts(rng, 8, low=5)  # of one alone, the first beam may be the parent of all
    options = GenerateOptions(max_new_tokens=8, num_beams=4, num_samples=4)
    wrong = 0.0
    for prompt, samples in zip(prompts, search(model, prompts, options)):
        for one in samples:
            made: list[int] = []
            for token, score in zip(one.ids, one.log_probabilities):
                wanted = slow_logits(model, prompt, made).log_softmax(-1)[token]
                wrong = max(wrong, (wanted - torch.tensor(score)).abs().item())
                made.append(token)
    assert wrong > 1e-3


def test_log_probabilities_of_beams_are_those_of_their_sequences(rng: np.random.Generator) -> None:
    model = redrawn(decoder())
    [prompt] = random_prompts(rng, 1)
    options = GenerateOptions(max_new_tokens=8, num_beams=4, num_samples=4, length_penalty=0.7)
    for one in search(model, [prompt], options)[0]:
        made: list[int] = []
        for token, score in zip(one.ids, one.log_probabilities, strict=True):
            wanted = slow_logits(model, prompt, made).log_softmax(-1)[token].item()
            assert abs(wanted - score) < 1e-4
            made.append(token)
        assert abs(one.score - sum(one.log_probabilities) / len(one.ids) ** 0.7) < 1e-4
