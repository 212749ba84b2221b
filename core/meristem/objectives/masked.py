"""Masked symbols: hide some tokens and predict them from the others (BERT, Devlin et al. 2019)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torchmetrics import Metric

from meristem.data.corrupt import mask_tokens
from meristem.data.tokenizer import Tokenizer
from meristem.errors import ConfigError
from meristem.model.model import SYMBOLS, Model
from meristem.objectives.objective import Objective
from meristem.types import IGNORE, LossOut, PackedBatch, Record, Term, Tokens

HIDDEN = "hidden"
"""Scored tokens that show the mask symbol: those left as they are would flatter a perplexity."""


class Masked(Objective):
    """Predict masked symbols.

    Args:
        rate: fraction of the payload's tokens that are to be predicted; special rows never are.
        mask_frac: fraction of those that are hidden.
        random_frac: fraction of those that are replaced by a random symbol; the rest stays as it is.
        mean_span: mean length, in tokens, of the spans they lie in; 1 scatters them.
    """

    def __init__(self, rate: float = 0.15, mask_frac: float = 0.8, random_frac: float = 0.1, mean_span: float = 1.0):
        for name, value in {"rate": rate, "mask_frac": mask_frac, "random_frac": random_frac}.items():
            if not 0 <= value <= 1 or (name == "rate" and value == 0):
                low = "above 0" if name == "rate" else "0 or more"
                raise ConfigError(f"objective.{name} must be {low} and at most 1; got {value}")
        if mask_frac + random_frac > 1:
            raise ConfigError(
                f"objective.mask_frac + random_frac must be at most 1; got {mask_frac} + {random_frac}; "
                "what is left over stays as it is"
            )
        if mean_span < 1:
            raise ConfigError(f"objective.mean_span must be 1 token or more; got {mean_span}")
        self.rate, self.mask_frac, self.random_frac, self.mean_span = rate, mask_frac, random_frac, mean_span
        self._mask_id = -1
        self._random_ids = np.zeros(0, np.int64)
        self._num_special = (0, 0)

    def bind(self, tokenizer: Tokenizer, labels: Mapping[str, Sequence[Any]], where: Callable[[int], str]) -> None:
        if tokenizer.mask_id is None:
            raise ConfigError("objective Masked needs a tokenizer with a mask symbol; this one has none")
        self._mask_id, self._random_ids = tokenizer.mask_id, tokenizer.random_ids
        self._num_special = tokenizer.num_special
        if self.random_frac and not len(self._random_ids):
            raise ConfigError("objective.random_frac must be 0 where the tokenizer names no random symbols")

    def prepare(self, record: Record, tokens: tuple[Tokens, ...], rng: np.random.Generator) -> tuple[Tokens, ...]:
        return tuple(self._mask(one, rng) for one in tokens)

    def _mask(self, tokens: Tokens, rng: np.random.Generator) -> Tokens:
        before, behind = self._num_special
        is_maskable = np.zeros(len(tokens), bool)
        is_maskable[before : len(tokens) - behind] = True
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

    @property
    def heads(self) -> tuple[str, ...]:
        return (SYMBOLS,)

    def loss(self, model: Model, extra: nn.ModuleDict, batch: PackedBatch) -> LossOut:
        hidden = model.trunk(batch)
        targets_T = batch.targets[SYMBOLS]
        rows_M = (targets_T != IGNORE).nonzero().squeeze(1)
        targets_M = targets_T.index_select(0, rows_M)
        # only scored rows reach the head: with a large vocabulary it costs as much as several blocks
        scored_MD = hidden.final.index_select(0, rows_M)
        logits_MV = model.heads[SYMBOLS](scored_MD, model.trunk.embedding.symbols.weight).float()
        losses_M = F.cross_entropy(logits_MV, targets_M, reduction="none")
        count = torch.tensor(float(len(rows_M)), device=losses_M.device)
        hits_M = (logits_MV.detach().argmax(-1) == targets_M).float()
        is_hidden_M = batch.ids.index_select(0, rows_M) == self._mask_id
        return LossOut(
            terms={SYMBOLS: Term(losses_M.sum(), count)},
            predictions={SYMBOLS: hits_M, HIDDEN: losses_M.detach()[is_hidden_M]},
            targets={SYMBOLS: targets_M, HIDDEN: targets_M[is_hidden_M]},
        )

    def metrics(self) -> dict[str, Metric]:
        return {f"{SYMBOLS}/accuracy": HitRate(), f"{HIDDEN}/perplexity": Perplexity()}


class HitRate(Metric):
    """The share of hits: predictions come as 1 for a hit, so that no logits are kept."""

    hits: torch.Tensor
    count: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("hits", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, hits: torch.Tensor, targets: torch.Tensor) -> None:
        self.hits += hits.double().sum()
        self.count += len(targets)

    def compute(self) -> torch.Tensor:
        return self.hits / self.count


class Perplexity(Metric):
    """The exponential of the mean of losses (nats), taken over all of them at once."""

    total: torch.Tensor
    count: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, losses: torch.Tensor, targets: torch.Tensor) -> None:
        self.total += losses.double().sum()
        self.count += len(targets)

    def compute(self) -> torch.Tensor:
        return (self.total / self.count).exp()
