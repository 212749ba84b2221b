"""How likely a model takes a sequence to be, in the way that its training defines.

| model | log-likelihood of a sequence x of n tokens |
| --- | --- |
| bidirectional, with a mask symbol | sum of log p(x_t given all other tokens): the pseudo-log-likelihood |
| causal decoder | sum of log p(x_t given x_1 ... x_(t-1)): the log-probability |
| prefix language model | the same, over the tokens behind the prefix |
| encoder-decoder | sum of log p(y_t given y_1 ... y_(t-1) and the source): the log-probability of the target |

Tokens are those of the payload. Special tokens are read and not scored, unless `closing` asks for those behind the
payload, whose probability says that a sequence ends there.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch

from meristem.data.pack import pack
from meristem.data.tokenizer import Tokenizer
from meristem.errors import ConfigError
from meristem.model.config import BlockSparse, sees_the_future
from meristem.model.model import SYMBOLS, Model
from meristem.model.patterns import has_prefix, parts_of
from meristem.model.transformer import Decoder, EncoderDecoder
from meristem.scoring.likelihood_options import LikelihoodOptions
from meristem.scoring.running import RunningModel
from meristem.scoring.scorer import Scorer
from meristem.types import IGNORE, SOURCE, TokenColumn, Tokens

TYPICAL_LENGTH = 256
"""Tokens of a record, about: each is run as often where every token is hidden in turn."""

Kind = Literal["masked", "causal", "prefix", "encoder-decoder"]


def kind_of(model: Model, tokenizer: Tokenizer) -> Kind:
    """Which likelihood a model has. What its tokens see decides, not how it was trained.

    Raises:
        ConfigError: the model has none; the message says why.
    """
    config = model.config
    if tokenizer.num_features or config.embedding.patch_features:
        raise ConfigError("a likelihood needs a model of symbols; this one reads patches, which have no probabilities")
    if SYMBOLS not in model.heads:
        raise ConfigError(
            "a likelihood needs a model that predicts symbols; this one has no such head (meristem inspect shows heads)"
        )
    first = config.num_layers if config.num_decoder_layers else 0
    patterns = [config.layer(layer).attention.pattern for layer in range(first, config.total_layers)]
    if isinstance(model.trunk, EncoderDecoder):
        if any(map(sees_the_future, patterns)):
            raise ConfigError(
                "a likelihood needs a decoder whose tokens do not see those behind them; some layers of this "
                "encoder-decoder's second stack do"
            )
    elif not isinstance(model.trunk, Decoder):
        if tokenizer.mask_id is None:
            raise ConfigError(
                "a likelihood of a bidirectional model needs a mask symbol; the tokenizer of this one has none"
            )
        return "masked"
    if any(isinstance(part, BlockSparse) for pattern in patterns for part in parts_of(pattern)):
        raise ConfigError(
            "a likelihood from left to right needs attention that stays as a sequence grows; the random blocks of "
            "BlockSparse are drawn anew for each length"
        )
    if isinstance(model.trunk, EncoderDecoder):
        return "encoder-decoder"
    return "prefix" if any(map(has_prefix, patterns)) else "causal"


@dataclass(frozen=True, eq=False)
class ScoredRows:
    """What a model reads of each record, and the symbol that each row is to predict.

    Attributes:
        column: the sequences; those of the decoder where there are two sides.
        targets: `[sum of n]` id of the symbol that each row predicts; `IGNORE` where a row is not scored.
        mask_id: hides each scored token in turn, in a copy of its sequence; None to run each sequence once.
        prefix_lengths: `[N]` first tokens of each sequence that all its tokens see; None without such a pattern.
    """

    column: TokenColumn
    targets: np.ndarray
    mask_id: int | None = None
    prefix_lengths: np.ndarray | None = None

    @property
    def num_scored(self) -> np.ndarray:
        """`[N]` rows of each record that are scored."""
        counts = np.concatenate([[0], np.cumsum(self.targets != IGNORE)])
        return counts[self.column.offsets[1:]] - counts[self.column.offsets[:-1]]

    @property
    def lengths(self) -> np.ndarray:
        """`[N]` tokens of one run of each record, on both sides."""
        source = self.column.source
        return self.column.lengths + (0 if source is None else source.lengths)

    @property
    def work(self) -> np.ndarray:
        """`[N]` tokens that scoring each record runs in all."""
        return self.lengths * (np.minimum(self.num_scored, 1) if self.mask_id is None else self.num_scored)


def scored_rows(running: RunningModel, column: TokenColumn, options: LikelihoodOptions) -> ScoredRows:
    """What a model reads of a column, and what it is asked for; raises ConfigError as `score_column` does."""
    kind, tokenizer = kind_of(running.model, running.tokenizer), running.tokenizer
    _check_options(kind, options)
    if (kind == "encoder-decoder") != (column.source is not None):
        raise ConfigError(
            "the likelihood of an encoder-decoder is that of a target given a source, two inputs of a record; got one"
            if column.source is None
            else "only an encoder-decoder reads a source beside the sequence that is scored; got two inputs"
        )
    firsts, stops = _payload_bounds(column)
    is_scored = np.ones(len(column.ids), bool) if column.is_special is None else ~column.is_special
    if options.closing:
        closing = _ranges(stops, column.offsets[1:])
        if not len(closing):
            raise ConfigError("closing needs special tokens behind the payload, and this tokenizer puts none there")
        is_scored[closing] = True
    if kind == "encoder-decoder":
        # the decoder reads the start symbol, which stands for the special tokens before a payload, and then each
        # target, one token behind what it predicts
        start_id = (tokenizer.pad_id or 0) if options.start_id is None else options.start_id
        if not 0 <= start_id < len(tokenizer.vocab):
            raise ConfigError(f"start_id must be the id of a symbol, 0 to {len(tokenizer.vocab) - 1}; got {start_id}")
        stops = column.offsets[1:] if options.closing else stops
        rows = _ranges(firsts, stops)
        ids = column.ids[rows].astype(np.int64)
        offsets = np.concatenate([[0], np.cumsum(stops - firsts)])
        read = np.concatenate([[start_id], ids[:-1]]) if len(ids) else ids
        # only sequences that are not empty begin somewhere
        read[offsets[:-1][stops > firsts]] = start_id
        written = TokenColumn(ids=read, offsets=offsets, source=column.source)
        return ScoredRows(written, np.where(is_scored[rows], ids, IGNORE))
    starts, shift = column.offsets[:-1], 0 if kind == "masked" else 1
    firsts = firsts + (options.prefix_tokens or 0)
    # the first token of a sequence has nothing before it that could predict it
    places = _ranges(np.maximum(firsts, starts + shift), column.offsets[1:])
    places = places[is_scored[places]]
    targets = np.full(len(column.ids), IGNORE, np.int64)
    targets[places - shift] = column.ids[places]
    mask_id = tokenizer.mask_id if kind == "masked" and not options.one_pass else None
    return ScoredRows(column, targets, mask_id, firsts - starts if kind == "prefix" else None)


def _payload_bounds(column: TokenColumn) -> tuple[np.ndarray, np.ndarray]:
    """`[N]` first row of each payload and the row behind its last; both are the end of a sequence that has none."""
    if column.is_special is None:
        return column.offsets[:-1], column.offsets[1:]
    rows = np.append(np.flatnonzero(~column.is_special), len(column.ids))
    bounds = np.searchsorted(rows, column.offsets)
    is_empty, ends = bounds[1:] == bounds[:-1], column.offsets[1:]
    return np.where(is_empty, ends, rows[bounds[:-1]]), np.where(is_empty, ends, rows[bounds[1:] - 1] + 1)


def score_column(running: RunningModel, column: TokenColumn, options: LikelihoodOptions) -> Iterator[dict[str, Any]]:
    """The likelihood of each record of a column, as a row of a table with the columns of `schema_of`.

    Args:
        column: the sequences to score; for encoder-decoders those that the decoder writes, each with its `source`.

    Raises:
        ConfigError: the model has no likelihood, or not with these options or sides.
    """
    names = schema_of(running, options).names
    lengths = column.payload_lengths
    scores = token_log_likelihoods(running, scored_rows(running, column, options))
    for length, values in zip(lengths, scores, strict=True):
        with np.errstate(over="ignore"):  # infinity is the right answer then
            perplexity = float(np.exp(-values.mean())) if len(values) else None
        yield dict(zip(names, (int(length), len(values), float(values.sum()), perplexity), strict=True))


def schema_of(running: RunningModel, options: LikelihoodOptions) -> pa.Schema:
    """Columns of the table.

    `length`, the tokens of the payload; `num_scored`, the tokens that have a log-probability; `log_likelihood`, their
    sum in nats; and `perplexity`, or `pseudo_perplexity` of a bidirectional model: exp of minus their mean, missing
    where there are none.
    """
    is_pseudo = kind_of(running.model, running.tokenizer) == "masked"
    return pa.schema(
        {
            "length": pa.int64(),
            "num_scored": pa.int64(),
            "log_likelihood": pa.float64(),
            "pseudo_perplexity" if is_pseudo else "perplexity": pa.float64(),
        }
    )


def describe(running: RunningModel, options: LikelihoodOptions) -> str:
    """What the values are, in one line; raises ConfigError as `score_column` does."""
    kind = kind_of(running.model, running.tokenizer)
    _check_options(kind, options)
    means = {
        "masked": "each token given all others"
        if not options.one_pass
        else "each token given the whole record, itself included: an approximation",
        "causal": "each token given those before it",
        "prefix": "each token behind the prefix given those before it",
        "encoder-decoder": "each token of the target given those before it and the source",
    }
    return f"log_likelihood in nats, {means[kind]}"


def token_log_likelihoods(running: RunningModel, scored: ScoredRows) -> list[np.ndarray]:
    """Log-probability (nats) of each scored token, one array a record, in the order of the records.

    On a CPU in fp32 the values are the same, bit for bit, whatever the token budget and the other records.
    """
    counts = scored.num_scored
    ends = np.cumsum(counts)
    # runs of single sequences: the record that each runs, the row of the column that is hidden in it, and which of all
    # scores, those of all records end to end, it gives
    if scored.mask_id is None:  # a record of which nothing is scored is not run
        records = np.flatnonzero(counts)
        hidden, firsts, stops = np.full(len(records), -1), (ends - counts)[records], ends[records]
    else:
        hidden = np.flatnonzero(scored.targets != IGNORE)
        records = np.repeat(np.arange(len(counts)), counts)
        firsts, stops = np.arange(len(hidden)), np.arange(len(hidden)) + 1
    scores = np.empty(int(counts.sum()))
    lengths = scored.lengths[records]

    def run(numbers: np.ndarray) -> None:
        sequences = [side for number in numbers for side in _sides(scored, records[number], hidden[number])]
        batch = pack(sequences, np.repeat(numbers, len(sequences) // len(numbers)).tolist())
        targets = batch.targets[SYMBOLS]
        rows = torch.nonzero(targets != IGNORE).squeeze(1)
        done = np.array(batch.records)
        places = _ranges(firsts[done], stops[done])
        scores[places] = running.symbol_log_probabilities(batch, rows, targets[rows]).numpy()
        running.advance(int(lengths[numbers].sum()))

    for _ in running.budget.run(lengths, run):
        pass
    return np.split(scores, ends[:-1])


def _sides(scored: ScoredRows, record: int, hidden: int) -> Iterator[Tokens]:
    """The tokens of one forward pass, of which the row `hidden` of the column is masked: a source, and the sequence."""
    source = scored.column.source
    if source is not None:
        yield _tokens(_sequence(source.ids, source, record), side=SOURCE)
    ids = _sequence(scored.column.ids, scored.column, record)
    targets = _sequence(scored.targets, scored.column, record)
    if hidden >= 0:
        place = hidden - scored.column.offsets[record]
        wanted = targets[place]
        targets = np.full_like(targets, IGNORE)
        ids[place], targets[place] = scored.mask_id, wanted
    prefix_length = 0 if scored.prefix_lengths is None else int(scored.prefix_lengths[record])
    yield _tokens(ids, targets={SYMBOLS: targets}, prefix_length=prefix_length)


def _sequence(values: np.ndarray, column: TokenColumn, record: int) -> np.ndarray:
    """A copy of one record's share of a column's values."""
    return values[column.offsets[record] : column.offsets[record + 1]].astype(np.int64)


def _tokens(ids: np.ndarray, **fields: Any) -> Tokens:
    return Tokens(positions=np.arange(len(ids))[:, None], ids=ids, **fields)


def _ranges(starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
    """Every number of every range, end to end; a range that ends before it starts is empty."""
    counts = np.maximum(stops - starts, 0).astype(np.int64)
    before = np.cumsum(counts) - counts
    return np.repeat(starts - before, counts) + np.arange(counts.sum())


def _check_options(kind: Kind, options: LikelihoodOptions) -> None:
    if options.one_pass and kind != "masked":
        raise ConfigError(f"one_pass has no effect on a model of kind {kind}, which is run once anyway; leave it out")
    if options.closing and kind == "masked":
        raise ConfigError("closing has no effect on a bidirectional model, which is told where a sequence ends")
    if options.start_id is not None and kind != "encoder-decoder":
        raise ConfigError(f"start_id has no effect on a model of kind {kind}; leave it out")
    if kind == "prefix":
        if options.prefix_tokens is None or options.prefix_tokens < 0:
            raise ConfigError(
                "a prefix language model predicts what follows a prefix; prefix_tokens must say how many tokens of "
                f"each record the prefix has, 0 or more; got {options.prefix_tokens}"
            )
    elif options.prefix_tokens is not None:
        raise ConfigError(f"prefix_tokens has no effect on a model of kind {kind}; leave it out")


def _num_runs(running: RunningModel, options: LikelihoodOptions) -> int:
    is_exact = kind_of(running.model, running.tokenizer) == "masked" and not options.one_pass
    return TYPICAL_LENGTH if is_exact else 1


LIKELIHOOD = Scorer(
    help="how likely each record is, in the way that suits the model: a row of a table",
    options=LikelihoodOptions,
    describe=describe,
    schema=schema_of,
    score=score_column,
    work=lambda running, column, options: scored_rows(running, column, options).work,
    num_runs=_num_runs,
    reads_two_sides=True,
)
