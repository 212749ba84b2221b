"""A model as scorers run it."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch.nn import functional as F

from meristem.data.tokenizer import Tokenizer
from meristem.model.model import SYMBOLS, Model
from meristem.model.transformer import Encoder, EncoderDecoder
from meristem.shapes import Float, Float64, Int, Tensor
from meristem.types import PackedBatch

ROWS_PER_CALL = 128
"""Rows that the symbol head gets in one call, no more and no fewer. Log-probabilities of all rows of a pack at once
would take `12 * T * V` bytes; and on a CPU a matrix product may round a row differently when the number of rows is
another, so a likelihood would depend on the token budget."""


@dataclass(frozen=True, eq=False)
class RunningModel:
    """A model in evaluation mode on its device, and how it is run.

    Attributes:
        model: its heads are used, in the precision that they have.
        trunk: the model's own trunk, or a copy of it in another precision or with pre-packed weights.
        tokenizer: of the model.
        tokens_per_batch: tokens that a pack holds at most, unless a single sequence is longer.
        advance: called with the number of tokens that were run since the last call.
    """

    model: Model
    trunk: Encoder | EncoderDecoder
    tokenizer: Tokenizer
    tokens_per_batch: int = 4096
    advance: Callable[[int], None] = lambda count: None

    def telling(self, advance: Callable[[int], None]) -> "RunningModel":
        """The same, which reports to another."""
        return replace(self, advance=advance)

    @torch.inference_mode()
    def symbol_log_probabilities(
        self, batch: PackedBatch, rows: Int[Tensor, "M"], symbols: Int[Tensor, "M"]
    ) -> Float64[Tensor, "M"]:
        """Log-probability (nats) that the symbol head gives one symbol at each of some rows.

        Args:
            batch: on any device.
            rows: of the batch; of the decoder's side where there are two.
            symbols: the id asked for at each row.
        """
        device = self.trunk.device
        final = self.trunk(batch.to(device)).final[rows.to(device)].to(self.model.trunk.embedding.symbols.weight.dtype)
        found = []
        for part, wanted in zip(final.split(ROWS_PER_CALL), symbols.to(device).split(ROWS_PER_CALL)):
            logits = self.symbol_logits(F.pad(part, (0, 0, 0, ROWS_PER_CALL - len(part))))[: len(part)]
            found.append(logits.double().log_softmax(-1).gather(1, wanted[:, None]).squeeze(1))
        return torch.cat(found).cpu() if found else torch.empty(0, dtype=torch.float64)

    def symbol_logits(self, rows: Float[Tensor, "M D"]) -> Float[Tensor, "M V"]:
        """Logits of every symbol for some rows of the trunk's output."""
        logits: Tensor = self.model.heads[SYMBOLS](rows, self.model.trunk.embedding.symbols.weight)
        return logits
