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

from meristem.data.order import plan_in_order
from meristem.data.pack import pack
from meristem.data.tokenizer import Tokenizer
from meristem.errors import ConfigError
from meristem.model.config import BlockSparse, sees_the_future
from meristem.model.model import SYMBOLS, Model
from meristem.model.patterns import has_prefix, parts_of
from meristem.model.transformer import Decoder, EncoderDecoder
from meristem.scoring.running import RunningModel
from meristem.scoring.scorer import Scorer, option
from meristem.types import IGNORE, SOURCE, TokenColumn, Tokens

TYPICAL_LENGTH = 256
"""Tokens of a record, about: each is run as often where every token is hidden in turn."""

Kind = Literal["masked", "causal", "prefix", "encoder-decoder"]


@dataclass(frozen=True, kw_only=True)
class LikelihoodOptions:
    """What is asked for; each option is for some kinds of model and refused for others.

    Attributes:
        one_pass: take the probability of each token given the whole sequence, itself included (the wild-type marginal
            of Meier 2021, doi 10.1101/2021.07.09.450648). It approximates the pseudo-log-likelihood, which runs a
            sequence of n tokens n times. (The one-pass estimate of Kantroo 2024, arXiv 2407.07265, adds a regression
            that is trained for it, and is not this.)
        closing: score the special tokens behind the payload too.
        prefix_tokens: payload tokens of the prefix, which are read and not scored.
        start_id: the symbol that the decoder reads first; None for the padding symbol, or 0 where there is none, as in
            training.
    """

    one_pass: bool = option(False, "bidirectional models: run each record once, without masks (wild-type marginal)")
    closing: bool = option(False, "causal models and encoder-decoders: score the special tokens behind a record too")
    prefix_tokens: int | None = option(None, "prefix language models: tokens of the prefix, which are not scored")
    start_id: int | None = option(None, "encoder-decoders: id of the symbol that the decoder reads first")


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
class Reading:
    """What a model reads of each record, and the symbol that each row is to predict.

    Attributes:
        column: the sequences; those of the decoder where there are two sides.
        targets: `[sum of n]` id of the symbol that each row predicts; `IGNORE` where a row is not scored.
        mask_id: hides each scored token in turn, in a copy of its sequence; None to run each sequence once.
        prefix_length: first tokens of each sequence that all its tokens see, under a pattern that has a prefix.
        source: what the encoder reads of each record.
    """

    column: TokenColumn
    targets: np.ndarray
    mask_id: int | None = None
    prefix_length: int = 0
    source: TokenColumn | None = None

    @property
    def num_scored(self) -> np.ndarray:
        """`[N]` rows of each record that are scored."""
        counts = np.concatenate([[0], np.cumsum(self.targets != IGNORE)])
        return counts[self.column.offsets[1:]] - counts[self.column.offsets[:-1]]

    @property
    def lengths(self) -> np.ndarray:
        """`[N]` tokens of one run of each record, on both sides."""
        return self.column.lengths + (0 if self.source is None else self.source.lengths)

    @property
    def work(self) -> np.ndarray:
        """`[N]` tokens that scoring each record runs in all."""
        return self.lengths * (np.minimum(self.num_scored, 1) if self.mask_id is None else self.num_scored)


def read(
    running: RunningModel, column: TokenColumn, options: LikelihoodOptions, sources: TokenColumn | None = None
) -> Reading:
    """What a model reads of a column, and what it is asked for; arguments as those of `score_column`."""
    kind = kind_of(running.model, running.tokenizer)
    if (kind == "encoder-decoder") != (sources is not None):
        raise ConfigError(
            "the likelihood of an encoder-decoder is that of a target given a source, two inputs of a record; "
            "got one (in Python, score_column of this module takes both)"
            if sources is None
            else "only an encoder-decoder reads a source beside the sequence that is scored; got two inputs"
        )
    if sources is not None:
        return read_pairs(running.tokenizer, sources, column, options)
    return read_column(kind, running.tokenizer, column, options)


