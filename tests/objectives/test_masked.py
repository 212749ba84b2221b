"""Masked symbols: what is hidden, and what it is scored against."""

import numpy as np
import pytest
import torch

from labelled import ready
from meristem.data.pack import pack
from meristem.data.parts import RunData
from meristem.domain import load_domain
from meristem.errors import ConfigError
from meristem.model.config import Attention, Embedding, FeedForward, TokenHead, TransformerConfig
from meristem.model.model import Model
from meristem.objectives.masked import MaskedTokens
from meristem.types import IGNORE, Record
from model_runs import outputs_of

TOKENIZER = load_domain("protein").tokenizer()


def test_only_payload_tokens_are_hidden_and_all_scored_ones_keep_their_symbol(rng):
    objective = MaskedTokens(rate=0.4)
    objective.bind(RunData(TOKENIZER))
    for seed in range(50):
        sequence = "".join(rng.choice(list("LAGVSERTIDPKQNFYMHWC"), rng.integers(1, 40)))
        before = TOKENIZER.encode(sequence)
        (after,) = objective.prepare(Record.of("a", sequence), ready(before), np.random.default_rng(seed))
        targets = after.targets["tokens"]
        assert targets[0] == targets[-1] == IGNORE
        assert (after.ids[[0, -1]] == before.ids[[0, -1]]).all()
        scored = targets != IGNORE
        assert scored.any()
        assert (targets[scored] == before.ids[scored]).all()
        assert (after.ids[~scored] == before.ids[~scored]).all()


def test_loss_is_the_sum_over_scored_rows_of_all_rows_logits(rng):
    config = TransformerConfig(
        width=32,
        num_layers=1,
        embedding=Embedding(vocab_size=33),
        attention=Attention(num_heads=4),
        feedforward=FeedForward(width=64),
        head=TokenHead(),
    )
    objective = MaskedTokens()
    objective.bind(RunData(TOKENIZER))
    model = Model(config, objective.heads)
    sequences = ["".join(rng.choice(list("LAGVSERTIDPKQNFYMHWC"), n)) for n in (5, 30, 61)]
    tokens = [
        objective.prepare(Record.of("a", s), ready(TOKENIZER.encode(s)), np.random.default_rng(i))[0]
        for i, s in enumerate(sequences)
    ]
    batch = pack(tokens, range(3))
    out = objective.loss_of(model, objective.build(config), batch)
    logits = outputs_of(model, batch).log_softmax(-1)
    rows = [i for i, target in enumerate(batch.targets["tokens"].tolist()) if target != IGNORE]
    slow = -sum(logits[i, batch.targets["tokens"][i]] for i in rows)
    torch.testing.assert_close(out.terms["tokens"].sum, slow)
    assert out.terms["tokens"].count == len(rows)
    metric = objective.metrics()["tokens/accuracy"]
    metric.update(out.predictions["tokens"], out.targets["tokens"])
    hits = sum(int(logits[i].argmax() == batch.targets["tokens"][i]) for i in rows)
    assert float(metric.compute()) == pytest.approx(hits / len(rows))


@pytest.mark.parametrize(
    "options", [{"rate": 0}, {"rate": 1.1}, {"mask_frac": 0.8, "random_frac": 0.3}, {"mean_span": 0.5}]
)
def test_impossible_options_are_refused(options):
    with pytest.raises(ConfigError, match="objective"):
        MaskedTokens(**options)
