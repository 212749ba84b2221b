"""Span corruption: an encoder reads a text with gaps, a decoder writes what stood in them."""

import numpy as np

from meristem.data.corrupt import cut_spans, draw_spans
from meristem.data.parts import Encoder, RunData
from meristem.errors import ConfigError
from meristem.objectives.symbols import require_fractions
from meristem.objectives.two_sided import TwoSided


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
        if mean_span < 1:
            raise ConfigError(f"objective.mean_span must be 1 token or more; got {mean_span}")
        self.rate, self.mean_span, self.sentinels = rate, mean_span, tuple(sentinels or ())
        self._sentinel_ids = np.zeros(0, np.int64)
        self._num_closing = 0

    def bind(self, data: RunData) -> None:
        super().bind(data)
        tokenizer = data.tokenizer
        index = {symbol: i for i, symbol in enumerate(tokenizer.vocab)}
        unknown = [symbol for symbol in self.sentinels if symbol not in index]
        if unknown or len(set(self.sentinels)) < len(self.sentinels):
            raise ConfigError(
                "objective.sentinels must be symbols of the vocabulary, each once; "
                f"got {unknown[0] if unknown else 'one twice'}"
            )
        names = list(self.sentinels)
        if not names:
            while (name := f"<extra_id_{len(names)}>") in index:
                names.append(name)
        if len(names) < 2:
            raise ConfigError(
                "objective SpanCorruption needs a vocabulary with two sentinels or more, <extra_id_0>, <extra_id_1> "
                f"and so on, or other symbols named by objective.sentinels; got {len(names)}"
            )
        self._sentinel_ids = np.array([index[name] for name in names], np.int64)
        self._num_closing = tokenizer.num_special[1]

    def lengths(self, lengths: np.ndarray) -> np.ndarray:
        # what is cut out goes to the other side; each span adds a sentinel on both
        num_spans = np.clip(self.rate * lengths / self.mean_span, 1, len(self._sentinel_ids) - 1)
        return np.ceil(lengths + 2 * num_spans + self._num_closing + 1).astype(lengths.dtype)

    def sides_of(
        self, encode: Encoder, payload: np.ndarray, closing: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        most = len(self._sentinel_ids) - 1
        spans = draw_spans(len(payload), rng, rate=self.rate, mean_span=self.mean_span, most=most)
        source, target = cut_spans(payload, spans, self._sentinel_ids)
        return source, np.concatenate([target, closing])