def read_column(kind: Kind, tokenizer: Tokenizer, column: TokenColumn, options: LikelihoodOptions) -> Reading:
    """What a model of one stack reads of a column, and what it is asked for.

    Args:
        kind: of the model; an encoder-decoder takes `read_pairs`.

    Raises:
        ConfigError: an option that has no effect on this kind of model, or one that it needs and did not get.
    """
    _check_options(kind, tokenizer, options)
    assert kind != "encoder-decoder", "an encoder-decoder needs a source and a target"
    before, behind = tokenizer.num_special
    starts, stops = column.offsets[:-1], column.offsets[1:] - (0 if options.closing else behind)
    prefix_length = before + (options.prefix_tokens or 0)
    targets = np.full(len(column.ids), IGNORE, np.int64)
    # the first token of a sequence has nothing before it that could predict it
    shift, first = (0, before) if kind == "masked" else (1, max(prefix_length, 1))
    places = _ranges(starts + first, np.maximum(stops, starts + first))
    targets[places - shift] = column.ids[places]
    mask_id = tokenizer.mask_id if kind == "masked" and not options.one_pass else None
    return Reading(column, targets, mask_id, prefix_length if kind == "prefix" else 0)


def read_pairs(tokenizer: Tokenizer, sources: TokenColumn, targets: TokenColumn, options: LikelihoodOptions) -> Reading:
    """What an encoder-decoder reads of pairs: the source as it is, and of the target one token behind what it predicts.

    The decoder reads the start symbol first, which stands for the special tokens before a payload.

    Args:
        sources, targets: `N` sequences each, with the tokenizer's special tokens.

    Raises:
        ConfigError: an option that has no effect on this kind of model, or no symbol to start from.
    """
    _check_options("encoder-decoder", tokenizer, options)
    assert len(sources) == len(targets)
    start_id = (tokenizer.pad_id or 0) if options.start_id is None else options.start_id
    if not 0 <= start_id < len(tokenizer.vocab):
        raise ConfigError(f"start_id must be the id of a symbol, 0 to {len(tokenizer.vocab) - 1}; got {start_id}")
    before, behind = tokenizer.num_special
    stops = targets.offsets[1:] - (0 if options.closing else behind)
    starts = np.minimum(targets.offsets[:-1] + before, stops)
    wanted = targets.ids[_ranges(starts, stops)].astype(np.int64)
    offsets = np.concatenate([[0], np.cumsum(stops - starts)])
    read = np.concatenate([[start_id], wanted[:-1]]) if len(wanted) else wanted
    # only sequences that are not empty begin somewhere
    read[offsets[:-1][stops > starts]] = start_id
    return Reading(TokenColumn(ids=read, offsets=offsets), wanted, source=sources)


def score_column(
    running: RunningModel, column: TokenColumn, options: LikelihoodOptions, sources: TokenColumn | None = None
) -> Iterator[dict[str, Any]]:
    """The likelihood of each record of a column, as a row of a table with the columns of `schema_of`.

    Args:
        column: the sequences to score.
        sources: for encoder-decoders: what each sequence is the target of.

    Raises:
        ConfigError: the model has no likelihood, or not with these options or sides.
    """
    names = schema_of(running, options).names
    lengths = column.payload_lengths
    scores = token_log_likelihoods(running, read(running, column, options, sources))
    for length, values in zip(lengths, scores, strict=True):
        perplexity = _exp(-values.mean()) if len(values) else None
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
    """What the values are, in one line.

    Raises:
        ConfigError: as `score_column`.
    """
    kind = kind_of(running.model, running.tokenizer)
    _check_options(kind, running.tokenizer, options)
    means = {
        "masked": "each token given all others"
        if not options.one_pass
        else "each token given the whole record, itself included: an approximation",
        "causal": "each token given those before it",
        "prefix": "each token behind the prefix given those before it",
        "encoder-decoder": "each token of the target given those before it and the source",
    }
    return f"log_likelihood in nats, {means[kind]}"


