"""Baselines that a protein model has to beat, on the very split that its config trains and tests on.

    python benchmarks/baselines/protein.py perplexity uniref90_sample.fasta
    python benchmarks/baselines/protein.py secondary_structure secondary_structure_ss8_train.csv
    python benchmarks/baselines/protein.py fitness dms_beta_lactamase_P62593.csv
    python benchmarks/baselines/protein.py localization localization_deeploc_train.csv

Each prints one line a baseline. Splits are dealt as `data.split` of the config says, with its defaults.
"""

import argparse
from collections.abc import Sequence

import numpy as np
from scipy.sparse import csr_matrix
from scipy.stats import spearmanr
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression, Ridge, SGDClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MaxAbsScaler

from meristem.data.records import ReadOptions, Source
from meristem.data.split import split_by_hash, split_by_similarity
from meristem.data.store import RecordStore
from meristem.domain import load_domain

RESIDUES = "ACDEFGHIKLMNPQRSTVWY"
CODES = np.full(256, 20, np.int64)
CODES[np.frombuffer(RESIDUES.encode(), np.uint8)] = np.arange(20)


def encode(sequence: str) -> np.ndarray:
    """`[n]` residues as 0..19; 20 for any other."""
    return CODES[np.frombuffer(sequence.upper().encode(), np.uint8)]


def unigram_and_bigram(train: Sequence[str], test: Sequence[str]) -> dict[str, float]:
    """Perplexity of the residues of `test`, each given nothing, and given the residue before it."""
    pairs = np.ones((22, 21))  # add-one; row 21 is the start of a sequence
    for sequence in train:
        codes = encode(sequence)
        np.add.at(pairs, (np.concatenate([[21], codes[:-1]]), codes), 1)
    single = np.log(pairs.sum(0) / pairs.sum())
    double = np.log(pairs / pairs.sum(1, keepdims=True))
    losses, count = np.zeros(2), 0
    for sequence in test:
        codes = encode(sequence)
        scored = codes < 20
        before = np.concatenate([[21], codes[:-1]])
        losses -= single[codes][scored].sum(), double[before, codes][scored].sum()
        count += int(scored.sum())
    unigram, bigram = np.exp(losses / count)
    return {"unigram": unigram, "bigram": bigram}


def window_logistic(
    train: Sequence[tuple[str, str]], test: Sequence[tuple[str, str]], width: int = 15
) -> dict[str, float]:
    """Accuracy a residue of a logistic regression on the one-hot residues of a window around it."""

    def features(rows: Sequence[tuple[str, str]]) -> tuple[csr_matrix, np.ndarray]:
        half = width // 2
        padded = [np.concatenate([np.full(half, 21), encode(sequence), np.full(half, 21)]) for sequence, _ in rows]
        windows = np.concatenate([np.lib.stride_tricks.sliding_window_view(codes, width) for codes in padded])
        columns = (windows + 22 * np.arange(width)).ravel()
        shape = (len(windows), 22 * width)
        matrix = csr_matrix((np.ones(columns.size, np.float32), columns, np.arange(0, columns.size + 1, width)), shape)
        return matrix, np.array(list("".join(states for _, states in rows)))

    (x, y), (x_test, y_test) = features(train), features(test)
    scores = {}
    for strength in (1e-6, 1e-5):
        model = SGDClassifier(loss="log_loss", alpha=strength, max_iter=6, tol=None, average=True, random_state=0)
        scores[f"logistic regression, window {width}, alpha {strength:g}"] = float(
            model.fit(x, y).score(x_test, y_test)
        )
    return scores


def one_hot_ridge(train: Sequence[tuple[str, float]], test: Sequence[tuple[str, float]]) -> dict[str, float]:
    """Spearman of a ridge regression on one-hot residues (all sequences of one length)."""

    def features(rows: Sequence[tuple[str, float]]) -> np.ndarray:
        return np.eye(21, dtype=np.float32)[np.stack([encode(sequence) for sequence, _ in rows])].reshape(len(rows), -1)

    x, x_test = features(train), features(test)
    y, y_test = np.array([value for _, value in train]), np.array([value for _, value in test])
    scores = {}
    for strength in (0.3, 1.0, 3.0):
        predicted = Ridge(alpha=strength).fit(x, y).predict(x_test)
        scores[f"ridge on one-hot, alpha {strength:g}"] = float(spearmanr(predicted, y_test).statistic)
    return scores


def kmer_logistic(train: Sequence[tuple[str, str]], test: Sequence[tuple[str, str]]) -> dict[str, float]:
    """Accuracy of a logistic regression on counts of 1-, 2- and 3-mers."""
    scores = {}
    for strength in (0.1, 1.0, 10.0):
        model = make_pipeline(
            CountVectorizer(analyzer="char", ngram_range=(1, 3), lowercase=False, max_features=9000),
            MaxAbsScaler(),
            LogisticRegression(C=strength, max_iter=500),
        )
        model.fit([sequence for sequence, _ in train], [label for _, label in train])
        accuracy = model.score([sequence for sequence, _ in test], [label for _, label in test])
        scores[f"logistic regression, 1-3-mers, C {strength:g}"] = float(accuracy)
    return scores


BASELINES = {
    "perplexity": (unigram_and_bigram, None),
    "secondary_structure": (window_logistic, "ss8"),
    "fitness": (one_hot_ridge, "score"),
    "localization": (kmer_logistic, "location"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=BASELINES)
    parser.add_argument("source")
    parser.add_argument("--validation", type=float, default=0.1, help="fraction, as in the config")
    parser.add_argument("--test", type=float, default=0.1, help="fraction, as in the config")
    parser.add_argument("--method", choices=("hash", "similarity"), default="hash", help="as in the config")
    parser.add_argument("--seed", type=int, default=0, help="of the split, as in the config")
    args = parser.parse_args()
    baseline, column = BASELINES[args.task]
    domain = load_domain("protein")
    options = ReadOptions(label_columns=(column,) if column else ())
    store = RecordStore.build(domain.reader, [Source(args.source)], options, name=domain.name)
    # in the order of the data module: a hash falls into one share after another
    fractions = {"validation": args.validation, "test": args.test, "train": 1 - args.validation - args.test}
    shares = {name: share for name, share in fractions.items() if share}
    if args.method == "hash":
        parts = split_by_hash(store, shares, args.seed)
    else:
        parts = split_by_similarity(store, shares, args.seed, domain.similarity_with())

    def rows(part: str) -> list:
        records = store.records(parts[part])
        return [(record.payload, record.labels[column]) if column else record.payload for record in records]

    scored = "test" if args.test else "validation"
    train, test = rows("train"), rows(scored)
    print(f"{len(train)} records to fit, {len(test)} to score ({scored})")
    for name, score in baseline(train, test).items():
        print(f"{name}: {score:.4f}")


if __name__ == "__main__":
    main()
