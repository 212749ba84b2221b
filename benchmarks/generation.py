"""Texts made token after token: Meristem beside `transformers`, greedy, on the same weights and prompts, in fp32.

    python benchmarks/run.py generation --threads 1

The peer is used as people use it (prompts padded in front, an attention mask, its growing cache) and with its static
cache. The tokens of all programs are equal before anything is timed. Ours is what `meristem generate` runs, with its
weights reordered once, and beside it the same with weights as they are.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import transformers
from decoders import gpt2
from harness import Finding, Options, race, timed
from transformers import GPT2Config, GPT2LMHeadModel

from meristem.generation.few_rows import for_few_rows
from meristem.generation.options import GenerateOptions
from meristem.generation.sample import sample
from meristem.interop.families.gpt2 import TABLE
from meristem.model.config import TransformerConfig
from meristem.model.heads import Symbols
from meristem.model.model import SYMBOLS, Model

Tokens = list[list[int]]


@dataclass(frozen=True)
class Work:
    """A decoder, and what is asked of it.

    Attributes:
        prompt_tokens: least and most of a prompt.
        new_tokens: made for each prompt.
    """

    layers: int = 12
    width: int = 768
    heads: int = 12
    vocab_size: int = 50257
    context: int = 1024
    prompts: int = 8
    prompt_tokens: tuple[int, int] = (64, 512)
    new_tokens: int = 128

    @property
    def architecture(self) -> TransformerConfig:
        """As GPT-2 has it."""
        return gpt2(self.width, self.layers, self.heads, self.vocab_size, self.context)

    def draw(self) -> list[np.ndarray]:
        """Ragged prompts."""
        rng = np.random.default_rng(0)
        lengths = rng.integers(*self.prompt_tokens, self.prompts, endpoint=True)
        return [rng.integers(0, self.vocab_size, int(length)) for length in lengths]


QUICK = Work(layers=2, width=64, heads=2, vocab_size=97, context=64, prompts=3, prompt_tokens=(4, 20), new_tokens=6)


def findings(options: Options) -> Iterator[Finding]:
    """Ragged prompts and their texts, the prompts alone, and one text alone."""
    work = QUICK if options.is_quick else Work()
    ours = our_model(work).to(options.device)
    theirs = their_model(work, ours).to(options.device)
    prompts = work.draw()
    yield compare("ragged prompts", work, work.new_tokens, prompts, ours, theirs, options)
    yield compare("ragged prompts, their first token alone", work, 1, prompts, ours, theirs, options)
    yield compare("one prompt", work, work.new_tokens, prompts[:1], ours, theirs, options)


def compare(
    what: str,
    work: Work,
    new_tokens: int,
    prompts: Sequence[np.ndarray],
    ours: Model,
    theirs: GPT2LMHeadModel,
    options: Options,
) -> Finding:
    """All programs on some prompts, whose tokens are equal."""
    programs: dict[str, Callable[[], Tokens]] = {
        "meristem": lambda: make(for_few_rows(ours), prompts, new_tokens),
        "meristem, weights as they are": lambda: make(ours, prompts, new_tokens),
        "transformers": partial(ask, theirs, prompts, new_tokens),
        "transformers, static cache": partial(ask, theirs, prompts, new_tokens, cache_implementation="static"),
    }
    made = {name: run() for name, run in programs.items()}
    for name, tokens in made.items():
        assert tokens == made["meristem"], f"{what}: the tokens of {name} are others; nothing was timed"
    num_different = len({token for tokens in made["meristem"] for token in tokens})
    lengths = sorted(len(prompt) for prompt in prompts)
    seconds = race(programs, options, is_warm=True)
    values = ceilings(work, prompts, ours, seconds["meristem"], options) if new_tokens > 1 else {}
    return Finding(
        title=f"Generation, GPT-2 of {sum(one.numel() for one in ours.parameters()) / 1e6:.0f}M, {what}",
        setting=(
            f"Prompts: {len(prompts)}, of {lengths[0]} to {lengths[-1]} tokens, {sum(lengths):,} in all; {new_tokens} "
            f"new each, greedy, fp32. The tokens of all programs were equal ({num_different} different ones)."
        ),
        seconds=seconds,
        work=len(prompts) * new_tokens,
        unit="new tokens",
        values=values,
    )


def make(model: Model, prompts: Sequence[np.ndarray], new_tokens: int) -> Tokens:
    """Ours."""
    made = sample(model, prompts, GenerateOptions(max_new_tokens=new_tokens, temperature=0.0))
    return [list(one.ids) for [one] in made]


@torch.inference_mode()
def ask(model: GPT2LMHeadModel, prompts: Sequence[np.ndarray], new_tokens: int, **options: str) -> Tokens:
    """Theirs, padded in front."""
    longest = max(map(len, prompts))
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :], mask[row, longest - len(prompt) :] = torch.from_numpy(prompt), 1
    made = model.generate(
        ids.to(model.device),
        attention_mask=mask.to(model.device),
        pad_token_id=0,
        do_sample=False,
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        **options,
    )
    tokens: Tokens = made[:, longest:].tolist()
    return tokens


def our_model(work: Work) -> Model:
    """Drawn so that the likeliest token changes from place to place."""
    model = Model(work.architecture, {SYMBOLS: Symbols()}).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        draw = torch.randn(parameter.shape, generator=generator)
        is_table = "embedding" in name
        if parameter.ndim > 1:
            draw *= 0.2 if is_table else parameter.shape[1] ** -0.5
            draw *= 2.0 if "qkv" in name else 1.0  # attention that is flat would give one token over and over
        else:
            draw = 0.05 * draw + (1.0 if name.endswith("norm.weight") else 0.0)
        parameter.data = draw
    return model


def their_model(work: Work, ours: Model) -> GPT2LMHeadModel:
    """With the weights of ours."""
    transformers.logging.set_verbosity_error()
    config = GPT2Config(
        vocab_size=work.vocab_size, n_positions=work.context, n_embd=work.width, n_layer=work.layers, n_head=work.heads
    )
    theirs = GPT2LMHeadModel(config)
    foreign = TABLE.write(dict(ours.state_dict()), work.architecture)
    theirs.load_state_dict({**foreign, "lm_head.weight": foreign["transformer.wte.weight"]})
    theirs.generation_config.eos_token_id = None
    theirs.generation_config.max_length = None
    return theirs.eval()


def ceilings(
    work: Work, prompts: Sequence[np.ndarray], ours: Model, seconds: Sequence[float], options: Options
) -> dict[str, str]:
    """What a step must read, how long reading takes at least, and how long a step takes; medians of the rounds.

    Args:
        seconds: of prompts and all steps, by round.
    """
    weights = [one for name, one in ours.named_parameters() if one.ndim > 1 and "position" not in name]
    weight_bytes = sum(one.numel() * one.element_size() for one in weights)
    tokens = sum(map(len, prompts)) + len(prompts) * work.new_tokens / 2
    cache_bytes = tokens * 2 * work.layers * work.width * 4
    plain = torch.empty(weight_bytes // 4, device=options.device).fill_(1.0)
    fast = for_few_rows(ours)
    reading, first = [], []
    for _ in seconds:
        reading.append(timed(plain.sum, options.device))
        first.append(timed(lambda: make(fast, prompts, 1), options.device))
    rate = weight_bytes / float(np.median(reading))
    step = float(np.median(seconds) - np.median(first)) / (work.new_tokens - 1)
    least = (weight_bytes + cache_bytes) / rate
    return {
        "weights that a step reads": f"{weight_bytes / 1e6:.0f} MB",
        "keys and values that a step reads, on average": f"{cache_bytes / 1e6:.0f} MB",
        "reading one array of the size of the weights": f"{rate / 1e9:.1f} GB/s",
        "a step, and reading alone": f"{1e3 * step:.1f} ms, {1e3 * least:.1f} ms",
        "achieved over that ceiling": f"{least / step:.2f}",
    }
