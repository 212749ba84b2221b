"""Denoising: an encoder reads a damaged text, a decoder writes the whole one."""

import numpy as np

from meristem.data.corrupt import delete_tokens, infill_tokens
from meristem.data.parts import Encoder, RunData
from meristem.errors import ConfigError
from meristem.objectives.symbols import require_fractions
from meristem.objectives.two_sided import TwoSided


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
        if rate + delete_rate == 0 or delete_rate == 1:
            raise ConfigError(
                "objective.rate or objective.delete_rate must be above 0, and something must be left; "
                f"got rate={rate}, delete_rate={delete_rate}"
            )
        if mean_span <= 0:
            raise ConfigError(f"objective.mean_span must be above 0 tokens; got {mean_span}")
        self.rate, self.mean_span, self.delete_rate = rate, mean_span, delete_rate
        self._mask_id: int | None = None

    def bind(self, data: RunData) -> None:
        super().bind(data)
        tokenizer = data.tokenizer
        self._mask_id = tokenizer.mask_id
        if self.rate and self._mask_id is None:
            raise ConfigError(
                "objective Denoising needs a tokenizer with a mask symbol, or a rate of 0; this one has none"
            )

    def lengths(self, lengths: np.ndarray) -> np.ndarray:
        return 2 * lengths

    def sides_of(
        self, encode: Encoder, payload: np.ndarray, closing: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        source = payload
        if self.delete_rate:
            source = delete_tokens(source, rng, rate=self.delete_rate)
        if self._mask_id is not None and self.rate:
            source = infill_tokens(source, rng, rate=self.rate, mean_span=self.mean_span, mask_id=self._mask_id)
        return source, np.concatenate([payload, closing])
