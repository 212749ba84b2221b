"""Masked symbols: hide some tokens and predict them from the others (BERT, Devlin et al. 2019)."""

from dataclasses import replace

import numpy as np
import torch
from torch import nn
from torchmetrics import Metric

from meristem.data.corrupt import mask_tokens
from meristem.data.parts import Encoder, RunData
from meristem.errors import ConfigError, require
from meristem.model.heads.symbols import SymbolLoss
from meristem.model.model import SYMBOLS
from meristem.model.outputs import Outputs
from meristem.objectives.objective import Objective
from meristem.objectives.symbols import HITS, NATS, MeanFigure, SymbolObjective, require_fractions
from meristem.types import LossOut, PackedBatch, Record, Tokens

HIDDEN = "hidden"
"""Scored tokens that show the mask symbol: those left as they are would flatter a perplexity."""


class MaskedTokens(SymbolObjective):
    """Predict masked symbols.

    Args:
        rate: fraction of the payload's tokens that are to be predicted; special rows never are.
        mask_frac: fraction of those that are hidden.
        random_frac: fraction of those that are replaced by a random symbol; the rest stays as it is.
        mean_span: mean length, in tokens, of the spans they lie in; 1 scatters them.
        label_smoothing: share of each target's probability that is spread evenly over all symbols.
    """

    def __init__(
        self,
        rate: float = 0.15,
        mask_frac: float = 0.8,
        random_frac: float = 0.1,
        mean_span: float = 1.0,
        label_smoothing: float = 0.0,
    ):
        super().__init__(label_smoothing)
        require_fractions({"rate": rate, "mask_frac": mask_frac, "random_frac": random_frac}, above_zero=("rate",))
        both = f"{mask_frac} + {random_frac}; what is left over stays as it is"
        require(mask_frac + random_frac <= 1, "objective.mask_frac + random_frac must be at most 1", both)
        require(mean_span >= 1, "objective.mean_span must be 1 token or more", mean_span)
        self.rate, self.mask_frac, self.random_frac, self.mean_span = rate, mask_frac, random_frac, mean_span
        self._mask_id = -1
        self._random_ids = np.zeros(0, np.int64)

    def bind(self, data: RunData) -> None:
        tokenizer = data.tokenizer
        if tokenizer.mask_id is None:
            raise ConfigError(
                f"objective {type(self).__name__} needs a tokenizer with a mask symbol; this one has none"
            )
        self._mask_id, self._random_ids = tokenizer.mask_id, tokenizer.random_ids
        if self.random_frac and not len(self._random_ids):
            raise ConfigError("objective.random_frac must be 0 where the tokenizer names no random symbols")

    def prepare(self, record: Record, encode: Encoder, rng: np.random.Generator) -> tuple[Tokens, ...]:
        return (self._mask(encode(self.inputs[0]), rng),)

    def _mask(self, tokens: Tokens, rng: np.random.Generator) -> Tokens:
        is_maskable = np.ones(len(tokens), bool) if tokens.is_special is None else ~tokens.is_special
        ids, targets = mask_tokens(
            tokens.ids,
            is_maskable,
            rng,
            rate=self.rate,
            mask_id=self._mask_id,
            random_ids=self._random_ids,
            mask_frac=self.mask_frac,
            random_frac=self.random_frac,
            mean_span=self.mean_span,
        )
        return replace(tokens, ids=ids, targets={**tokens.targets, SYMBOLS: targets})

    def loss(self, outputs: Outputs, extra: nn.ModuleDict, batch: PackedBatch) -> LossOut:
        scored: SymbolLoss = outputs.heads[SYMBOLS]
        is_hidden_M = batch.ids.index_select(0, scored.rows) == self._mask_id
        return LossOut(
            terms={SYMBOLS: scored.term},
            predictions={SYMBOLS: scored.figures, HIDDEN: scored.figures[is_hidden_M]},
            targets={SYMBOLS: scored.targets, HIDDEN: scored.targets[is_hidden_M]},
        )

    def metrics(self) -> dict[str, Metric]:
        # of all scored tokens a perplexity would say little: some show what is asked for
        own = {f"{SYMBOLS}/accuracy": MeanFigure(HITS), f"{HIDDEN}/perplexity": MeanFigure(NATS, torch.exp)}
        return {**Objective.metrics(self), **own}
