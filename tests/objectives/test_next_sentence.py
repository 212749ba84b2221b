"""Next sentence beside masked symbols: which second sentence, where it lies, and what the class is read from."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from small_objectives import (
    CLS,
    MASK,
    PAIRS,
    SEP,
    TOKENIZER,
    VOCAB,
    bound,
    built,
    packed,
    prepared,
    random_records,
    suited,
)
from torch.nn import functional as F

from labelled import encoded, ready
from meristem.errors import ConfigError, DataError
from meristem.model.heads import readouts_of
from meristem.model.model import SYMBOLS
from meristem.objectives.next_sentence import NEXT_SENTENCE, NextSentence
from meristem.types import IGNORE, Record
from model_runs import outputs_of

WORDS = ("ACD", "EFG", "HIK", "LMN", "PQR", "STV")
"""Second sentences of the same length, no two alike."""


def records_of(words, first="WYWYWY") -> list[Record]:
    return [Record.of(str(i), first, {"other": word}, f"x.csv:{i + 2}") for i, word in enumerate(words)]


def shown(tokens) -> str:
    """The symbols before masking."""
    ids = np.where(tokens.targets[SYMBOLS] == IGNORE, tokens.ids, tokens.targets[SYMBOLS])
    return "".join(VOCAB[i] for i in ids)


def test_a_record_becomes_two_closed_sentences_of_two_types(rng):
    records = random_records(rng, 30)
    objective = bound(NextSentence(rate=0.5), PAIRS, records)
    others = {record.labels["other"] for record in records}
    for record, tokens in zip(records, prepared(objective, records)):
        second = shown(tokens)[len(f"<cls>{record.payload}<sep>") : -len("<sep>")]
        assert shown(tokens) == f"<cls>{record.payload}<sep>{second}<sep>"
        is_next = second == record.labels["other"]
        assert int(tokens.labels[NEXT_SENTENCE]) == (0 if is_next else 1)
        assert second in others
        assert tokens.token_types.tolist() == [0] * (len(record.payload) + 2) + [1] * (len(second) + 1)
        whole = np.where(tokens.targets[SYMBOLS] == IGNORE, tokens.ids, tokens.targets[SYMBOLS])
        assert tokens.is_special.tolist() == np.isin(whole, [CLS, SEP]).tolist()
        targets = tokens.targets[SYMBOLS]
        assert not set(targets) & {CLS, SEP, MASK}
        assert (targets[1:-1] != IGNORE).any()
    assert readouts_of(objective.heads)[0].classes == ("next", "random")
    assert readouts_of(objective.heads)[0].pool is None


def test_half_of_the_seconds_are_another_records_each_equally_likely(rng):
    records = records_of([*WORDS, WORDS[0]])  # one stands twice: the same words are never a random second
    objective = bound(NextSentence(), PAIRS, records)
    record = suited(objective, records[0])
    encode = encoded(TOKENIZER, record)
    repeats = 4_000
    drawn = [objective.prepare(record, encode, rng)[0] for _ in range(repeats)]
    seconds = [shown(one)[len("<cls>WYWYWY<sep>") : -len("<sep>")] for one in drawn]
    labels = np.array([int(one.labels[NEXT_SENTENCE]) for one in drawn])
    assert [second != WORDS[0] for second in seconds] == [label == 1 for label in labels]
    # 5 standard deviations of a binomial
    assert abs(labels.mean() - 0.5) < 5 * np.sqrt(0.25 / repeats)
    counts = np.array([seconds.count(word) for word in WORDS[1:]])
    assert (np.abs(counts - repeats / 10) < 5 * np.sqrt(repeats * 0.1 * 0.9)).all()
    for frac, label in ((0.0, 0), (1.0, 1)):
        objective = bound(NextSentence(random_second_frac=frac), PAIRS, records)
        assert {int(one.labels[NEXT_SENTENCE]) for one in prepared(objective, records)} == {label}


def test_a_record_of_validation_may_have_a_second_that_training_has_not(rng):
    objective = bound(NextSentence(random_second_frac=1.0), PAIRS, records_of(WORDS))
    record = Record("v", {"first": "WY", "second": "AAAA"}, source="v:1")
    for _ in range(20):
        (tokens,) = objective.prepare(record, encoded(TOKENIZER, record), rng)
        assert shown(tokens).split("<sep>")[1] in WORDS


def test_a_pair_is_cut_to_what_the_model_can_place(rng):
    limit = PAIRS.max_length
    for first, second in ((10, 100), (100, 10), (80, 90), (31, 30), (30, 31)):
        record = Record.of("a", "A" * first, {"other": "C" * second}, "x:1")
        other = Record.of("b", "A", {"other": "D"}, "x:2")
        objective = bound(NextSentence(random_second_frac=0), PAIRS, [record, other])
        # the loader has cropped the payload to what the model can place already
        tokens = [TOKENIZER.encode(payload) for payload in ("A" * min(first, limit - 2), "C" * second)]
        (pair,) = objective.prepare(suited(objective, record), ready(*tokens, inputs=objective.inputs), rng)
        a, b = shown(pair).removeprefix("<cls>").removesuffix("<sep>").split("<sep>")
        assert len(pair) == min(limit, first + second + 3)
        assert set(a) == {"A"}
        assert set(b) == {"C"}
        # the longer one pays
        assert len(a) == first or len(a) >= len(b) - 2
        assert len(b) == second or len(b) >= len(a) - 2


def test_loss_is_masked_symbols_and_the_class_from_the_models_pool(rng):
    records = random_records(rng)
    objective = bound(NextSentence(), PAIRS, records)
    model = built(objective, PAIRS)
    batch = packed(objective, records)
    out = objective.loss_of(model, objective.build(PAIRS), batch)
    final = model.trunk(batch).final
    first_rows = final[list(batch.layout.starts[:-1])]
    pooled = torch.tanh(first_rows @ model.pool.dense.weight.T + model.pool.dense.bias)
    head = model.heads[NEXT_SENTENCE].out
    logits = pooled @ head.weight.T + head.bias
    wanted = batch.labels[NEXT_SENTENCE]
    torch.testing.assert_close(out.terms[NEXT_SENTENCE].sum, F.cross_entropy(logits, wanted, reduction="sum"))
    symbols = F.cross_entropy(outputs_of(model, batch), batch.targets[SYMBOLS], reduction="sum")
    torch.testing.assert_close(out.terms[SYMBOLS].sum, symbols, rtol=1e-5, atol=1e-4)
    hits = (logits.argmax(-1) == wanted).float()
    assert torch.equal(out.predictions[NEXT_SENTENCE][:, 0], hits)
    # the mutant: classes the other way round
    flipped = F.cross_entropy(logits, 1 - wanted, reduction="sum")
    assert abs(flipped - out.terms[NEXT_SENTENCE].sum) > 1e-4


def test_what_cannot_be_trained_is_refused(rng):
    with pytest.raises(ConfigError, match=r"embedding\.token_types of 2; got 0"):
        NextSentence().bind_model(replace(PAIRS, embedding=replace(PAIRS.embedding, token_types=0)))
    with pytest.raises(ConfigError, match=r"pool: \{kind: Prefix, is_dense: true\}"):
        NextSentence().bind_model(replace(PAIRS, pool=None))
    with pytest.raises(DataError, match=r"x\.csv:2: the input 'second' must have two different payloads"):
        bound(NextSentence(), PAIRS, records_of(["ACD", "ACD"]))
    with pytest.raises(ConfigError, match="random_second_frac"):
        NextSentence(random_second_frac=1.2)
