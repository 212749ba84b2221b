"""Sequels: does the second code go on where the first one ends?"""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from lab_codes.head import EndsReadout
from lab_codes.tokenizer import SPECIAL
from meristem.data.parts import Encoder
from meristem.errors import ConfigError
from meristem.model.config import TransformerConfig
from meristem.model.heads import HeadSpec
from meristem.model.outputs import Outputs, Wanted
from meristem.objectives.objective import Objective
from meristem.types import LossOut, PackedBatch, Record, Term, Tokens

SEQUEL = "sequel"


class TellSequels(Objective):
    """Tell a second code from the same code turned round, given the first.

    Args:
        turned_frac: share of the records whose second code is turned round.
    """

    inputs = ("first", "second")
    joined_inputs = ("first", "second")

    def __init__(self, turned_frac: float = 0.5):
        if not 0 < turned_frac < 1:
            raise ConfigError(f"objective.turned_frac must be above 0 and below 1; got {turned_frac}")
        self.turned_frac = turned_frac

    @property
    def heads(self) -> Mapping[str, HeadSpec]:
        return {SEQUEL: EndsReadout(name=SEQUEL, classes=("goes on", "is turned"))}

    def prepare(self, record: Record, encode: Encoder, rng: np.random.Generator) -> tuple[Tokens, ...]:
        is_turned = bool(rng.random() < self.turned_frac)
        second = record.inputs["second"]
        codes = {"first": encode("first"), "second": encode("second", second[::-1] if is_turned else second)}
        return (replace(self.join(codes, self.config), labels={SEQUEL: np.array(int(is_turned))}),)

    @classmethod
    def join(cls, inputs: Mapping[str, Tokens], config: TransformerConfig | None) -> Tokens:
        """The tokens of both codes between one start and one end."""
        ids = np.concatenate([inputs["first"].ids[:-1], inputs["second"].ids[1:]]).astype(np.int64)
        return Tokens(positions=np.arange(len(ids))[:, None], ids=ids, is_special=ids < len(SPECIAL))

    def wanted(self, batch: PackedBatch) -> Wanted:
        return Wanted((SEQUEL,))

    def loss(self, outputs: Outputs, extra: nn.ModuleDict, batch: PackedBatch) -> LossOut:
        wanted_S, logits_SC = batch.labels[SEQUEL], outputs.heads[SEQUEL].float()
        count = torch.tensor(float(len(wanted_S)), device=logits_SC.device)
        return LossOut({SEQUEL: Term(F.cross_entropy(logits_SC, wanted_S, reduction="sum"), count)})
