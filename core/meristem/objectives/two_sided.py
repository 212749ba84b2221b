"""What encoder-decoders are trained for: to write a target, given a source that is made of the same text or another."""

from abc import abstractmethod
from itertools import count, takewhile
from typing import Any

import numpy as np

from meristem.data.corrupt import cut_spans, delete_tokens, draw_spans, infill_tokens
from meristem.data.parts import Encoder, RunData
from meristem.errors import ConfigError, require
from meristem.model.config import TransformerConfig, sees_the_future
from meristem.model.model import SYMBOLS
from meristem.objectives.symbols import SymbolObjective, require_fractions
from meristem.types import SOURCE, Record, Tokens

TARGET = "target"
"""Name of the input of a record that a decoder writes; `SOURCE` is that of what it is given."""

Sides = tuple[np.ndarray, np.ndarray]
"""Symbols of the source and of the target."""


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
        is_symbol = 0 <= self._start_id <= last
        require(is_symbol, f"objective.start_id must be the number of a symbol, 0 to {last}", self.start_id)

    def bind_model(self, config: TransformerConfig) -> None:
        super().bind_model(config)
        name = type(self).__name__
        got = "num_decoder_layers=0 (architecture.num_decoder_layers)"
        require(config.num_decoder_layers > 0, f"objective {name} needs an encoder-decoder", got)
        rule = f"objective {name} needs decoder layers that do not see what they predict"
        advice = f"{{start: {config.num_layers}, attention: {{pattern: {{kind: Causal}}}}}} (architecture.layers)"
        for layer in range(config.num_layers, config.total_layers):
            pattern = config.layer(layer).attention.pattern
            got = f"{type(pattern).__name__} in layer {layer} of both stacks; such as a rule {advice}"
            require(not sees_the_future(pattern), rule, got)

    def prepare(self, record: Record, encode: Encoder, rng: np.random.Generator) -> tuple[Tokens, ...]:
        tokens = encode(self.inputs[0])
        require(tokens.features is None, f"objective {type(self).__name__} needs a domain of symbols", "patches")
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
    def sides_of(self, encode: Encoder, payload: np.ndarray, closing: np.ndarray, rng: np.random.Generator) -> Sides:
        """The source without its special rows, and the target with the rows that close it; neither is empty.

        Args:
            payload: `[n]` symbols of the first input, without special rows.
            closing: the special rows behind them.
        """


class SpanCorruption(TwoSided):
    """Write the spans that are missing from the source (T5; Raffel 2020, arXiv 1910.10683, section 3.1.4).

    In the source each span is replaced by a sentinel of its own; the target is each sentinel with its span, then one
    more sentinel, then the tokenizer's closing rows. The published code of T5 leaves that last sentinel out, since its
    texts end with a span always.

    Args:
        rate: fraction of the payload's tokens that are cut out.
        mean_span: tokens of a span on average.
        sentinels: symbols of the vocabulary that stand for spans, in order; empty for `<extra_id_0>`,
            `<extra_id_1>` and so on, as far as the vocabulary has them. A text has one span less than these at most.
        start_id: symbol that the decoder reads first; null for the tokenizer's padding, or 0 where it has none.
        label_smoothing: share of each target's probability that is spread evenly over all symbols.
    """

    def __init__(
        self,
        rate: float = 0.15,
        mean_span: float = 3.0,
        sentinels: list[str] | None = None,
        start_id: int | None = None,
        label_smoothing: float = 0.0,
    ):
        super().__init__(start_id, label_smoothing)
        require_fractions({"rate": rate}, above_zero=("rate",))
        require(mean_span >= 1, "objective.mean_span must be 1 token or more", mean_span)
        self.rate, self.mean_span, self.sentinels = rate, mean_span, tuple(sentinels or ())
        self._sentinel_ids = np.zeros(0, np.int64)
        self._num_closing = 0

    def bind(self, data: RunData) -> None:
        super().bind(data)
        tokenizer = data.tokenizer
        index = {symbol: i for i, symbol in enumerate(tokenizer.vocab)}
        rule = "objective.sentinels must be symbols of the vocabulary, each once"
        for symbol in self.sentinels:
            require(symbol in index, rule, symbol)
        require(len(set(self.sentinels)) == len(self.sentinels), rule, "one twice")
        extra = takewhile(index.__contains__, (f"<extra_id_{i}>" for i in count()))
        names = self.sentinels or tuple(extra)
        rule = "objective SpanCorruption needs a vocabulary with two sentinels or more, <extra_id_0>, <extra_id_1>"
        require(len(names) >= 2, f"{rule} and so on, or other symbols named by objective.sentinels", len(names))
        self._sentinel_ids = np.array([index[name] for name in names], np.int64)
        self._num_closing = tokenizer.num_special[1]

    def lengths(self, lengths: np.ndarray) -> np.ndarray:
        # what is cut out goes to the other side; each span adds a sentinel on both
        num_spans = np.clip(self.rate * lengths / self.mean_span, 1, len(self._sentinel_ids) - 1)
        return np.ceil(lengths + 2 * num_spans + self._num_closing + 1).astype(lengths.dtype)

    def sides_of(self, encode: Encoder, payload: np.ndarray, closing: np.ndarray, rng: np.random.Generator) -> Sides:
        most = len(self._sentinel_ids) - 1
        spans = draw_spans(len(payload), rng, rate=self.rate, mean_span=self.mean_span, most=most)
        source, target = cut_spans(payload, spans, self._sentinel_ids)
        return source, np.concatenate([target, closing])


