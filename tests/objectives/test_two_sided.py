"""Objectives of encoder-decoders: what is read, what is written, and that the decoder sees no more."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from small_objectives import (
    BOTH,
    CLOSED,
    DECODER,
    ENCODER,
    FIRST_SENTINEL,
    MASK,
    NUM_SENTINELS,
    PAD,
    RESIDUES,
    SEP,
    TOKENIZER,
    VOCAB,
    bound,
    built,
    packed,
    prepared,
    random_records,
)
from torch.nn import functional as F

from labelled import ready
from meristem.data.pack import pack
from meristem.data.parts import RunData
from meristem.errors import ConfigError
from meristem.model.config import Learned
from meristem.model.model import SYMBOLS
from meristem.objectives.two_sided import Denoising, SequenceToSequence, SpanCorruption
from meristem.types import IGNORE, INPUT, SOURCE, Record
from model_runs import outputs_of


def make_spans(**options) -> SpanCorruption:
    return SpanCorruption(**options)


def make_translation(**options) -> SequenceToSequence:
    return SequenceToSequence(**options)


MAKE = {"spans": make_spans, "denoising": Denoising, "sequence to sequence": make_translation}


@pytest.mark.parametrize("tokenizer", [TOKENIZER, CLOSED], ids=["opened and closed", "closed"])
@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE.keys())
def test_the_decoder_reads_one_row_behind_what_it_writes(make, tokenizer, rng):
    records = random_records(rng)
    objective = bound(make(start_id=PAD), BOTH, records, tokenizer)
    sides = prepared(objective, records, tokenizer)
    assert len(sides) == 2 * len(records)
    for source, target in zip(sides[::2], sides[1::2]):
        assert source.side == SOURCE
        assert target.side != SOURCE
        assert not source.targets
        wanted = target.targets[SYMBOLS]
        assert (wanted != IGNORE).all()
        assert target.ids.tolist() == [PAD, *wanted[:-1]]
        assert wanted[-1] == source.ids[-1] == SEP
        assert 0 not in wanted  # the row before a payload is no part of a target
        assert source.ids[0] == 0 or tokenizer is CLOSED
        for side in (source, target):
            assert side.positions.ravel().tolist() == list(range(len(side)))


def test_span_corruption_can_be_undone_and_cuts_as_much_as_stated(rng):
    records = random_records(rng, 60, low=1, high=200)
    objective = bound(make_spans(), BOTH, records, CLOSED)
    sides = prepared(objective, records, CLOSED)
    sentinels = [FIRST_SENTINEL - i for i in range(NUM_SENTINELS)]
    assert VOCAB[sentinels[0]] == "<extra_id_0>"
    assert VOCAB[sentinels[-1]] == f"<extra_id_{NUM_SENTINELS - 1}>"
    for record, source, target in zip(records, sides[::2], sides[1::2]):
        written = target.targets[SYMBOLS][:-1].tolist()
        bounds = [i for i, symbol in enumerate(written) if symbol in sentinels]
        assert [written[i] for i in bounds] == sentinels[: len(bounds)]
        spans = [written[a + 1 : b] for a, b in itertools.pairwise(bounds)]
        assert bounds[-1] == len(written) - 1
        restored = []
        for symbol in source.ids[:-1].tolist():
            restored += spans[sentinels.index(symbol)] if symbol in sentinels else [symbol]
        assert "".join(VOCAB[symbol] for symbol in restored) == record.payload
        n = len(record.payload)
        num_cut = max(1, min(round(0.15 * n), n - 1))
        assert sum(map(len, spans)) == num_cut
        assert len(spans) == max(1, round(num_cut / 3))
        # planned to a row: the estimate rounds up, and the numbers of tokens and spans to the nearest
        assert len(source) + len(target) <= objective.lengths(np.array([n + 1]))[0] + 2


def test_sentinels_may_be_named_and_run_out_gracefully(rng):
    (record,) = random_records(rng, 1, low=29)
    objective = bound(make_spans(sentinels=["A", "C", "D"], rate=0.5, mean_span=1), BOTH, [record], CLOSED)
    assert [VOCAB[i] for i in objective._sentinel_ids] == ["A", "C", "D"]
    no_letters = replace(record, inputs={INPUT: record.payload.translate(str.maketrans("ACD", "EEE"))})
    source, _ = prepared(objective, [no_letters], CLOSED)
    kept = [VOCAB[i] for i in source.ids if VOCAB[i] in "ACD"]
    assert kept == ["A", "C"]  # the third ends the target


@pytest.mark.parametrize(
    ("sentinels", "vocab", "said"),
    [
        (None, VOCAB[:24], r"<extra_id_0>.*objective\.sentinels; got 0"),
        (None, VOCAB[:25], r"<extra_id_0>.*got 0"),  # the last one alone is not the first
        (["A"], VOCAB, "two sentinels or more.*got 1"),
        (["A", "?"], VOCAB, r"objective\.sentinels must be symbols of the vocabulary.*got \?"),
        (["A", "A"], VOCAB, "each once; got one twice"),
    ],
)
def test_a_vocabulary_without_sentinels_is_refused(sentinels, vocab, said):
    with pytest.raises(ConfigError, match=said):
        make_spans(sentinels=sentinels).bind(RunData(replace(CLOSED, vocab=vocab)))


def test_denoising_writes_the_payload_and_reads_it_damaged(rng):
    records = random_records(rng, 30, low=10)
    objective = bound(Denoising(rate=0.3, delete_rate=0.2), BOTH, records)
    sides = prepared(objective, records)
    damaged = 0
    for record, source, target in zip(records, sides[::2], sides[1::2]):
        assert "".join(VOCAB[i] for i in target.targets[SYMBOLS][:-1]) == record.payload
        read = [VOCAB[i] for i in source.ids[1:-1] if i != MASK]
        rest = iter(record.payload)
        assert all(symbol in rest for symbol in read)  # in order
        assert len(read) <= 0.8 * len(record.payload) + 1
        damaged += MASK in source.ids
        assert len(source) + len(target) <= objective.lengths(np.array([len(record.payload) + 2]))[0]
    assert damaged == len(records)
    whole = bound(Denoising(rate=0, delete_rate=0.5), BOTH, records)
    assert not any(MASK in side.ids for side in prepared(whole, records))


def test_sequence_to_sequence_writes_the_target(rng):
    records = random_records(rng)
    objective = bound(make_translation(), BOTH, records)
    sides = prepared(objective, records)
    for record, source, target in zip(records, sides[::2], sides[1::2]):
        assert TOKENIZER.decode(source) == record.payload
        assert "".join(VOCAB[i] for i in target.targets[SYMBOLS][:-1]) == record.labels["other"]
    whole = [record.payload + record.labels["other"] for record in records]
    planned = objective.lengths(np.array([len(text) + 4 for text in whole]))
    assert planned.sum() - sum(map(len, sides)) == len(records)  # the start symbol stands for what opens a target


def test_targets_end_where_they_must(rng):
    (record,) = random_records(rng, 1, low=25)
    short = bound(make_translation(max_target_tokens=7), BOTH, [record])
    placed = bound(make_translation(), replace(BOTH, position=Learned(max_positions=16)), [record])
    for objective, length in ((short, 7), (placed, 16)):
        _, target = prepared(objective, [record])
        assert "".join(VOCAB[i] for i in target.targets[SYMBOLS]) == record.labels["other"][:length]


def test_loss_is_that_of_each_pair_alone(rng):
    records = random_records(rng)
    objective = bound(make_translation(), BOTH, records)
    model = built(objective, BOTH)
    out = objective.loss_of(model, objective.build(BOTH), packed(objective, records))
    slow = torch.zeros(())
    for record in records:
        batch = pack(prepared(objective, [record]), [0, 0])
        logits = outputs_of(model, batch)
        slow = slow + F.cross_entropy(logits, batch.targets[SYMBOLS], ignore_index=IGNORE, reduction="sum")
    # fp32, a sum of some hundred losses
    torch.testing.assert_close(out.terms[SYMBOLS].sum, slow, rtol=1e-5, atol=1e-4)


def test_a_later_target_never_changes_an_earlier_loss_but_a_source_does(rng):
    (record,) = random_records(rng, 1, low=20)
    objective = bound(make_translation(), BOTH, [record])
    model = built(objective, BOTH)

    def losses(model, **changes) -> torch.Tensor:
        batch = pack(prepared(objective, [replace(record, **changes)]), [0, 0])
        return F.cross_entropy(outputs_of(model, batch), batch.targets[SYMBOLS], reduction="none")

    def with_other(text: str, at: int) -> str:
        return text[:at] + RESIDUES[RESIDUES.index(text[at]) - 1] + text[at + 1 :]

    before = losses(model)
    target = record.labels["other"]
    for at in range(len(target)):
        after = losses(model, labels={"other": with_other(target, at)})
        torch.testing.assert_close(after[:at], before[:at], rtol=1e-5, atol=1e-5)  # fp32 in another order
        assert abs(after[at] - before[at]) > 1e-4
    assert (losses(model, inputs={INPUT: with_other(record.payload, 9)}) - before).abs().max() > 1e-4
    # the mutant: a decoder that sees the future
    leaky = built(objective, replace(BOTH, layers=()))
    leaky.load_state_dict(model.state_dict())
    late = {"other": with_other(target, len(target) - 1)}
    assert (losses(leaky, labels=late) - losses(leaky))[: len(target) - 2].abs().max() > 1e-4


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE.keys())
def test_a_model_of_one_stack_or_with_a_decoder_that_sees_the_future_is_refused(make):
    for config in (ENCODER, DECODER):
        with pytest.raises(ConfigError, match="needs an encoder-decoder"):
            make().bind_model(config)
    with pytest.raises(ConfigError, match=r"got Full in layer 2 of both stacks; .*start: 2.*architecture\.layers"):
        make().bind_model(replace(BOTH, layers=()))


@pytest.mark.parametrize(
    ("make", "options", "said"),
    [
        (SpanCorruption, {"rate": 0}, "rate must be above 0"),
        (SpanCorruption, {"mean_span": 0.5}, "mean_span must be 1"),
        (Denoising, {"rate": 0}, "must be above 0"),
        (Denoising, {"rate": 1.5}, "rate must be 0 or more and at most 1"),
        (Denoising, {"delete_rate": 1}, "something must be left"),
        (Denoising, {"mean_span": 0}, "mean_span must be above 0"),
        (make_translation, {"max_target_tokens": 0}, "max_target_tokens must be 1 or more"),
    ],
)
def test_impossible_options_are_refused(make, options, said):
    with pytest.raises(ConfigError, match=said):
        make(**options)


def test_start_symbol_is_the_tokenizers_padding_unless_named():
    class Padded(type(TOKENIZER)):
        pad_id = PAD

    padded = Padded(**{name: getattr(TOKENIZER, name) for name in ("vocab", "prefix", "suffix", "mask", "random")})
    record = Record.of("a", "MKV")
    for tokenizer, start_id, first in ((TOKENIZER, None, 0), (padded, None, PAD), (padded, 5, 5)):
        objective = bound(Denoising(start_id=start_id), BOTH, [record], tokenizer)
        assert prepared(objective, [record], tokenizer)[1].ids[0] == first
    with pytest.raises(ConfigError, match=r"start_id must be the number of a symbol, 0 to \d+; got 999"):
        bound(Denoising(start_id=999), BOTH, [record])


def test_patches_are_refused_rather_than_lost(rng):
    (record,) = random_records(rng, 1)
    objective = bound(Denoising(), BOTH, [record])
    patches = replace(TOKENIZER.encode("MKV"), features=np.zeros((5, 4), np.float32))
    with pytest.raises(ConfigError, match="symbols; got patches"):
        objective.prepare(record, ready(patches), rng)
