"""Greedy and drawn sequences: each goes on until it stops, and leaves its place."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from meristem.generation.choose import choose, generator_of, narrow
from meristem.generation.options import Generated, GenerateOptions
from meristem.generation.steps import Steps
from meristem.model.model import Model
from meristem.shapes import Bool, Tensor

OnToken = Callable[[int, int, int], None]
"""Told of each token as it is made: number of the prompt, number of the sample, id."""

IsStop = Callable[[Sequence[int]], bool]
"""Whether a sequence of new ids ends with a text that stops it."""


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
            is_stopped = token in stop_ids or (is_stop is not None and is_stop(one.ids))
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
