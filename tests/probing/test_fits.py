"""Linear maps and neighbours, against scikit-learn on the same vectors."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor
from sklearn.preprocessing import StandardScaler
from small_probes import random_vectors

from meristem.probing import linear
from meristem.probing.linear import L2_CLASSES, fit_logistic, probe_classes, probe_values
from meristem.probing.neighbours import nearest, vote_classes, vote_values


def no_validation(count: int) -> np.ndarray:
    return np.zeros(count, bool)


@pytest.mark.parametrize("num_classes", [2, 7])
@pytest.mark.parametrize("l2", [1e-1, 1e-3])
def test_the_linear_probe_is_scikit_learns_logistic_regression(
    num_classes: int, l2: float, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "DEFAULT_L2", l2)
    vectors, codes = random_vectors(rng, 400, 24, num_classes)
    train, test = slice(0, 300), slice(300, None)
    probe = probe_classes(vectors[train], codes[train], num_classes, no_validation(300))
    scaler = StandardScaler().fit(vectors[train].astype(np.float64))
    # ours has a column of weights a class, and the mean of the losses: two classes share the weight of one column
    strength = 1 / (l2 * 300) * (2 if num_classes == 2 else 1)
    wanted = LogisticRegression(C=strength, max_iter=2000, tol=1e-8)
    wanted.fit(scaler.transform(vectors[train].astype(np.float64)), codes[train])
    logits = probe.outputs(vectors[test])
    probabilities = np.exp(logits - logits.max(1, keepdims=True))
    probabilities /= probabilities.sum(1, keepdims=True)
    theirs = wanted.predict_proba(scaler.transform(vectors[test].astype(np.float64)))
    # two solvers stop at slightly different places of a flat valley
    np.testing.assert_allclose(probabilities, theirs, atol=2e-3)
    assert abs((logits.argmax(1) == codes[test]).mean() - (theirs.argmax(1) == codes[test]).mean()) <= 0.01


def test_the_penalty_is_the_one_with_the_lowest_validation_loss(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors, codes = random_vectors(rng, 300, 40, 4)
    is_validation = rng.random(300) < 0.3
    told: list[int] = []
    probe = probe_classes(vectors, codes, 4, is_validation, advance=told.append)
    fitted, held = vectors[~is_validation].astype(np.float64), vectors[is_validation].astype(np.float64)
    scaler = StandardScaler().fit(fitted)
    losses = {}
    for l2 in L2_CLASSES[: len(probe.losses)]:
        model = LogisticRegression(C=1 / (l2 * len(fitted)), max_iter=5000, tol=1e-9)
        model.fit(scaler.transform(fitted), codes[~is_validation])
        chosen = model.predict_log_proba(scaler.transform(held))[np.arange(len(held)), codes[is_validation]]
        losses[l2] = -chosen.mean()
    # weak penalties have flat valleys, and are compared before their end is reached
    np.testing.assert_allclose(list(probe.losses.values())[:4], list(losses.values())[:4], rtol=2e-2)
    assert losses[probe.l2] <= 1.1 * min(losses.values()) + 0.02
    assert probe.l2 == min(probe.losses, key=lambda value: probe.losses[value])
    assert len(told) == len(probe.losses)
    monkeypatch.setattr(linear, "DEFAULT_L2", probe.l2)
    again = probe_classes(vectors, codes, 4, no_validation(300))
    torch.testing.assert_close(probe.weights, again.weights, rtol=0, atol=0)  # fitted to all, validation too


def test_a_constant_feature_and_one_of_another_scale_change_nothing(rng: np.random.Generator) -> None:
    vectors, codes = random_vectors(rng, 200, 10, 3)
    plain = probe_classes(vectors, codes, 3, no_validation(200)).outputs(vectors)
    other = np.concatenate([vectors * 1024, np.full((200, 1), 0.1, np.float32)], 1)
    scaled = probe_classes(other, codes, 3, no_validation(200)).outputs(other)
    np.testing.assert_allclose(scaled, plain, atol=1e-4)


def test_a_penalised_bias_would_be_seen(rng: np.random.Generator) -> None:
    """Of 9 to 1 classes and features that tell nothing, the bias alone says so."""
    codes = torch.tensor([0] * 90 + [1] * 10)
    nothing = torch.zeros(100, 3, dtype=torch.float64)
    weights = fit_logistic(nothing, codes, 2, 1.0)
    assert abs(weights[-1].softmax(0)[0].item() - 0.9) < 1e-4
    mutant = fit_logistic(torch.cat([nothing, torch.ones(100, 1, dtype=torch.float64)], 1), codes, 2, 1.0)
    assert not torch.allclose(mutant[-2], torch.zeros(2, dtype=torch.float64))


@pytest.mark.parametrize(("count", "width"), [(120, 10), (40, 90)])
def test_the_probe_of_values_is_scikit_learns_ridge(
    count: int, width: int, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors = (rng.standard_normal((count + 50, width)) * np.exp(rng.standard_normal(width))).astype(np.float32)
    values = vectors @ rng.standard_normal(width) + rng.standard_normal(count + 50) + 5
    l2 = 0.03
    monkeypatch.setattr(linear, "DEFAULT_L2", l2)
    probe = probe_values(vectors[:count], values[:count], no_validation(count))
    scaler = StandardScaler().fit(vectors[:count].astype(np.float64))
    wanted = Ridge(alpha=l2 * count).fit(scaler.transform(vectors[:count].astype(np.float64)), values[:count])
    theirs = wanted.predict(scaler.transform(vectors[count:].astype(np.float64)))
    np.testing.assert_allclose(probe.outputs(vectors[count:])[:, 0], theirs, rtol=1e-6, atol=1e-6)
    chosen = probe_values(vectors[:count], values[:count], rng.random(count) < 0.3)
    assert chosen.l2 == min(chosen.losses, key=lambda value: chosen.losses[value])


@pytest.mark.parametrize("k", [1, 7, 20])
def test_neighbours_vote_as_scikit_learns(k: int, rng: np.random.Generator) -> None:
    vectors, codes = random_vectors(rng, 600, 16, 12)
    bank, queries = vectors[:400], vectors[400:]
    cosines, rows = nearest(bank, queries, k)
    votes = vote_classes(cosines, codes[:400][rows], 12, 0.07)
    weigh = lambda distances: np.exp((1 - distances) / 0.07)  # noqa: E731
    theirs = KNeighborsClassifier(k, metric="cosine", algorithm="brute", weights=weigh).fit(bank, codes[:400])
    np.testing.assert_array_equal(votes.argmax(1), theirs.predict(queries))
    np.testing.assert_allclose(votes, theirs.predict_proba(queries), atol=1e-4)  # cosines are fp32
    values = rng.standard_normal(400)
    regressor = KNeighborsRegressor(k, metric="cosine", algorithm="brute", weights=weigh).fit(bank, values)
    np.testing.assert_allclose(vote_values(cosines, values[rows], 0.07), regressor.predict(queries), atol=1e-4)


def test_neighbours_do_not_depend_on_the_length_of_vectors(rng: np.random.Generator) -> None:
    vectors, _ = random_vectors(rng, 200, 16, 2)
    _, rows = nearest(vectors[:150], vectors[150:], 5)
    lengths = 2.0 ** rng.integers(-3, 4, (200, 1))
    scaled = (vectors * lengths).astype(np.float32)
    np.testing.assert_array_equal(nearest(scaled[:150], scaled[150:], 5)[1], rows)


def test_a_bank_that_holds_the_queries_would_be_seen(rng: np.random.Generator) -> None:
    """Labels without meaning are found at the rate of chance, unless a record is its own neighbour."""
    vectors, _ = random_vectors(rng, 600, 16, 2)
    codes = rng.integers(0, 2, 600)

    def accuracy(bank: np.ndarray) -> float:
        cosines, rows = nearest(vectors[bank], vectors[400:], 1)
        votes = vote_classes(cosines, codes[bank][rows], 2, 0.07)
        return float((votes.argmax(1) == codes[400:]).mean())

    assert abs(accuracy(np.arange(400)) - 0.5) < 0.2  # 200 throws of a coin: 5.6 deviations
    assert accuracy(np.arange(600)) == 1.0
