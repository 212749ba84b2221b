"""A model as scorers run it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.nn import functional as F

from meristem.data.budget import Budget
from meristem.data.pack import pack_column
from meristem.data.tokenizer import Tokenizer
from meristem.framing import payload_parts
from meristem.model.model import SYMBOLS, Model
from meristem.model.outputs import HeadRequest, Wanted
from meristem.shapes import Float, Float64, Int, Tensor
from meristem.types import Hidden, PackedBatch, TokenColumn

ROWS_PER_CALL = 128
"""Rows that the symbol head gets in one call, no more and no fewer. Log-probabilities of all rows of a pack at once
would take `12 * T * V` bytes; and on a CPU a matrix product may round a row differently when the number of rows is
another, so a likelihood would depend on the token budget."""


@dataclass(frozen=True, eq=False)
class RunningModel:
    """A model in evaluation mode on its device, and how it is run.

    Attributes:
        model: as it runs fastest, such as with a trunk of pre-packed weights.
        tokenizer: of the sequences that are scored.
        budget: runs sequences in packs of so many tokens as fit in memory.
        advance: called with the number of tokens that were run since the last call.
    """

    model: Model
    tokenizer: Tokenizer
    budget: Budget = field(default_factory=Budget)
    advance: Callable[[int], None] = lambda count: None

    @torch.inference_mode()
    def symbol_log_probabilities(
        self, batch: PackedBatch, rows: Int[Tensor, "M"], symbols: Int[Tensor, "M"]
    ) -> Float64[Tensor, "M"]:
        """Log-probability (nats) that the symbol head gives one symbol at each of some rows.

        Args:
            rows: of the batch; of the decoder's side where there are two.
            symbols: the id asked for at each row.
        """
        device = self.model.device
        batch, found = batch.to(device), []
        hidden = self.model(batch, Wanted()).hidden
        parts = self.logits_in_parts(batch, hidden, rows.to(device))
        for logits, asked in zip(parts, symbols.to(device).split(ROWS_PER_CALL)):
            found.append(logits.double().log_softmax(-1).gather(1, asked[:, None]).squeeze(1))
        return torch.cat(found).cpu() if found else torch.empty(0, dtype=torch.float64)

    @torch.inference_mode()
    def logits(self, column: TokenColumn) -> list[np.ndarray]:
        """Logits of every symbol at each row of each sequence that is not special, `[n, V]` float32."""
        found: dict[int, np.ndarray] = {}

        def run(numbers: np.ndarray) -> None:
            batch = pack_column(column, numbers, numbers.tolist()).to(self.model.device)
            hidden = self.model(batch, Wanted()).hidden
            rows = torch.arange(batch.layout.num_tokens, device=self.model.device)
            values = torch.cat([part.float().cpu() for part in self.logits_in_parts(batch, hidden, rows)]).numpy()
            of_sequences = zip(batch.layout.starts, batch.layout.lengths, payload_parts(batch.layout))
            for number, (start, length, part) in zip(numbers.tolist(), of_sequences, strict=True):
                found[number] = values[start : start + length][part]

        for _ in self.budget.run(column.lengths, run):
            pass
        return [found[number] for number in range(len(column))]

    def logits_in_parts(
        self, batch: PackedBatch, hidden: Hidden, rows: Int[Tensor, "M"]
    ) -> Iterator[Float[Tensor, "R V"]]:
        """Logits of every symbol, some rows at a time, which do not depend on how many rows are asked for."""
        for part in rows.split(ROWS_PER_CALL):
            yield self.symbol_logits(batch, hidden, F.pad(part, (0, ROWS_PER_CALL - len(part))))[: len(part)]

    def symbol_logits(self, batch: PackedBatch, hidden: Hidden, rows: Int[Tensor, "M"]) -> Float[Tensor, "M V"]:
        """Logits of every symbol for some rows of a pack that the trunk has run."""
        wanted = Wanted({SYMBOLS: HeadRequest(rows)}, hidden=hidden)
        logits: Tensor = self.model(batch, wanted).heads[SYMBOLS]
        return logits
