"""Many sequences at once, each of which gets one more token a step."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from meristem.errors import ConfigError
from meristem.generation.few_rows import min_rows_of
from meristem.model.cache import Cache
from meristem.model.model import SYMBOLS, Model
from meristem.model.outputs import HeadRequest, Wanted
from meristem.model.patterns import has_prefix
from meristem.model.transformer import Decoder, EncoderDecoder
from meristem.shapes import Float, Tensor
from meristem.types import SOURCE, Layout, PackedBatch


def check_generates(model: Model) -> None:
    """Refuse a model that cannot make sequences.

    Raises:
        ConfigError: its tokens see those behind them, or it predicts no symbols.
    """
    if not isinstance(model.trunk, Decoder | EncoderDecoder):
        raise ConfigError(
            "generating needs a decoder or an encoder-decoder; the tokens of this model see those behind them"
        )
    if SYMBOLS not in model.heads:
        raise ConfigError("the model must predict symbols to generate, and this one is a trunk alone")


MAX_ROOM_TOKENS = 512
"""Tokens that slots have room for at first, however many may be made: most texts end before."""


class Steps:
    """The state of some sequences: what is cached, and the logits of what comes next.

    Sequences lie in the order given, not by length: a sequence keeps its number. Under a pattern with a prefix, the
    prompt is the prefix.

    Args:
        model: in evaluation mode; a decoder or an encoder-decoder.
        prompts: ids of each; those of an encoder-decoder are read by its encoder.
        start_id: first token of an encoder-decoder's output.
        room_tokens: that are likely to be added to each; the cache need not grow for them.

    Attributes:
        logits: `[S, V]` fp32 of the next token of each sequence.
    """

    def __init__(self, model: Model, prompts: Sequence[np.ndarray], start_id: int | None = None, room_tokens: int = 0):
        self.model, self.device = model, model.device
        self.cache, self._min_rows = Cache(min(room_tokens, MAX_ROOM_TOKENS)), min_rows_of(model)
        self._prefixes: list[int] = []
        if isinstance(model.trunk, EncoderDecoder):
            if start_id is None:
                raise ConfigError("an encoder-decoder needs a first token of its output: a start or a padding symbol")
            batch = replace(self._batch([np.array([start_id])] * len(prompts)), sides={SOURCE: self._batch(prompts)})
        else:
            patterns = (model.config.layer(layer).attention.pattern for layer in range(model.config.num_layers))
            if any(map(has_prefix, patterns)):
                self._prefixes = [len(ids) for ids in prompts]
            batch = self._batch(prompts)
        self.logits = self._run(batch)

    def advance(self, tokens: Sequence[int], sequences: Sequence[int]) -> None:
        """Go on with some sequences, in this order, each with one more token.

        Args:
            sequences: their numbers; left out ones end, and one may be there more than once.
        """
        self._select(list(sequences))
        self.logits = self._run(self._batch([np.array([token]) for token in tokens], self.cache.lengths))

    def repeat(self, count: int) -> None:
        """Each sequence `count` times, side by side."""
        sequences = [sequence for sequence in range(len(self.cache.lengths)) for _ in range(count)]
        self._select(sequences)
        self.logits = self.logits[sequences]

    def _select(self, sequences: list[int]) -> None:
        self.cache.select(sequences)
        self._prefixes = [self._prefixes[sequence] for sequence in sequences] if self._prefixes else []

    def _run(self, batch: PackedBatch) -> Float[Tensor, "S V"]:
        layout = batch.layout
        last = [start + length - 1 for start, length in zip(layout.starts, layout.lengths)]
        spare = [0] * max(0, self._min_rows - len(last))
        request = HeadRequest(torch.tensor([*last, *spare]).to(self.device))
        logits: Tensor = self.model(batch, Wanted({SYMBOLS: request}, cache=self.cache)).heads[SYMBOLS]
        return logits[: len(last)].float()

    def _batch(self, sequences: Sequence[np.ndarray], starts: Sequence[int] = ()) -> PackedBatch:
        """Sequences end to end in their order, from the places where they go on."""
        layout = replace(
            Layout.of([len(ids) for ids in sequences], self._min_rows), prefix_lengths=tuple(self._prefixes)
        )
        begins = starts or [0] * len(sequences)
        ids = np.zeros(layout.num_rows, np.int64)
        positions = np.zeros((layout.num_rows, 1), np.int64)
        ids[: layout.num_tokens] = np.concatenate(sequences)
        places = [np.arange(begin, begin + len(part)) for begin, part in zip(begins, sequences)]
        positions[: layout.num_tokens, 0] = np.concatenate(places)
        return PackedBatch(layout, torch.from_numpy(positions), torch.from_numpy(ids)).to(self.device)
