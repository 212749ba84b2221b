"""Next sentence: masked symbols of two sentences, and whether the second one follows the first (BERT)."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torchmetrics import Metric

from meristem.data.parts import Encoder, RunData
from meristem.errors import DataError, require
from meristem.model.config import TransformerConfig
from meristem.model.heads import HeadSpec, Readout
from meristem.model.outputs import HeadRequest, Outputs, Wanted
from meristem.objectives.masked import MaskedTokens
from meristem.objectives.symbols import HITS, MeanFigure, require_fractions
from meristem.types import LossOut, PackedBatch, Payload, Record, Term, Tokens

NEXT_SENTENCE = "next_sentence"

IS_NEXT, IS_RANDOM = 0, 1

FIRST, SECOND = "first", "second"


class NextSentence(MaskedTokens):
    """Masked symbols, and whether the second sentence follows the first (Devlin et al. 2019, section 3.1, task 2).

    The input `first` is a sentence, `second` the one that follows it. A record becomes one sequence: the first sentence
    as its tokenizer closes it, then the second, of token type 1, closed alike. For some, drawn anew each epoch, the
    second is that of another training record. The class is read by the model's own pool. A pair that
    is longer than the model can place loses the end of its longer sentence.

    Args:
        random_second_frac: fraction of the pairs whose second sentence is another record's.
        rate: fraction of the tokens of both sentences that are to be predicted.
        mask_frac: fraction of those that are hidden.
        random_frac: fraction of those that are replaced by a random symbol; the rest stays as it is.
        mean_span: mean length, in tokens, of the spans they lie in; 1 scatters them.
        label_smoothing: of symbols: share of each target's probability that is spread evenly over all.
    """

    inputs = (FIRST, SECOND)
    joined_inputs = (FIRST, SECOND)

    def __init__(
        self,
        random_second_frac: float = 0.5,
        rate: float = 0.15,
        mask_frac: float = 0.8,
        random_frac: float = 0.1,
        mean_span: float = 1.0,
        label_smoothing: float = 0.0,
    ):
        super().__init__(rate, mask_frac, random_frac, mean_span, label_smoothing)
        require_fractions({"random_second_frac": random_second_frac})
        self.random_second_frac = random_second_frac
        self._seconds: tuple[Payload, ...] = ()
        self._place: dict[Payload, int] = {}

    def bind(self, data: RunData) -> None:
        super().bind(data)
        train = data.parts["train"]
        self._place = {second: i for i, second in enumerate(dict.fromkeys(train.inputs(SECOND)))}
        self._seconds = tuple(self._place)
        if len(self._seconds) < 2:
            raise DataError(
                f"{train.where(0)}: the input {SECOND!r} must have two different payloads or more among the training "
                f"records; got {len(self._seconds)}"
            )

    def bind_model(self, config: TransformerConfig) -> None:
        super().bind_model(config)
        token_types = config.embedding.token_types
        rule = "objective NextSentence needs a model that tells two sentences apart: embedding.token_types of 2"
        require(token_types >= 2, rule, f"{token_types} (architecture.embedding.token_types)")
        rule = (
            "objective NextSentence needs a model with a pool of its own, such as pool: {kind: Prefix, is_dense: true}"
        )
        require(config.pool is not None, f"{rule} (architecture.pool)", "none")

    @property
    def heads(self) -> Mapping[str, HeadSpec]:
        return {**super().heads, NEXT_SENTENCE: Readout(name=NEXT_SENTENCE, classes=("next", "random"), pool=None)}

    def prepare(self, record: Record, encode: Encoder, rng: np.random.Generator) -> tuple[Tokens, ...]:
        second = encode(SECOND)
        is_random = bool(rng.random() < self.random_second_frac)
        if is_random:
            second = encode(SECOND, self._another(record.inputs[SECOND], rng))
        pair = self.join({FIRST: encode(FIRST), SECOND: second}, self.config)
        labels = {NEXT_SENTENCE: np.array(IS_RANDOM if is_random else IS_NEXT)}
        return (self._mask(replace(pair, labels=labels), rng),)

    @classmethod
    def join(cls, inputs: Mapping[str, Tokens], config: TransformerConfig | None) -> Tokens:
        first, second = inputs[FIRST], inputs[SECOND]
        before, behind = first.frame
        num_closing = second.frame[1]
        firsts, seconds = first.ids, second.ids[second.frame[0] :]
        limit = None if config is None else config.max_length
        if limit is not None and len(firsts) + len(seconds) > limit:  # the special rows that close each stay
            num_second = min(len(seconds), max(limit // 2, limit - len(firsts)))
            firsts, seconds = _shorten(firsts, limit - num_second, behind), _shorten(seconds, num_second, num_closing)
        ids = np.concatenate([firsts, seconds]).astype(np.int64)
        is_special = np.zeros(len(ids), bool)
        for start, stop in ((0, before), (len(firsts) - behind, len(firsts)), (len(ids) - num_closing, len(ids))):
            is_special[start:stop] = True
        return Tokens(
            positions=np.arange(len(ids))[:, None],
            ids=ids,
            token_types=np.repeat([0, 1], [len(firsts), len(seconds)]),
            is_special=is_special,
        )

    def _another(self, second: Payload, rng: np.random.Generator) -> Payload:
        """A sentence that differs from `second`, each of them equally likely."""
        own = self._place.get(second)
        if own is None:  # a record of validation
            return self._seconds[int(rng.integers(len(self._seconds)))]
        drawn = int(rng.integers(len(self._seconds) - 1))
        return self._seconds[drawn + (drawn >= own)]

    def wanted(self, batch: PackedBatch) -> Wanted:
        return Wanted({NEXT_SENTENCE: HeadRequest(), **super().wanted(batch).heads})

    def loss(self, outputs: Outputs, extra: nn.ModuleDict, batch: PackedBatch) -> LossOut:
        out = super().loss(outputs, extra, batch)
        wanted_S = batch.labels[NEXT_SENTENCE]
        logits_SC = outputs.heads[NEXT_SENTENCE].float()
        nats_S = F.cross_entropy(logits_SC, wanted_S, reduction="none")
        hits_S = (logits_SC.detach().argmax(-1) == wanted_S).float()
        count = torch.tensor(float(len(wanted_S)), device=nats_S.device)
        return LossOut(
            terms={**out.terms, NEXT_SENTENCE: Term(nats_S.sum(), count)},
            predictions={**out.predictions, NEXT_SENTENCE: torch.stack([hits_S, nats_S.detach()], dim=1)},
            targets={**out.targets, NEXT_SENTENCE: wanted_S},
        )

    def metrics(self) -> dict[str, Metric]:
        return {**super().metrics(), f"{NEXT_SENTENCE}/accuracy": MeanFigure(HITS)}


def _shorten(ids: np.ndarray, length: int, num_closing: int) -> np.ndarray:
    return np.concatenate([ids[: length - num_closing], ids[len(ids) - num_closing :]]) if length < len(ids) else ids
