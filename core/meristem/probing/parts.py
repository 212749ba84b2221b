"""Which labelled records are for training, for validation and for the test."""

import numpy as np

from meristem.data.split import split_by_column, split_by_hash, split_by_similarity
from meristem.data.store import RecordStore
from meristem.domain import Domain
from meristem.errors import ConfigError, DataError
from meristem.probing.options import ProbeOptions

DEFAULT_TEST_FRAC = 0.2


def deal(
    store: RecordStore, domain: Domain, has_label: np.ndarray, options: ProbeOptions, has_test_files: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Deal the records that have a label.

    Args:
        domain: of the records.
        has_label: `[N]` which records have one.
        options: how to split. A split column that names no validation part leaves it to be taken from training.
        has_test_files: no record of the store is for the test.

    Returns:
        Rows of the store, each in ascending order: those that probes are fitted to; those that the penalty is chosen
        by, which the last fit takes as well; and those that probes are evaluated on.

    Raises:
        ConfigError: a method that does not suit the records.
        DataError: a part without a labelled record.
    """
    test_frac = 0.0 if has_test_files else options.test_frac or DEFAULT_TEST_FRAC
    validation_frac, seed = options.validation_frac, options.seed
    if options.split_column:
        parts = split_by_column(store)
        if test_frac and "test" not in parts:
            raise DataError("the split column names no record for the test; give files with --test")
        if not test_frac and "test" in parts:
            raise ConfigError("the split column names records for the test and --test gives files; keep one of the two")
    elif options.split == "similarity":
        fractions = {"train": 1 - test_frac - validation_frac, "validation": validation_frac, "test": test_frac}
        parts = split_by_similarity(store, fractions, seed, domain.similarity_with())
    else:
        parts = split_by_hash(store, {"train": 1 - test_frac, "test": test_frac}, seed)
    labelled = {name: rows[has_label[rows]] for name, rows in parts.items()}
    train, validation, test = (labelled.get(name, np.zeros(0, np.int64)) for name in ("train", "validation", "test"))
    if not len(validation):
        train, validation = _held_out(store, train, validation_frac, seed)
    if not len(train):
        raise DataError("no record with a label is left for training; see the split, or give more records")
    if test_frac and not len(test):
        raise DataError("no record with a label is left for the test; see the split, or give files with --test")
    return train, validation, test


def _held_out(store: RecordStore, rows: np.ndarray, frac: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split off a share of rows: the other rows, then those with the lowest hashes. Equal payloads stay together."""
    count = int(np.ceil(frac * len(rows)))
    if not count or count >= len(rows):
        return rows, np.zeros(0, np.int64)
    hashes = store.group_hashes(seed + 1)[rows]  # another seed than that of the test
    is_out = hashes <= np.partition(hashes, count - 1)[count - 1]
    return rows[~is_out], rows[is_out]
