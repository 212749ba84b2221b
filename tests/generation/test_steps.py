"""What a cache gives is what the whole sequence gives, whatever is beside it and whoever has left."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from small_decoders import CONFIGS, VOCAB, decoder, random_prompts, redrawn, slow_logits

from meristem.errors import ConfigError, DataError
from meristem.generation.few_rows import for_few_rows
from meristem.generation.options import GenerateOptions
from meristem.generation.sample import sample
from meristem.generation.steps import Steps, check_generates
from meristem.model.cache import Cache
from meristem.model.config import Attention, BlockSparse, Causal, Learned
from meristem.model.model import Model
from model_runs import specs

CLOSE = {"atol": 1e-5, "rtol": 1e-5}  # fp32 sums in another order


WAYS: dict[str, Callable[[Model], Model]] = {"as it is": lambda model: model, "reordered": for_few_rows}
"""The model that sequences are made with."""


def refuse_distance(model: Model, rng: np.random.Generator, room_tokens: int = 0) -> None:
    """Ragged prompts, eight steps, sequences that leave, come twice and change places on the way."""
    prompts = random_prompts(rng, 5)
    histories: list[tuple[int, list[int]]] = [(prompt, []) for prompt in range(5)]
    with torch.inference_mode():
        steps = Steps(model, prompts, 0, room_tokens)
        for step in range(8):
            for place, (prompt, made) in enumerate(histories):
                wanted = slow_logits(model, prompts[prompt], made)
                torch.testing.assert_close(steps.logits[place], wanted, **CLOSE)
            chosen = list(range(len(histories)))
            if step == 3:
                chosen = rng.integers(0, len(histories), 6).tolist()
            elif step in (1, 4, 6):
                chosen = rng.permutation(len(histories))[: len(histories) - 1 - (step == 6)].tolist()
            new = rng.integers(2, VOCAB, len(chosen)).tolist()
            histories = [(histories[c][0], [*histories[c][1], token]) for c, token in zip(chosen, new)]
            steps.advance(new, chosen)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("way", WAYS)
def test_cached_logits_are_those_of_the_whole_sequence(kind: str, way: str, rng: np.random.Generator) -> None:
    for room_tokens in (0, 5):
        refuse_distance(WAYS[way](redrawn(CONFIGS[kind])), rng, room_tokens)


def keep_places(self: Cache, sequences: list[int]) -> None:
    """The mutant: sequences that leave or change places keep the slots of others."""
    self.lengths = [self.lengths[sequence] for sequence in sequences]
    self.slots = self.slots[: len(sequences)]
    if self.source is not None:
        self._select_source([i % self.source.layout.num_sequences for i in range(len(sequences))], self.source)


def stay_at_source(self: Cache, sequences: list[int], source: object) -> None:
    """The mutant: the source side does not follow."""
    real_select_source(self, [i % self.source.layout.num_sequences for i in range(len(sequences))], source)


real_select_source = Cache._select_source


def count_one_more(self: Steps, sequences: list[np.ndarray], starts: list[int] = ()) -> object:
    """The mutant: positions of later tokens are one too far."""
    return real_batch(self, sequences, [start + 1 for start in starts])


real_batch = Steps._batch


@pytest.mark.parametrize(
    ("kind", "owner", "name", "mutant"),
    [
        ("rotary", Cache, "select", keep_places),
        ("encoder-decoder", Cache, "select", keep_places),
        ("encoder-decoder", Cache, "_select_source", stay_at_source),
        ("rotary", Steps, "_batch", count_one_more),
        ("learned", Steps, "_batch", count_one_more),
    ],
)
def test_a_mutant_of_the_cache_is_caught(
    kind: str, owner: type, name: str, mutant: object, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = redrawn(CONFIGS[kind])
    monkeypatch.setattr(owner, name, mutant)
    with pytest.raises(AssertionError, match="not close"):
        refuse_distance(model, rng)


@pytest.mark.parametrize("kind", CONFIGS)
def test_greedy_tokens_are_the_likeliest_of_the_whole_sequence(kind: str, rng: np.random.Generator) -> None:
    model = redrawn(CONFIGS[kind])
    prompts = random_prompts(rng, 4)
    made = sample(model, prompts, GenerateOptions(max_new_tokens=9, temperature=0.0), start_id=0)
    for prompt, [one] in zip(prompts, made):
        slow: list[int] = []
        for token, score in zip(one.ids, one.log_probabilities):
            log_probabilities = slow_logits(model, prompt, slow).log_softmax(-1)
            assert abs(log_probabilities[token].item() - score) < 1e-4
            # two tokens may be as likely as each other to the last digits
            assert log_probabilities.max() - log_probabilities[token] < 1e-4
            slow.append(token)
        assert one.reason == "length"
        assert abs(one.score - sum(one.log_probabilities)) < 1e-6


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("temperature", [0.0, 1.3])
@pytest.mark.parametrize("way", WAYS)
def test_a_prompt_gives_the_same_whatever_is_beside_it(
    kind: str, way: str, temperature: float, rng: np.random.Generator
) -> None:
    """Bit for bit: tokens and log-probabilities, with batch mates of any length that stop at any time."""
    model = WAYS[way](redrawn(CONFIGS[kind]))
    prompts = random_prompts(rng, 6)
    options = GenerateOptions(
        max_new_tokens=12, temperature=temperature, num_samples=1 if temperature == 0 else 3, seed=7
    )
    stop_ids = [5, 9, 11]
    together = sample(model, prompts, options, stop_ids, start_id=0)
    backwards = sample(model, prompts[::-1], options, stop_ids, start_id=0)[::-1]
    for index, prompt in enumerate(prompts):
        [alone] = sample(model, [prompt], options, stop_ids, start_id=0)
        assert alone == together[index] == backwards[index]


def test_another_seed_or_sample_gives_another_text(rng: np.random.Generator) -> None:
    model = redrawn(decoder())
    prompts = random_prompts(rng, 2)
    # hot, so that a model that is drawn sure of one symbol does not say it 16 times whatever the seed
    options = GenerateOptions(max_new_tokens=16, num_samples=2, temperature=10.0)
    [first, second], _ = sample(model, prompts, options)
    assert first.ids != second.ids
    again = sample(model, prompts, replace(options, seed=1))
    assert again[0][0].ids != first.ids


def test_models_that_cannot_generate_are_refused() -> None:
    with pytest.raises(ConfigError, match="needs a decoder or an encoder-decoder"):
        check_generates(Model(decoder(attention=Attention(num_heads=4)), specs(("tokens",))))
    with pytest.raises(ConfigError, match="must predict symbols"):
        check_generates(Model(decoder()))
    with pytest.raises(ConfigError, match="a cache needs a model whose tokens see none behind them"):
        Steps(redrawn(decoder(attention=Attention(num_heads=4))), [np.array([1, 2])])
    drawn = Causal() & BlockSparse(block=2)
    with pytest.raises(ConfigError, match="random blocks of BlockSparse are drawn anew"):
        Steps(redrawn(decoder(attention=Attention(num_heads=4, pattern=drawn))), [np.array([1, 2])])


def test_a_sequence_that_outgrows_its_positions_is_refused(rng: np.random.Generator) -> None:
    model = redrawn(decoder(position=Learned(max_positions=8)))
    with pytest.raises(DataError, match="8 tokens or fewer, as its positions allow; got 9"):
        sample(model, [rng.integers(0, VOCAB, 5)], GenerateOptions(max_new_tokens=5))
