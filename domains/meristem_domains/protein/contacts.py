"""The scorer `contacts`: which residues touch, from the attention maps of all layers and heads."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from meristem.data.pack import pack_column
from meristem.errors import ConfigError
from meristem.figures.canvas import new_figure
from meristem.model.outputs import Wanted
from meristem.scoring.running import RunningModel
from meristem.scoring.scorer import NoOptions, Scorer
from meristem.types import TokenColumn
from meristem_domains.protein.contact_head import CONTACTS, correct_average_product, payload_maps


def contact_maps(running: RunningModel, column: TokenColumn, options: NoOptions) -> Iterator[np.ndarray]:
    """For each sequence in turn, one symmetric float32 map `[n, n]` over its residues.

    The values are probabilities where the model has a contact head. Otherwise they are the
    mean of the attention maps, symmetrised and corrected for the average product, which ranks pairs of residues only.

    Sequences run one at a time, since the maps of all layers take `4 * L * H * n * n` bytes.
    """
    for row in range(len(column)):
        with torch.inference_mode():
            batch = pack_column(column, np.array([row]), [row]).to(running.model.device)
            if CONTACTS in running.model.heads:
                [logits] = running.model(batch, Wanted((CONTACTS,))).heads[CONTACTS]
                values = logits.sigmoid()
            else:
                wanted = Wanted(attentions=range(running.model.config.num_layers))
                [maps] = payload_maps(running.model(batch, wanted).hidden)
                values = torch.stack([correct_average_product(m + m.transpose(1, 2)).mean(0) for m in maps]).mean(0)
        running.advance(batch.layout.num_tokens)
        yield values.float().cpu().numpy()


def describe(running: RunningModel, options: NoOptions) -> str:
    """What the values of `contact_maps` mean, in words.

    Raises:
        ConfigError: the model reads patches, or is an encoder-decoder.
    """
    if running.tokenizer.num_features or running.model.config.num_decoder_layers:
        raise ConfigError("contacts need a model of residues with one stack; this one has patches or two stacks")
    if CONTACTS in running.model.heads:
        return "probabilities of contact, by the model's own logistic regression"
    return (
        "scores that rank, not probabilities: the model has no weights for contacts, so they are the mean of its "
        "attention maps, made symmetric and corrected for the average product"
    )


def draw_contacts(values: np.ndarray, running: RunningModel, column: TokenColumn) -> Any:
    """A figure of one map. Residues are counted from 1."""
    is_probability = CONTACTS in running.model.heads
    figure = new_figure(5, 4.4)
    axes = figure.add_subplot()
    end = len(values) + 0.5
    low, high = (0.0, 1.0) if is_probability else (None, None)
    image = axes.imshow(values, cmap="Blues", origin="lower", extent=(0.5, end, 0.5, end), vmin=low, vmax=high)
    figure.colorbar(image, label="probability of contact" if is_probability else "mean APC-corrected attention")
    axes.set(xlabel="residue", ylabel="residue")
    return figure


CONTACTS_SCORER = Scorer(
    help="which residues touch: an array [n, n] a record, from attention maps",
    describe=describe,
    score=contact_maps,
    draw=draw_contacts,
)
