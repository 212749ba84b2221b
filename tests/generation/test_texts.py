"""The text of a sample is what its tokens add to the prompt, whatever the tokenizer makes of spaces and words."""

import numpy as np
import pytest
import torch
from small_decoders import decoder, encoder_decoder

from meristem.data.subwords import SubwordTokenizer
from meristem.data.tokenizer import Tokenizer
from meristem.generation.options import GenerateOptions
from meristem.generation.text import Generator
from meristem.model.config import Embedding
from meristem.model.model import Model
from meristem_domains.protein.alphabet import tokenizer as residues
from model_runs import specs
from small_vocabularies import KINDS, random_texts, trained


def tokenizer_of(kind: str) -> Tokenizer:
    if kind == "residues":
        return residues()
    special = {"unigrams": {"pad": "<pad>"}, "word pieces": {"pad": "[PAD]"}, "byte fallback": {"bos": "<s>"}}
    return SubwordTokenizer(trained(kind).to_str(), special.get(kind, {}))


def generator_of(tokenizer: Tokenizer, config=decoder) -> Generator:
    """A model with every parameter redrawn; two stacks begin with the padding."""
    model = Model(config(embedding=Embedding(vocab_size=len(tokenizer.vocab))), specs(("tokens",))).eval()
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.5
    return Generator(model, tokenizer)


def texts_of(kind: str, rng: np.random.Generator) -> list[str]:
    letters = ["".join(rng.choice(list("ACDEFGHIKLMNPQRSTVWY"), rng.integers(2, 40))) for _ in range(20)]
    return letters if kind == "residues" else [text for text in random_texts(rng, 40) if len(text) < 2000]


@pytest.mark.parametrize("kind", [*KINDS, "residues"])
def test_a_text_cut_anywhere_comes_together_again(kind: str, rng: np.random.Generator) -> None:
    generator = generator_of(tokenizer_of(kind))
    tokenizer, num_joined, num_cuts = generator.tokenizer, 0, 0
    for text in texts_of(kind, rng):
        ids = generator.open_ids(tokenizer.encode(text))
        for cut in rng.integers(0, len(ids) + 1, 8).tolist():
            before, whole = tokenizer.text_of(ids[:cut].tolist()), tokenizer.text_of(ids.tolist())
            if whole.startswith(before):  # else the cut is within a character of several tokens
                assert before + generator.text_behind(ids[:cut], ids[cut:].tolist()) == whole
                num_cuts += 1
                num_joined += before + tokenizer.text_of(ids[cut:].tolist()) == whole
            else:
                assert "\ufffd" in before or kind in ("word pieces", "byte fallback", "unigrams")
    if kind in ("word pieces", "unigrams", "byte fallback"):
        assert num_joined < 0.95 * num_cuts, "new tokens decoded alone would do"


@pytest.mark.parametrize("kind", [*KINDS, "residues"])
def test_what_is_told_in_pieces_is_the_text_of_the_sample(kind: str, rng: np.random.Generator) -> None:
    generator = generator_of(tokenizer_of(kind))
    tokenizer, told = generator.tokenizer, {}
    prompts = ["MKTAY", "GSH"] if kind == "residues" else ["released in", "a pack of re"]
    options = GenerateOptions(max_new_tokens=12, num_samples=3, seed=int(rng.integers(1000)))
    made = list(
        generator.generate(prompts, options, lambda *key_text: told.setdefault(key_text[:2], []).append(key_text[2]))
    )
    for prompt, samples in enumerate(made):
        ids = generator.open_ids(tokenizer.encode(prompts[prompt])).tolist()
        for number, one in enumerate(samples):
            assert tokenizer.text_of(ids) + one.text == tokenizer.text_of([*ids, *one.generated.ids])
            # a character that was not finished is not told
            assert one.text.startswith("".join(told.get((prompt, number), []))) or "\ufffd" in one.text


@pytest.mark.parametrize("kind", ["word pieces", "unigrams", "byte fallback", "byte pairs"])
def test_a_text_that_stops_may_begin_where_the_prompt_ends(kind: str, rng: np.random.Generator) -> None:
    generator = generator_of(tokenizer_of(kind))
    options = GenerateOptions(max_new_tokens=12, seed=int(rng.integers(1000)))
    [[free]] = generator.generate(["a model"], options)
    stop = free.text[:3]
    [[stopped]] = generator.generate(["a model"], GenerateOptions(**{**vars(options), "stop": (stop,)}))
    assert stopped.generated.reason == "stop"
    assert free.text.startswith(stopped.text)
    assert stop in stopped.text


def test_an_output_of_its_own_does_not_go_on_with_the_prompt(rng: np.random.Generator) -> None:
    generator = generator_of(tokenizer_of("unigrams"), encoder_decoder)
    [[one]] = generator.generate(["released in"], GenerateOptions(max_new_tokens=8))
    assert one.text == generator.tokenizer.text_of(one.generated.ids)
