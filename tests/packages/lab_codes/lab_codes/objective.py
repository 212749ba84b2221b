"""Sequels: does the second half of a code go on where the first one ends?"""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from lab_codes.head import EndsReadout
from meristem.data.parts import Encoder, RunData
from meristem.errors import ConfigError
from meristem.model.heads import HeadSpec
from meristem.model.outputs import Outputs, Wanted
from meristem.objectives.objective import Objective
from meristem.types import INPUT, LossOut, PackedBatch, Record, Term, Tokens

SEQUEL = "sequel"


class TellSequels(Objective):
    """Tell the second half of a code from the same half turned round, given the first.

    Args:
        turned_frac: share of the records whose second half is turned round.
    """

    def __init__(self, turned_frac: float = 0.5):
        if not 0 < turned_frac < 1:
            raise ConfigError(f"objective.turned_frac must be above 0 and below 1; got {turned_frac}")
        self.turned_frac = turned_frac

    def bind(self, data: RunData) -> None:
        self.num_special = data.tokenizer.num_special

    @property
    def heads(self) -> Mapping[str, HeadSpec]:
        return {SEQUEL: EndsReadout(name=SEQUEL, classes=("goes on", "is turned"))}

    def prepare(self, record: Record, encode: Encoder, rng: np.random.Generator) -> tuple[Tokens, ...]:
        one = encode(INPUT)
        is_turned, half = bool(rng.random() < self.turned_frac), len(one) // 2
        ids = one.ids.copy()
        if is_turned:
            ids[half:-1] = ids[half:-1][::-1]
        return (replace(one, ids=ids, labels={SEQUEL: np.array(int(is_turned))}),)

    def wanted(self, batch: PackedBatch) -> Wanted:
        return Wanted((SEQUEL,))

    def loss(self, outputs: Outputs, extra: nn.ModuleDict, batch: PackedBatch) -> LossOut:
        wanted_S, logits_SC = batch.labels[SEQUEL], outputs.heads[SEQUEL].float()
        count = torch.tensor(float(len(wanted_S)), device=logits_SC.device)
        return LossOut({SEQUEL: Term(F.cross_entropy(logits_SC, wanted_S, reduction="sum"), count)})
