"""What every objective that predicts symbols must do: learn, announce its counts, smooth labels, ask routers."""

import numpy as np
import pytest
import torch
from small_objectives import CASES, DECODER, RESIDUE_IDS, bound, built, packed, random_records, with_experts
from torch.nn import functional as F

from meristem.errors import ConfigError
from meristem.model.model import SYMBOLS
from meristem.model.outputs import Wanted
from meristem.objectives.masked import MaskedTokens
from meristem.objectives.next_token import NextToken
from meristem.objectives.symbols import request_symbols
from meristem.types import IGNORE
from model_runs import outputs_of


@pytest.mark.parametrize("experts", [False, True], ids=["plain", "experts"])
@pytest.mark.parametrize("name", CASES)
def test_loss_falls_and_counts_are_those_announced(name, experts, rng):
    make, config = CASES[name]
    config = with_experts(config) if experts else config
    records = random_records(rng)
    objective = bound(make(), config, records)
    batch = packed(objective, records)
    model = built(objective, config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(3):
        out = objective.loss_of(model, objective.build(config), batch)
        assert {term: float(t.count) for term, t in out.terms.items()} == objective.counts(batch)
        assert all(count > 0 for count in objective.counts(batch).values())
        assert {"router/balance", "router/z"} <= out.terms.keys() or not experts
        loss = sum(term.weight * term.sum / term.count for term in out.terms.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > losses[1] > losses[2]
    for metric_name, metric in objective.metrics().items():
        key = metric_name.partition("/")[0]
        metric.update(out.predictions[key], out.targets[key])
        assert np.isfinite(float(metric.compute()))
    unused = [name for name, p in model.named_parameters() if p.grad is None]
    assert unused == []


@pytest.mark.parametrize("name", CASES)
def test_preparing_is_a_pure_function_of_record_and_generator(name, rng):
    make, config = CASES[name]
    records = random_records(rng)
    objective = bound(make(), config, records)
    first, again, other = (packed(objective, records, seed=seed) for seed in (5, 5, 600))
    assert torch.equal(first.ids, again.ids)
    assert torch.equal(first.targets[SYMBOLS], again.targets[SYMBOLS])
    if name not in ("causal", "sequence to sequence"):

        def drawn(batch) -> list:
            return [batch.ids.tolist(), batch.layout.prefix_lengths, batch.source and batch.source.ids.tolist()]

        assert drawn(first) != drawn(other)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.6])
@pytest.mark.parametrize("make", [NextToken, MaskedTokens])
def test_smoothed_loss_is_that_of_torch_and_figures_stay_unsmoothed(make, smoothing, rng):
    records = random_records(rng)
    objective = bound(make(label_smoothing=smoothing), DECODER, records)
    batch = packed(objective, records)
    model = built(objective, DECODER)
    with torch.no_grad():
        model.heads[SYMBOLS].bias[RESIDUE_IDS] += 8  # what is asked for is likely, so that smoothing costs something
    out = objective.loss_of(model, objective.build(DECODER), batch)
    logits, targets = outputs_of(model, batch), batch.targets[SYMBOLS]
    slow = F.cross_entropy(logits, targets, reduction="sum", ignore_index=IGNORE, label_smoothing=smoothing)
    # fp32, a sum of some hundred losses
    torch.testing.assert_close(out.terms[SYMBOLS].sum, slow, rtol=1e-5, atol=1e-4)
    plain = F.cross_entropy(logits, targets, reduction="none", ignore_index=IGNORE)[targets != IGNORE]
    torch.testing.assert_close(out.predictions[SYMBOLS][:, 1], plain, rtol=1e-5, atol=1e-5)
    if smoothing:
        # the mutant: smoothing with the other sign
        request = request_symbols(batch, -smoothing)
        mutant = model(batch, Wanted({SYMBOLS: request})).heads[SYMBOLS].total
        assert abs(mutant - slow) > 1e-2 * abs(slow)


def test_perplexity_bits_and_accuracy_are_of_all_rows_at_once(rng):
    records = random_records(rng, count=12)
    objective = bound(NextToken(label_smoothing=0.3), DECODER, records)
    model = built(objective, DECODER)
    metrics = objective.metrics()
    losses, hits = [], []
    for part in (records[:3], records[3:]):
        batch = packed(objective, part)
        out = objective.loss_of(model, objective.build(DECODER), batch)
        for metric in metrics.values():
            metric.update(out.predictions[SYMBOLS], out.targets[SYMBOLS])
        logits = outputs_of(model, batch).detach().double().log_softmax(-1)
        for row, target in enumerate(batch.targets[SYMBOLS].tolist()):
            if target != IGNORE:
                losses.append(-logits[row, target].item())
                hits.append(logits[row].argmax().item() == target)
    # logits are fp32
    assert float(metrics["tokens/perplexity"].compute()) == pytest.approx(np.exp(np.mean(losses)), rel=1e-5)
    assert float(metrics["tokens/bits"].compute()) == pytest.approx(np.mean(losses) / np.log(2), rel=1e-5)
    assert float(metrics["tokens/accuracy"].compute()) == pytest.approx(np.mean(hits))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("smoothing", [-0.1, 1.0])
def test_smoothing_that_is_none_is_refused(name, smoothing):
    with pytest.raises(ConfigError, match=r"objective\.label_smoothing must be in \[0, 1\)"):
        CASES[name][0](label_smoothing=smoothing)