def _exp(value: float) -> float:
    with np.errstate(over="ignore"):  # infinity is the right answer then
        return float(np.exp(value))


def token_log_likelihoods(running: RunningModel, reading: Reading) -> list[np.ndarray]:
    """Log-probability (nats) of each scored token, one array a record, in the order of the records.

    On a CPU in fp32 the values are the same, bit for bit, whatever the token budget and the other records.
    """
    passes = _Passes.of(reading)
    scores = np.empty(int(reading.num_scored.sum()))
    plan = plan_in_order(reading.lengths[passes.records], running.tokens_per_batch)
    for index in reversed(range(len(plan))):  # longest first: what does not fit in memory is known at once
        numbers = plan[index]
        sequences = [side for number in numbers for side in passes.sides(reading, number)]
        batch = pack(sequences, np.repeat(numbers, len(sequences) // len(numbers)).tolist())
        targets = batch.targets[SYMBOLS]
        rows = torch.nonzero(targets != IGNORE).squeeze(1)
        done = np.array(batch.records)
        places = _ranges(passes.first_scores[done], passes.first_scores[done] + passes.num_scored[done])
        scores[places] = running.symbol_log_probabilities(batch, rows, targets[rows]).numpy()
        running.advance(int(reading.lengths[passes.records[numbers]].sum()))
    return np.split(scores, np.cumsum(reading.num_scored)[:-1])


@dataclass(frozen=True, eq=False)
class _Passes:
    """The runs of single sequences that scoring takes.

    Attributes:
        records: `[R]` record that each runs.
        hidden: `[R]` row of the column that is masked in it; -1 for none.
        first_scores, num_scored: `[R]` which of all scores, those of all records end to end, it gives.
    """

    records: np.ndarray
    hidden: np.ndarray
    first_scores: np.ndarray
    num_scored: np.ndarray

    @classmethod
    def of(cls, reading: Reading) -> "_Passes":
        counts = reading.num_scored
        if reading.mask_id is None:  # a record of which nothing is scored is not run
            records = np.flatnonzero(counts)
            ends = np.cumsum(counts)[records]
            return cls(records, np.full(len(records), -1), ends - counts[records], counts[records])
        hidden = np.flatnonzero(reading.targets != IGNORE)
        records = np.repeat(np.arange(len(counts)), counts)
        return cls(records, hidden, np.arange(len(hidden)), np.ones(len(hidden), np.int64))

    def sides(self, reading: Reading, number: int) -> Iterator[Tokens]:
        """What one run reads: the source where there is one, and the sequence with its targets."""
        record, hidden = self.records[number], self.hidden[number]
        if reading.source is not None:
            yield _tokens(_sequence(reading.source.ids, reading.source, record), side=SOURCE)
        ids = _sequence(reading.column.ids, reading.column, record)
        targets = _sequence(reading.targets, reading.column, record)
        if hidden >= 0:
            place = hidden - reading.column.offsets[record]
            wanted = targets[place]
            targets = np.full_like(targets, IGNORE)
            ids[place], targets[place] = reading.mask_id, wanted
        yield _tokens(ids, targets={SYMBOLS: targets}, prefix_length=reading.prefix_length)


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


def _check_options(kind: Kind, tokenizer: Tokenizer, options: LikelihoodOptions) -> None:
    if options.one_pass and kind != "masked":
        raise ConfigError(f"one_pass has no effect on a model of kind {kind}, which is run once anyway; leave it out")
    if options.closing and kind == "masked":
        raise ConfigError("closing has no effect on a bidirectional model, which is told where a sequence ends")
    if options.closing and not tokenizer.num_special[1]:
        raise ConfigError("closing needs special tokens behind the payload, and this tokenizer puts none there")
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
    work=lambda running, column, options: read(running, column, options).work,
    num_runs=_num_runs,
)
