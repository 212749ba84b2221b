"""What objectives of encoder-decoders share: a source that is read, and a target that is written."""

from abc import abstractmethod
from typing import Any

import numpy as np

from meristem.data.parts import Encoder, RunData
from meristem.errors import ConfigError
from meristem.model.config import TransformerConfig, sees_the_future
from meristem.model.model import SYMBOLS
from meristem.objectives.symbols import SymbolObjective
from meristem.types import SOURCE, Record, Tokens


class TwoSided(SymbolObjective):
    """A target, written symbol by symbol by a decoder that sees the source through an encoder.

    The decoder reads a start symbol and then the target, one row behind what it is to predict; every symbol of the
    target is scored, the special rows that close it as well. Those that a tokenizer puts before a payload are no part
    of a target: the start symbol stands for them.

    Args:
        start_id: symbol that the decoder reads first; null for the tokenizer's padding, or 0 where it has none.
        label_smoothing: share of each target's probability that is spread evenly over all symbols.
    """

    def __init__(self, start_id: int | None = None, label_smoothing: float = 0.0):
        super().__init__(label_smoothing)
        self.start_id = start_id
        self._start_id = 0

    def bind(self, data: RunData) -> None:
        tokenizer = data.tokenizer_of(self.inputs[-1])
        self._start_id = (tokenizer.pad_id or 0) if self.start_id is None else self.start_id
        last = len(tokenizer.vocab) - 1
        if not 0 <= self._start_id <= last:
            raise ConfigError(f"objective.start_id must be the number of a symbol, 0 to {last}; got {self.start_id}")

    def bind_model(self, config: TransformerConfig) -> None:
        super().bind_model(config)
        name = type(self).__name__
        if not config.num_decoder_layers:
            raise ConfigError(
                f"objective {name} needs an encoder-decoder; got num_decoder_layers=0 (architecture.num_decoder_layers)"
            )
        for layer in range(config.num_layers, config.total_layers):
            pattern = config.layer(layer).attention.pattern
            if sees_the_future(pattern):
                raise ConfigError(
                    f"objective {name} needs decoder layers that do not see what they predict; got "
                    f"{type(pattern).__name__} in layer {layer} of both stacks; such as a rule "
                    f"{{start: {config.num_layers}, attention: {{pattern: {{kind: Causal}}}}}} (architecture.layers)"
                )

    def prepare(self, record: Record, encode: Encoder, rng: np.random.Generator) -> tuple[Tokens, ...]:
        tokens = encode(self.inputs[0])
        if tokens.features is not None:
            raise ConfigError(f"objective {type(self).__name__} needs a domain of symbols; got patches")
        before, behind = tokens.frame
        stop = len(tokens) - behind
        payload, closing = tokens.ids[before:stop], tokens.ids[stop:]
        source, target = self.sides_of(encode, payload, closing, rng)
        target = np.array(target, np.int64)
        read = np.append([self._start_id], target[:-1])
        return (
            _sequence([tokens.ids[:before], closing], source, side=SOURCE),
            _sequence([read[:1], read[:0]], read[1:], targets={SYMBOLS: target}),
        )

    @abstractmethod
    def sides_of(
        self, encode: Encoder, payload: np.ndarray, closing: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """The source without its special rows, and the target with the rows that close it; neither is empty.

        Args:
            encode: gives the tokens of other inputs.
            payload: `[n]` symbols of the first input, without special rows.
            closing: the special rows behind them.
        """


def _sequence(special: list[np.ndarray], own: np.ndarray, **fields: Any) -> Tokens:
    """Symbols between the special ones before and behind them."""
    ids = np.concatenate([special[0], own, special[1]]).astype(np.int64)
    is_special = np.repeat([True, False, True], [len(special[0]), len(own), len(special[1])])
    return Tokens(positions=np.arange(len(ids))[:, None], ids=ids, is_special=is_special, **fields)
