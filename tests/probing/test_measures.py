"""Figures equal those of scikit-learn, on random predictions."""

import numpy as np
import pytest
from sklearn import metrics

from meristem.probing.measures import class_figures, confusion_matrix, top_k_accuracy, value_figures


def random_classes(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, int]:
    """Some classes are never true, some never predicted."""
    count, num_classes = int(rng.integers(2, 300)), int(rng.integers(2, 30))
    true = rng.integers(0, num_classes, count)
    predicted = np.where(rng.random(count) < 0.5, true, rng.integers(0, max(1, num_classes - 1), count))
    return true, predicted, num_classes


@pytest.mark.parametrize("trial", range(5))
def test_class_figures_are_those_of_scikit_learn(trial: int, rng: np.random.Generator) -> None:
    true, predicted, num_classes = random_classes(rng)
    confusion = confusion_matrix(true, predicted, num_classes)
    np.testing.assert_array_equal(confusion, metrics.confusion_matrix(true, predicted, labels=range(num_classes)))
    figures = class_figures(confusion)
    assert abs(figures["accuracy"] - metrics.accuracy_score(true, predicted)) < 1e-12
    wanted = metrics.f1_score(true, predicted, average="macro", labels=np.unique([*true, *predicted]), zero_division=0)
    assert abs(figures["macro_f1"] - wanted) < 1e-12
    assert abs(figures["mcc"] - metrics.matthews_corrcoef(true, predicted)) < 1e-12


def test_a_transposed_confusion_would_be_seen(rng: np.random.Generator) -> None:
    true, predicted = rng.integers(0, 3, 200), np.zeros(200, np.int64)
    mutant = confusion_matrix(predicted, true, 3)
    assert (mutant != metrics.confusion_matrix(true, predicted, labels=range(3))).any()


def test_a_predictor_of_one_class_has_no_correlation() -> None:
    assert class_figures(np.array([[3, 0], [2, 0]]))["mcc"] == 0.0


@pytest.mark.parametrize("k", [1, 3, 5])
def test_top_k_is_that_of_scikit_learn(k: int, rng: np.random.Generator) -> None:
    scores = rng.random((200, 9))
    true = np.concatenate([np.arange(9), rng.integers(0, 9, 191)])
    wanted = metrics.top_k_accuracy_score(true, scores, k=k, labels=np.arange(9))
    assert abs(top_k_accuracy(scores, true, k) - wanted) < 1e-12


def test_a_class_that_got_no_vote_is_not_among_the_first() -> None:
    scores = np.array([[0.0, 1.0, 0.0, 0.0]])
    assert top_k_accuracy(scores, np.array([1]), 3) == 1.0
    assert top_k_accuracy(scores, np.array([0]), 3) == 0.0
    assert top_k_accuracy(scores, np.array([7]), 3) == 0.0  # a class that training lacks


def test_value_figures_are_those_of_scipy_and_scikit_learn(rng: np.random.Generator) -> None:
    from scipy.stats import spearmanr

    true = rng.integers(0, 20, 150).astype(float)  # many ties
    predicted = np.round(true + 4 * rng.standard_normal(150))
    figures = value_figures(true, predicted)
    assert figures["spearman"] == pytest.approx(spearmanr(true, predicted).statistic, abs=1e-12)
    assert figures["r2"] == pytest.approx(metrics.r2_score(true, predicted), abs=1e-12)
    assert figures["rmse"] == pytest.approx(metrics.root_mean_squared_error(true, predicted), abs=1e-12)


def test_equal_values_have_no_correlation() -> None:
    figures = value_figures(np.ones(5), np.arange(5.0))
    assert figures["spearman"] is None
    assert figures["r2"] is None
