"""Greedy tokens, beams and their scores are those of `transformers`, for ragged prompts in one batch."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from meristem.generation.beams import search
from meristem.generation.few_rows import for_few_rows
from meristem.generation.options import GenerateOptions
from meristem.generation.sample import sample
from meristem.interop.directory import read_directory
from meristem.interop.family import find_family
from meristem.model.model import Model
from references import PlainIds, redraw, save

VOCAB, PAD, STOP = 83, 0, 2

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "GPT-2": ("GPT2LMHeadModel", {"n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": 128}),
    "Llama": (
        "LlamaForCausalLM",
        {
            "hidden_size": 48,
            "intermediate_size": 80,
            "num_hidden_layers": 3,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
        },
    ),
    "CodeGen": ("CodeGenForCausalLM", {"n_embd": 64, "n_layer": 3, "n_head": 4, "rotary_dim": 8, "n_positions": 128}),
    "T5": (
        "T5ForConditionalGeneration",
        {"d_model": 48, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "feed_forward_proj": "gated-gelu"},
    ),
}


@dataclass
class Pair:
    """A model in both libraries."""

    model: Model
    reference: Any

    @property
    def is_two_sided(self) -> bool:
        return bool(self.model.config.num_decoder_layers)

    def ask_reference(self, prompts: list[np.ndarray], **options: Any) -> Any:
        """Padded as people pad: a decoder's prompts in front, sources behind."""
        longest = max(map(len, prompts))
        ids = torch.full((len(prompts), longest), PAD)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            place = slice(0, len(prompt)) if self.is_two_sided else slice(longest - len(prompt), longest)
            ids[row, place], mask[row, place] = torch.from_numpy(prompt), 1
        with torch.inference_mode():
            out = self.reference.generate(
                ids,
                attention_mask=mask,
                pad_token_id=PAD,
                return_dict_in_generate=True,
                output_scores=True,
                **options,
            )
        out.made = out.sequences[:, 1 if self.is_two_sided else longest :].tolist()
        return out


@pytest.fixture(scope="module")
def pair_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    print(f"reference seed={seed}")

    @cache
    def make(name: str) -> Pair:
        class_name, settings = SHAPES[name]
        foreign = getattr(transformers, class_name)
        config = foreign.config_class(
            vocab_size=VOCAB,
            pad_token_id=PAD,
            eos_token_id=STOP,
            bos_token_id=1,
            decoder_start_token_id=PAD,
            **settings,
        )
        reference = redraw(foreign(config), np.random.default_rng(seed), sharp=1.0 if "T5" in name else 2.0)
        reference.generation_config.max_length = None
        folder: Path = save(reference, tmp_path_factory.mktemp(name) / "hf")
        family = find_family(folder, config.to_dict())
        family = replace(family, read_tokenizer=lambda folder, config: (PlainIds(VOCAB), []))
        # as the verbs run it; how it runs elsewhere equals the whole sequence, see tests/generation
        return Pair(for_few_rows(read_directory(folder, family).model), reference)

    return make


def prompts_of(rng: np.random.Generator, count: int = 8) -> list[np.ndarray]:
    return [rng.integers(3, VOCAB, int(n)) for n in rng.integers(1, 40, count)]


def refuse_other_tokens(pair: Pair, prompts: list[np.ndarray], num_tokens: int) -> None:
    """Greedy tokens are the reference's; where two are as likely to the last digits, either will do."""
    theirs = pair.ask_reference(prompts, max_new_tokens=num_tokens, do_sample=False, eos_token_id=None)
    options = GenerateOptions(max_new_tokens=num_tokens, temperature=0.0)
    ours = sample(pair.model, prompts, options, start_id=PAD)
    for row, [one] in enumerate(ours):
        assert len(one.ids) == len(theirs.made[row]) == num_tokens
        for step, (mine, its) in enumerate(zip(one.ids, theirs.made[row])):
            if mine != its:
                scores = theirs.scores[step][row]
                assert (scores[its] - scores[mine]).abs() < 1e-4, f"prompt {row}: token {step} differs"
                break


@pytest.mark.parametrize("name", SHAPES)
def test_greedy_tokens_are_those_of_the_reference(
    name: str, pair_of: Callable[[str], Pair], rng: np.random.Generator, parity_row: Callable[..., None]
) -> None:
    refuse_other_tokens(pair_of(name), prompts_of(rng), 64)
    parity_row(name, "8 ragged prompts, 64 tokens, greedy", library="transformers", generation="equal")


@pytest.mark.parametrize("name", SHAPES)
def test_a_greedy_text_ends_where_the_reference_ends(
    name: str, pair_of: Callable[[str], Pair], rng: np.random.Generator
) -> None:
    pair, prompts = pair_of(name), prompts_of(rng)
    # any of a third of the vocabulary ends a text, so that they end at different steps
    stop_ids = [int(i) for i in rng.choice(np.arange(3, VOCAB), 20, replace=False)]
    theirs = pair.ask_reference(prompts, max_new_tokens=24, do_sample=False, eos_token_id=stop_ids).made
    ours = sample(pair.model, prompts, GenerateOptions(max_new_tokens=24, temperature=0.0), stop_ids, PAD)
    for row, [one] in zip(theirs, ours):
        end = next((step + 1 for step, token in enumerate(row) if token in stop_ids), len(row))
        assert list(one.ids) == row[:end]
        assert one.reason == ("stop" if one.ids[-1] in stop_ids else "length")


def refuse_other_beams(pair: Pair, prompts: list[np.ndarray], penalty: float) -> None:
    num_beams, kept = 4, 3
    theirs = pair.ask_reference(
        prompts,
        max_new_tokens=16,
        do_sample=False,
        num_beams=num_beams,
        num_return_sequences=kept,
        length_penalty=penalty,
        eos_token_id=STOP,
    )
    options = GenerateOptions(max_new_tokens=16, num_beams=num_beams, num_samples=kept, length_penalty=penalty)
    ours = search(pair.model, prompts, options, [STOP], PAD)
    for row, samples in enumerate(ours):
        for rank, one in enumerate(samples):
            place = row * kept + rank
            score = theirs.sequences_scores[place].item()
            assert abs(one.score - score) <= 1e-4 * max(1, abs(score)), f"prompt {row}: score {rank} differs"
            wanted = theirs.made[place]
            end = wanted.index(STOP) + 1 if STOP in wanted else len(wanted)
            assert list(one.ids) == wanted[:end], f"prompt {row}: beam {rank} differs"


@pytest.mark.parametrize("name", ["GPT-2", "T5"])
@pytest.mark.parametrize("penalty", [1.0, 0.0, 2.0])
def test_beams_and_their_scores_are_those_of_the_reference(
    name: str,
    penalty: float,
    pair_of: Callable[[str], Pair],
    rng: np.random.Generator,
    parity_row: Callable[..., None],
) -> None:
    refuse_other_beams(pair_of(name), prompts_of(rng), penalty)
    parity_row(name, "8 ragged prompts, 4 beams", library="transformers", generation="sequences and scores equal")


def test_a_dropped_length_penalty_is_caught(pair_of: Callable[[str], Pair], rng: np.random.Generator) -> None:
    """The mutant: scores of beams are not divided by their lengths."""
    theirs = pair_of("T5")

    @dataclass
    class Unpunished(Pair):
        def ask_reference(self, prompts: list[np.ndarray], **options: Any) -> Any:
            return super().ask_reference(prompts, **{**options, "length_penalty": 0.0})

    with pytest.raises(AssertionError, match="differs"):
        refuse_other_beams(Unpunished(theirs.model, theirs.reference), prompts_of(rng), 1.0)
