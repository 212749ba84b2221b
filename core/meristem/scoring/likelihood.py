"""Pseudo-log-likelihoods: each token hidden in turn, and predicted from all others (Salazar 2020, eq. 1)."""

from collections.abc import Callable

import numpy as np
import torch

from meristem.data.pack import pack_column
from meristem.errors import ConfigError
from meristem.model.model import SYMBOLS, Model
from meristem.model.outputs import HeadRequest, Wanted
from meristem.types import TokenColumn


def token_log_likelihoods(
    model: Model,
    ids: np.ndarray,
    num_special: tuple[int, int],
    mask_id: int | None,
    tokens_per_batch: int = 8192,
    advance: Callable[[int], None] = lambda count: None,
) -> np.ndarray:
    """Log-probability (nats) of each payload token, given all others.

    Exact: token i is masked alone, so a payload of n tokens takes n sequences.

    Args:
        model: in evaluation mode.
        ids: `[n]` symbols of one sequence, special ones included.
        num_special: special rows before and behind the payload; they are seen and not scored.
        mask_id: the symbol that hides a token.
        tokens_per_batch: tokens that a pack holds at most.
        advance: told of scored tokens as they are done.

    Raises:
        ConfigError: a model that predicts no symbols, or has none to hide them with.
    """
    if SYMBOLS not in model.heads or mask_id is None:
        raise ConfigError("a model must predict masked symbols to score likelihoods; this one has no such head")
    before, behind = num_special
    device = model.device
    length = len(ids)
    hidden_places = np.arange(before, length - behind)
    scores = np.empty(len(hidden_places))
    num_copies = max(1, tokens_per_batch // length)
    for first in range(0, len(hidden_places), num_copies):
        places = hidden_places[first : first + num_copies]
        copies = np.tile(ids, (len(places), 1))
        copies[np.arange(len(places)), places] = mask_id
        column = TokenColumn(ids=copies.reshape(-1), offsets=np.arange(len(places) + 1) * length)
        rows = torch.from_numpy(np.arange(len(places)) * length + places).to(device)
        targets = torch.from_numpy(ids[places].astype(np.int64)).to(device)
        with torch.inference_mode():
            # copies are equally long, so that they stay in order in the pack
            batch = pack_column(column, np.arange(len(places)), range(len(places))).to(device)
            logits = model(batch, Wanted(requests={SYMBOLS: HeadRequest(rows)})).heads[SYMBOLS]
            found = logits.double().log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
        scores[first : first + len(places)] = found.cpu().numpy()
        advance(len(places))
    return scores
