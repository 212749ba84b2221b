"""Next symbols: predict each token from those before it."""

from dataclasses import replace

import numpy as np

from meristem.data.parts import Encoder
from meristem.errors import ConfigError
from meristem.model.config import TransformerConfig, sees_the_future
from meristem.model.model import SYMBOLS
from meristem.objectives.symbols import SymbolObjective
from meristem.types import IGNORE, Record, Tokens


class NextToken(SymbolObjective):
    """Predict the next token (Bengio 2003; Radford 2019).

    A row is scored by the symbol of the row behind it: the payload's tokens and the special one that closes it. Of
    the special rows before the payload none is asked for, nor is the first token where there is no such row. A record
    that was cropped neither begins nor ends where its window does: the first token of a window that begins later is not
    scored, nor is the closing row of one that ends earlier.

    Args:
        label_smoothing: share of each target's probability that is spread evenly over all symbols.
    """

    def bind_model(self, config: TransformerConfig) -> None:
        super().bind_model(config)
        if config.num_decoder_layers:
            raise ConfigError(
                f"objective {type(self).__name__} needs a model of one stack; "
                f"got num_decoder_layers={config.num_decoder_layers} (architecture.num_decoder_layers)"
            )
        for layer in range(config.num_layers):
            pattern = config.layer(layer).attention.pattern
            if sees_the_future(pattern):
                raise ConfigError(
                    f"objective {type(self).__name__} needs layers that do not see what they predict; "
                    f"got {type(pattern).__name__} in layer {layer}; "
                    "such as pattern: {kind: Causal} (architecture.attention.pattern)"
                )

    def prepare(self, record: Record, encode: Encoder, rng: np.random.Generator) -> tuple[Tokens, ...]:
        tokens = encode(self.inputs[0])
        return (replace(tokens, targets={**tokens.targets, SYMBOLS: self._next_symbols(tokens)}),)

    def _next_symbols(self, tokens: Tokens) -> np.ndarray:
        """`[n]` the symbol behind each row, where it is asked for."""
        before, behind = tokens.frame
        symbols = np.array(tokens.ids, np.int64)
        symbols[symbols < 0] = IGNORE  # patches
        symbols[:before] = IGNORE
        first, stop = before, len(tokens) - behind
        if tokens.spans is not None and first < stop:
            spans = tokens.spans
            if before and spans[first, 0] > spans[0, 1]:
                symbols[first] = IGNORE
            if behind and spans[stop - 1, 1] < spans[stop, 0]:
                symbols[stop:] = IGNORE
        return np.append(symbols[1:], IGNORE)
