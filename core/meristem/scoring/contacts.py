"""Contacts of a sequence from the attention maps of all layers and heads."""

from collections.abc import Iterator

import numpy as np
import torch

from meristem.data.pack import pack_column
from meristem.model.heads.contacts import CONTACTS, correct_average_product, payload_maps
from meristem.model.model import Model
from meristem.model.outputs import Wanted
from meristem.types import TokenColumn


def contact_maps(model: Model, column: TokenColumn, num_special: tuple[int, int]) -> Iterator[np.ndarray]:
    """One symmetric map a sequence, `[n, n]` over the payload's tokens, in order.

    Probabilities where the model has weights for its maps (`has_contact_weights`); else the mean of the maps, made
    symmetric and corrected for the average product: scores that rank, and no probabilities.

    One sequence at a time: the maps of all layers take `4 * L * H * n * n` bytes.

    Args:
        model: in evaluation mode.
        num_special: special rows before and behind each payload, left out.
    """
    device = model.device
    for row in range(len(column)):
        # each sequence on its own, so that no gradient graph outlives it and one at a time is in memory
        with torch.inference_mode():
            batch = pack_column(column, np.array([row]), [row]).to(device)
            if has_contact_weights(model):
                [logits] = model(batch, Wanted((CONTACTS,), num_special=num_special)).heads[CONTACTS]
                values = logits.sigmoid()
            else:
                wanted = Wanted(attentions=range(model.config.num_layers))
                [maps] = payload_maps(model(batch, wanted).hidden, num_special)
                values = torch.stack([correct_average_product(m + m.transpose(1, 2)).mean(0) for m in maps]).mean(0)
        yield values.float().cpu().numpy()


def has_contact_weights(model: Model) -> bool:
    """Whether the model says how much each attention map counts for a contact."""
    return CONTACTS in model.heads
