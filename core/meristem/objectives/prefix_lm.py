"""Prefix language models: a beginning that is read as a whole, and what follows it, token by token."""

from dataclasses import replace

import numpy as np

from meristem.data.parts import Encoder
from meristem.errors import ConfigError
from meristem.model.config import Both, Either, InPrefix, Pattern, TransformerConfig
from meristem.model.model import SYMBOLS
from meristem.objectives.next_token import NextToken
from meristem.types import IGNORE, Record, Tokens


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
        if not any(_has_prefix(config.layer(layer).attention.pattern) for layer in range(config.num_layers)):
            raise ConfigError(
                "objective PrefixLM needs a layer that sees the prefix as a whole; got none; such as "
                "pattern: {kind: Either, parts: [{kind: Causal}, {kind: InPrefix}]} (architecture.attention.pattern)"
            )

    def prepare(self, record: Record, encode: Encoder, rng: np.random.Generator) -> tuple[Tokens, ...]:
        tokens = encode(self.inputs[0])
        before, behind = tokens.frame
        num_payload = len(tokens) - before - behind
        prefix_length = before + (int(rng.integers(1, num_payload)) if num_payload > 1 else 0)
        targets = self._next_symbols(tokens)
        # the last row of the prefix predicts the first one behind it
        targets[: max(prefix_length - 1, 0)] = IGNORE
        return (replace(tokens, prefix_length=prefix_length, targets={**tokens.targets, SYMBOLS: targets}),)


def _has_prefix(pattern: Pattern) -> bool:
    if isinstance(pattern, Both | Either):
        return any(_has_prefix(part) for part in pattern.parts)
    return isinstance(pattern, InPrefix)
