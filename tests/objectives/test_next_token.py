"""Next symbols: what is scored by what, and that nothing is seen before it is asked for."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from small_objectives import (
    BOTH,
    CLS,
    DECODER,
    ENCODER,
    PREFIX_DECODER,
    SEP,
    TOKENIZER,
    bound,
    built,
    packed,
    prepared,
    random_records,
)
from torch.nn import functional as F

from labelled import ready
from meristem.data.corrupt import crop_window
from meristem.data.pack import pack
from meristem.errors import ConfigError
from meristem.model.config import LayerRule
from meristem.model.model import SYMBOLS
from meristem.objectives.next_token import NextToken, PrefixLM
from meristem.types import IGNORE, INPUT, Record, Tokens
from model_runs import outputs_of


def test_each_row_is_scored_by_the_next_one_up_to_the_closing_row(rng):
    for record, tokens in zip(records := random_records(rng), prepared(bound(NextToken(), DECODER, records), records)):
        whole = [CLS, *(TOKENIZER.vocab.index(residue) for residue in record.payload), SEP]
        assert tokens.ids.tolist() == whole
        assert tokens.targets[SYMBOLS].tolist() == [*whole[1:], IGNORE]


@pytest.mark.parametrize(("prefix", "suffix"), [((), ()), (("<cls>", "<sep>"), ()), ((), ("<sep>", "<pad>"))])
def test_special_rows_before_the_payload_are_not_asked_for(prefix, suffix):
    tokenizer = replace(TOKENIZER, prefix=prefix, suffix=suffix)
    objective = bound(NextToken(), DECODER, [], tokenizer)
    (tokens,) = prepared(objective, [Record.of("a", "MKV")], tokenizer)
    ids = tokens.ids.tolist()
    asked = [i + 1 for i, target in enumerate(tokens.targets[SYMBOLS]) if target != IGNORE]
    assert [ids[i] for i in asked] == [target for target in tokens.targets[SYMBOLS] if target != IGNORE]
    assert asked == list(range(max(len(prefix), 1), len(ids)))


def test_a_window_neither_begins_nor_ends_where_its_record_does_not(rng):
    objective = bound(NextToken(), DECODER, [])
    payload = "ACDEFGHIKLMNPQRSTVWY"
    seen = set()
    for seed in range(60):
        window = crop_window(TOKENIZER.encode(payload), 18, np.random.default_rng(seed))
        (tokens,) = objective.prepare(Record.of("a", payload), ready(window), rng)
        text, targets = TOKENIZER.decode(window), tokens.targets[SYMBOLS]
        assert (targets[0] != IGNORE) == payload.startswith(text)
        assert (targets[-2] != IGNORE) == payload.endswith(text)
        assert (targets[1:-2] == window.ids[2:-1]).all()
        seen.add((payload.startswith(text), payload.endswith(text)))
    assert seen == {(True, False), (False, False), (False, True)}


def test_loss_is_that_of_a_padded_batch_computed_the_slow_way(rng):
    records = random_records(rng)
    objective = bound(NextToken(), DECODER, records)
    model = built(objective, DECODER)
    batch = packed(objective, records)
    out = objective.loss_of(model, objective.build(DECODER), batch)
    longest = max(len(record.payload) for record in records) + 2
    ids = torch.full((len(records), longest), -1)
    logits = torch.zeros(len(records), longest, len(TOKENIZER.vocab))
    for i, record in enumerate(records):
        alone = pack([TOKENIZER.encode(record.payload)], [0])
        n = alone.layout.num_tokens
        ids[i, :n] = alone.ids[:n]
        logits[i, :n] = outputs_of(model, alone)[:n]

    def slow(shift: int) -> torch.Tensor:
        read, asked = logits[:, : longest - shift], ids[:, shift:]
        return F.cross_entropy(read.flatten(0, 1), asked.flatten(), ignore_index=-1, reduction="sum")

    # fp32, a sum of some hundred losses
    torch.testing.assert_close(out.terms[SYMBOLS].sum, slow(1), rtol=1e-5, atol=1e-4)
    assert float(out.terms[SYMBOLS].count) == sum(len(record.payload) + 1 for record in records)
    # the mutant: targets that are not shifted
    assert abs(slow(0) - slow(1)) > 1e-3 * slow(1)


def row_losses(model, batch) -> torch.Tensor:
    """`[T]` losses of all rows, 0 where unscored."""
    logits = outputs_of(model, batch)
    return F.cross_entropy(logits, batch.targets[SYMBOLS], ignore_index=IGNORE, reduction="none").detach()


@pytest.mark.parametrize(("make", "config"), [(NextToken, DECODER), (PrefixLM, PREFIX_DECODER)])
def test_a_later_token_never_changes_an_earlier_loss(make, config, rng):
    (record,) = random_records(rng, 1, low=20)
    objective = bound(make(), config, [record])
    model = built(objective, config)

    def losses(model, token: int) -> tuple[torch.Tensor, Tokens]:
        changed = record.payload[:token] + ("A" if record.payload[token] != "A" else "C") + record.payload[token + 1 :]
        (tokens,) = prepared(objective, [replace(record, inputs={INPUT: changed})])
        return row_losses(model, pack([tokens], [0])), tokens

    before = row_losses(model, packed(objective, [record]))
    for token in range(len(record.payload)):
        after, tokens = losses(model, token)
        row = token + 1  # behind the class token
        # the same kernel on the same earlier rows; fp32 sums may take another order
        torch.testing.assert_close(after[: row - 1], before[: row - 1], rtol=1e-5, atol=1e-5)
        if row >= tokens.prefix_length:
            assert abs(after[row - 1] - before[row - 1]) > 1e-4  # the row that predicts it
    # the mutant: a trunk that sees the future
    leaky = built(objective, ENCODER)
    leaky.load_state_dict(model.state_dict())
    before = row_losses(leaky, packed(objective, [record]))
    assert (losses(leaky, len(record.payload) - 1)[0][:-2] - before[:-2]).abs().max() > 1e-4


def test_a_prefix_is_seen_as_a_whole_and_not_scored(rng):
    records = random_records(rng, 40, low=1)
    objective = bound(PrefixLM(), PREFIX_DECODER, records)
    for record, tokens in zip(records, prepared(objective, records)):
        n, prefix = len(record.payload), tokens.prefix_length
        assert (2 <= prefix <= n) if n > 1 else prefix == 1
        targets = tokens.targets[SYMBOLS]
        assert (targets[: prefix - 1] == IGNORE).all()
        assert (targets[prefix - 1 : -1] == tokens.ids[prefix:]).all()
    (record,) = random_records(rng, 1, low=25)
    (tokens,) = prepared(objective, [record])
    model = built(objective, PREFIX_DECODER)
    batch = pack([tokens], [0])
    assert batch.layout.prefix_lengths == (tokens.prefix_length,)
    # the last token of the prefix is seen by its first; the first one behind it is not
    seen, unseen = tokens.prefix_length - 1, tokens.prefix_length
    rows = [model.trunk(replace(batch, ids=with_symbol(batch.ids, at, 5))).final[0] for at in (seen, unseen)]
    still = model.trunk(batch).final[0]
    assert (rows[0] - still).abs().max() > 1e-4
    torch.testing.assert_close(rows[1], still, rtol=1e-5, atol=1e-5)


def with_symbol(ids: torch.Tensor, at: int, symbol: int) -> torch.Tensor:
    changed = ids.clone()
    changed[at] = symbol if ids[at] != symbol else symbol + 1
    return changed


def test_every_split_of_a_payload_is_equally_likely(rng):
    record = Record.of("a", "ACDEFG")
    objective = bound(PrefixLM(), PREFIX_DECODER, [record])
    tokens = TOKENIZER.encode(record.payload)
    repeats = 4_000
    splits = [objective.prepare(record, ready(tokens), rng)[0].prefix_length for _ in range(repeats)]
    counts = np.bincount(splits)
    assert counts[:2].tolist() == [0, 0]
    # 5 standard deviations of a binomial, 5 splits
    assert (np.abs(counts[2:] - repeats / 5) < 5 * np.sqrt(repeats * 0.2 * 0.8)).all()
    assert len(counts) == 7


@pytest.mark.parametrize(
    ("make", "config", "said"),
    [
        (NextToken, ENCODER, r"got Full in layer 0; .*kind: Causal.*architecture\.attention\.pattern"),
        (NextToken, replace(DECODER, layers=(LayerRule(start=1, attention=ENCODER.attention),)), "Full in layer 1"),
        (NextToken, BOTH, "one stack; got num_decoder_layers=2"),
        (PrefixLM, DECODER, "sees the prefix as a whole.*InPrefix"),
        (PrefixLM, ENCODER, "got Full in layer 0"),
    ],
)
def test_a_model_that_would_see_what_it_predicts_is_refused(make, config, said):
    with pytest.raises(ConfigError, match=said):
        make().bind_model(config)
