"""From logits to a token: what narrows the choice, and the draw."""

import hashlib

import numpy as np
import torch

from meristem.generation.options import GenerateOptions
from meristem.shapes import Bool, Float, Int, Tensor


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
