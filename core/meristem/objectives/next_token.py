"""Next tokens: predict each from those before it, all of them or those behind a prefix that is read as a whole."""

from dataclasses import replace

import numpy as np

from meristem.data.parts import Encoder
from meristem.errors import require
from meristem.model.config import TransformerConfig, sees_the_future
from meristem.model.model import SYMBOLS
from meristem.model.patterns import has_prefix
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
        name, advice = type(self).__name__, "such as pattern: {kind: Causal} (architecture.attention.pattern)"
        got = f"num_decoder_layers={config.num_decoder_layers} (architecture.num_decoder_layers)"
        require(not config.num_decoder_layers, f"objective {name} needs a model of one stack", got)
        for layer in range(config.num_layers):
            pattern = config.layer(layer).attention.pattern
            got = f"{type(pattern).__name__} in layer {layer}; {advice}"
            require(
                not sees_the_future(pattern), f"objective {name} needs layers that do not see what they predict", got
            )

    def prepare(self, record: Record, encode: Encoder, rng: np.random.Generator) -> tuple[Tokens, ...]:
        tokens = encode(self.inputs[0])
        return (replace(tokens, targets={**tokens.targets, SYMBOLS: self._next_symbols(tokens)}),)

    def _next_symbols(self, tokens: Tokens) -> np.ndarray:
        """`[n]` the symbol behind each row, where it is asked for."""
        (before, behind), spans = tokens.frame, tokens.spans
        symbols = np.array(tokens.ids, np.int64)
        symbols[symbols < 0] = IGNORE  # patches
        symbols[:before] = IGNORE
        stop = len(tokens) - behind
        if spans is not None and before < stop:
            if before and spans[before, 0] > spans[0, 1]:
                symbols[before] = IGNORE
            if behind and spans[stop - 1, 1] < spans[stop, 0]:
                symbols[stop:] = IGNORE
        return np.append(symbols[1:], IGNORE)


class PrefixLM(NextToken):
    """Predict what follows a random prefix, whose tokens see each other (Raffel 2020, arXiv 1910.10683, section 3.2.1).

    The prefix ends at a place of the payload drawn uniformly, one token in and one before its end at the latest where
    there are two. Tokens in it are not scored. The architecture's pattern says that it is seen as a whole:
    `Either` of `Causal` and `InPrefix`.

    Args:
        label_smoothing: share of each target's probability that is spread evenly over all symbols.
    """

    def bind_model(self, config: TransformerConfig) -> None:
        super().bind_model(config)
        sees_prefix = any(has_prefix(config.layer(layer).attention.pattern) for layer in range(config.num_layers))
        advice = "pattern: {kind: Either, parts: [{kind: Causal}, {kind: InPrefix}]} (architecture.attention.pattern)"
        rule = "objective PrefixLM needs a layer that sees the prefix as a whole"
        require(sees_prefix, rule, f"none; such as {advice}")

    def prepare(self, record: Record, encode: Encoder, rng: np.random.Generator) -> tuple[Tokens, ...]:
        tokens = encode(self.inputs[0])
        before, behind = tokens.frame
        num_payload = len(tokens) - before - behind
        prefix_length = before + (int(rng.integers(1, num_payload)) if num_payload > 1 else 0)
        targets = self._next_symbols(tokens)
        # the last row of the prefix predicts the first one behind it
        targets[: max(prefix_length - 1, 0)] = IGNORE
        return (replace(tokens, prefix_length=prefix_length, targets={**tokens.targets, SYMBOLS: targets}),)
