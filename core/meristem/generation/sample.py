"""Greedy and drawn sequences: each goes on until it stops, and leaves its place."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from meristem.generation.options import Generated, GenerateOptions
from meristem.generation.steps import Steps
from meristem.model.model import Model
from meristem.shapes import Bool, Float, Int, Tensor

OnToken = Callable[[int, int, int], None]
"""Told of each token as it is made: number of the prompt, number of the sample, id."""

IsStop = Callable[[int, Sequence[int]], bool]
"""Whether a text stops a sequence: number of the prompt, and the new ids."""


@dataclass
class _Running:
    """A sequence that is being made."""

    prompt: int
    sample: int
    generator: torch.Generator
    ids: list[int] = field(default_factory=list)
    log_probabilities: list[float] = field(default_factory=list)


@torch.inference_mode()
def sample(
    model: Model,
    prompts: Sequence[np.ndarray],
    options: GenerateOptions,
    stop_ids: Sequence[int] = (),
    start_id: int | None = None,
    is_stop: IsStop | None = None,
    on_token: OnToken | None = None,
) -> list[list[Generated]]:
    """Sequences for each prompt, greedy or drawn.

    Args:
        model: in evaluation mode; a decoder or an encoder-decoder.
        start_id: first token of an encoder-decoder's output.
    """
    steps = Steps(model, prompts, start_id, options.max_new_tokens)
    if options.num_samples > 1:
        steps.repeat(options.num_samples)
    running = [
        _Running(prompt, number, generator_of(options.seed, ids, number))
        for prompt, ids in enumerate(prompts)
        for number in range(options.num_samples)
    ]
    made: list[list[Generated | None]] = [[None] * options.num_samples for _ in prompts]
    is_seen = _seen(model, prompts, running, steps, start_id) if options.repetition_penalty != 1.0 else None
    while running:
        tokens = choose(
            narrow(steps.logits, is_seen, options), [one.generator for one in running], options.temperature == 0
        )
        scores = steps.logits.log_softmax(-1).gather(1, tokens[:, None]).squeeze(1).tolist()
        if is_seen is not None:
            is_seen[torch.arange(len(running), device=is_seen.device), tokens] = True
        going: list[int] = []
        for place, (one, token, score) in enumerate(zip(running, tokens.tolist(), scores, strict=True)):
            one.ids.append(token)
            one.log_probabilities.append(score)
            if on_token is not None:
                on_token(one.prompt, one.sample, token)
            is_stopped = token in stop_ids or (is_stop is not None and is_stop(one.prompt, one.ids))
            if is_stopped or len(one.ids) == options.max_new_tokens:
                made[one.prompt][one.sample] = Generated(
                    tuple(one.ids),
                    tuple(one.log_probabilities),
                    sum(one.log_probabilities),
                    "stop" if is_stopped else "length",
                )
            else:
                going.append(place)
        running = [running[place] for place in going]
        if running:
            is_seen = None if is_seen is None else is_seen[going]
            steps.advance([one.ids[-1] for one in running], going)
    return [[one for one in samples if one is not None] for samples in made]


def _seen(
    model: Model, prompts: Sequence[np.ndarray], running: Sequence[_Running], steps: Steps, start_id: int | None
) -> Bool[Tensor, "S V"]:
    """Tokens that are there before the first is made: the prompt's, or the start of an encoder-decoder's output."""
    is_seen = torch.zeros_like(steps.logits, dtype=torch.bool)
    for place, one in enumerate(running):
        ids = prompts[one.prompt] if not model.config.num_decoder_layers else np.array([start_id])
        is_seen[place, torch.from_numpy(np.unique(ids)).long()] = True
    return is_seen


def narrow(
    logits_SV: Float[Tensor, "S V"], is_seen_SV: Bool[Tensor, "S V"] | None, options: GenerateOptions
) -> Float[Tensor, "S V"]:
    """Logits that tokens are drawn from: penalty, temperature, then top-k, top-p and min-p, each on what is left.

    Args:
        is_seen_SV: tokens that are there already; None without a penalty.
    """
    if is_seen_SV is not None:
        penalty = options.repetition_penalty
        punished = torch.where(logits_SV > 0, logits_SV / penalty, logits_SV * penalty)
        logits_SV = torch.where(is_seen_SV, punished, logits_SV)
    scaled = logits_SV if options.temperature in (0.0, 1.0) else logits_SV / options.temperature
    if options.top_k is not None and options.top_k < scaled.shape[1]:
        least = scaled.topk(options.top_k).values[:, -1:]
        scaled = scaled.masked_fill(scaled < least, -torch.inf)
    if options.top_p is not None and options.top_p < 1:
        ordered, order = scaled.sort(descending=True, stable=True)
        # what stands before a token is less than p: the first is always kept
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        is_left_out = torch.empty_like(before, dtype=torch.bool).scatter_(1, order, before >= options.top_p)
        scaled = scaled.masked_fill(is_left_out, -torch.inf)
    if options.min_p is not None:
        shares = scaled.softmax(-1)
        scaled = scaled.masked_fill(shares < options.min_p * shares.amax(-1, keepdim=True), -torch.inf)
    return scaled


def choose(scaled_SV: Float[Tensor, "S V"], generators: list[torch.Generator], is_greedy: bool) -> Int[Tensor, "S"]:
    """A token of each row: the likeliest, or one drawn by the row's own generator.

    One number a row is drawn and looked up among the cumulated probabilities, so a draw depends on its row alone.
    """
    if is_greedy:
        return scaled_SV.max(-1).indices  # the first of equals; argmax takes twice as long
    drawn_S = torch.stack([torch.rand((), generator=generator, dtype=torch.float64) for generator in generators])
    cumulated_SV = scaled_SV.double().softmax(-1).cumsum(-1)
    wanted_S1 = drawn_S.to(scaled_SV.device)[:, None] * cumulated_SV[:, -1:]
    chosen_S = torch.searchsorted(cumulated_SV, wanted_S1, right=True).squeeze(1)
    # rounding may lead behind the last token that has a probability
    last_S = (scaled_SV > -torch.inf).long().cumsum(-1).argmax(-1)
    return torch.minimum(chosen_S, last_S)


def generator_of(seed: int, prompt: np.ndarray, sample: int) -> torch.Generator:
    """What draws for one sample of one prompt, whatever else is made beside it."""
    digest = hashlib.blake2b(repr((seed, prompt.tolist(), sample)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