class Denoising(TwoSided):
    """Write the payload whole from a damaged copy (BART; Lewis 2019, arXiv 1910.13461, section 2.2).

    Some tokens are deleted first; then spans of Poisson length are replaced by one mask each. Sentences are left in
    their order.

    Args:
        rate: fraction of the payload's tokens that are hidden behind masks.
        mean_span: mean length of the spans that one mask hides, in tokens.
        delete_rate: fraction of the payload's tokens that are deleted.
        start_id: symbol that the decoder reads first; null for the tokenizer's padding, or 0 where it has none.
        label_smoothing: share of each target's probability that is spread evenly over all symbols.
    """

    def __init__(
        self,
        rate: float = 0.3,
        mean_span: float = 3.0,
        delete_rate: float = 0.0,
        start_id: int | None = None,
        label_smoothing: float = 0.0,
    ):
        super().__init__(start_id, label_smoothing)
        require_fractions({"rate": rate, "delete_rate": delete_rate})
        require(
            rate + delete_rate > 0 and delete_rate < 1,
            "objective.rate or objective.delete_rate must be above 0, and something must be left",
            f"rate={rate}, delete_rate={delete_rate}",
        )
        require(mean_span > 0, "objective.mean_span must be above 0 tokens", mean_span)
        self.rate, self.mean_span, self.delete_rate = rate, mean_span, delete_rate
        self._mask_id: int | None = None

    def bind(self, data: RunData) -> None:
        super().bind(data)
        self._mask_id = data.tokenizer.mask_id
        if self.rate and self._mask_id is None:
            raise ConfigError(
                "objective Denoising needs a tokenizer with a mask symbol, or a rate of 0; this one has none"
            )

    def lengths(self, lengths: np.ndarray) -> np.ndarray:
        return 2 * lengths

    def sides_of(self, encode: Encoder, payload: np.ndarray, closing: np.ndarray, rng: np.random.Generator) -> Sides:
        source = payload
        if self.delete_rate:
            source = delete_tokens(source, rng, rate=self.delete_rate)
        if self._mask_id is not None and self.rate:
            source = infill_tokens(source, rng, rate=self.rate, mean_span=self.mean_span, mask_id=self._mask_id)
        return source, np.concatenate([payload, closing])


class SequenceToSequence(TwoSided):
    """Write the input `target`, given the input `source` (Sutskever 2014; Vaswani 2017, arXiv 1706.03762).

    A source that is cropped no longer says what its target says: set `data.max_tokens_per_record` so that none is.

    Args:
        max_target_tokens: longer targets end there, closing rows left out; null for what the model can place.
        start_id: symbol that the decoder reads first; null for the tokenizer's padding, or 0 where it has none.
        label_smoothing: share of each target's probability that is spread evenly over all symbols.
    """

    inputs = (SOURCE, TARGET)

    def __init__(self, max_target_tokens: int | None = None, start_id: int | None = None, label_smoothing: float = 0.0):
        super().__init__(start_id, label_smoothing)
        is_right = max_target_tokens is None or max_target_tokens >= 1
        require(is_right, "objective.max_target_tokens must be 1 or more", max_target_tokens)
        self.max_target_tokens = max_target_tokens

    def sides_of(self, encode: Encoder, payload: np.ndarray, closing: np.ndarray, rng: np.random.Generator) -> Sides:
        target = encode(TARGET)
        limits = [self.max_target_tokens, None if self.config is None else self.config.max_length]
        return payload, target.ids[target.frame[0] :][: min((limit for limit in limits if limit), default=None)]


def _sequence(special: list[np.ndarray], own: np.ndarray, **fields: Any) -> Tokens:
    """Symbols between the special ones before and behind them."""
    ids = np.concatenate([special[0], own, special[1]]).astype(np.int64)
    is_special = np.repeat([True, False, True], [len(special[0]), len(own), len(special[1])])
    return Tokens(positions=np.arange(len(ids))[:, None], ids=ids, is_special=is_special, **fields)
