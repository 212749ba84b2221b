"""Parts of a store: by a hash of the payload, by a column, or by clusters of similar payloads.

Records of one group (`ReadOptions.group_column`) always share a part.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa

from meristem.data.order import record_rng
from meristem.data.records import GROUP, SPLIT
from meristem.data.similarity import Clusters, Similarity, similarity_clusters
from meristem.data.store import RecordStore
from meristem.data.store_writer import Progress
from meristem.errors import ConfigError, DataError, require

PART_NAMES = {
    "train": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "dev": "validation",
    "test": "test",
}
"""How a split column may name a part, in either case, and the name of that part."""


def split_by_hash(store: RecordStore, fractions: Mapping[str, float], seed: int) -> dict[str, np.ndarray]:
    """Give each record a part that depends on the seed and on its group alone, or on its payload where it has no group.

    Records of a group share a part, and so do equal payloads without a group. A record keeps its part when others come
    or go.

    Args:
        fractions: of the records that each part gets, about; they add up to 1.

    Returns:
        Rows of each part, ascending.

    Raises:
        ConfigError: the fractions are none.
        DataError: a part would be empty.
    """
    ends = np.cumsum(_checked(fractions))
    place = store.group_hashes(seed) / 2.0**64
    return _parts(np.searchsorted(ends[:-1], place, side="right"), fractions)


def split_by_similarity(
    store: RecordStore,
    fractions: Mapping[str, float],
    seed: int,
    similarity: Similarity,
    progress: Progress | None = None,
) -> dict[str, np.ndarray]:
    """Keep records that share many k-mers together: whole clusters, and those that a group joins, go to one part.

    Args:
        fractions: of the records that each part gets, as near as whole clusters allow; they add up to 1.
        seed: decides which cluster goes where.
        progress: called with records done and records in all, now and then.

    Returns and raises what `split_by_hash` does.
    """
    shares = _checked(fractions)
    clusters = _joined(similarity_clusters(store, similarity, progress), store.groups())
    sizes = np.bincount(clusters)
    wanted = shares * len(store)
    missing = wanted.copy()
    part_of_cluster = np.zeros(len(sizes), np.int64)
    for cluster in record_rng(seed, 0, 0).permutation(len(sizes)):
        # the part that lacks the largest share of its own, of those that the cluster fits in
        fits = missing >= sizes[cluster]
        need = np.where(fits, missing / np.maximum(wanted, 1e-9), -np.inf) if fits.any() else missing
        part_of_cluster[cluster] = part = int(np.argmax(need))
        missing[part] -= sizes[cluster]
    return _parts(part_of_cluster[clusters], fractions)


def split_by_column(store: RecordStore) -> dict[str, np.ndarray]:
    """The parts that the records' own split column names (`ReadOptions.split_column`).

    Returns:
        Rows of each part that occurs (`train`, `validation`, `test`), ascending.

    Raises:
        ConfigError: the records were read without a split column.
        DataError: a value that names no part, or a group in two parts, by file and line.
    """
    if SPLIT not in store.column_names:
        raise ConfigError("a split by column needs data.split_column, the column that names each record's part")
    column = store.column(SPLIT).combine_chunks().cast(pa.string()).dictionary_encode(null_encoding="encode")
    column = column.chunk(0) if isinstance(column, pa.ChunkedArray) else column
    codes = column.indices.to_numpy()
    parts: dict[str, list[int]] = {}
    for code, value in enumerate(column.dictionary.to_pylist()):
        part = PART_NAMES.get((value or "").strip().lower())
        if part is None:
            row = int(np.argmax(codes == code))
            raise DataError(
                f"{store.where(row)}: the split column must be one of {', '.join(PART_NAMES)}; got {value or ''!r}"
            )
        parts.setdefault(part, []).append(code)
    order = [part for part in dict.fromkeys(PART_NAMES.values()) if part in parts]
    found = {part: np.flatnonzero(np.isin(codes, parts[part])) for part in order}
    require_whole_groups([(part, store, rows) for part, rows in found.items()])
    return found


def require_whole_groups(parts: Sequence[tuple[str, RecordStore, np.ndarray]]) -> None:
    """Refuse parts (name, store and rows of each) that share a group.

    Raises:
        DataError: names two records of the group, by file and line.
    """
    seen: dict[str, tuple[str, RecordStore, int]] = {}
    for part, store, rows in parts:
        groups = store.groups()
        for row in rows.tolist() if GROUP in store.column_names else ():
            if (group := groups[row]) is None:
                continue
            other, its_store, its_row = seen.setdefault(group, (part, store, row))
            if other != part:
                raise DataError(
                    f"{store.where(row)}: the group {group!r} must lie in one part; this record is in {part}, and "
                    f"{its_store.where(its_row)} in {other}"
                )


def _joined(clusters: np.ndarray, groups: Sequence[str | None]) -> np.ndarray:
    """Clusters, numbered from 0, with those joined that share a group."""
    joined = Clusters(clusters.max() + 1)
    first: dict[str, int] = {}
    for cluster, group in zip(clusters.tolist(), groups):
        if group is not None:
            joined.join(first.setdefault(group, cluster), cluster)
    return joined.labels()[clusters]


def _checked(fractions: Mapping[str, float]) -> np.ndarray:
    shares = np.array(list(fractions.values()), float)
    given = ", ".join(f"{name}={share}" for name, share in fractions.items()) or "none"
    are_right = bool((shares >= 0).all()) and abs(shares.sum() - 1) <= 1e-6
    require(are_right, "fractions of a split must be 0 or more and add up to 1", given)
    return shares


def _parts(part_of_row: np.ndarray, fractions: Mapping[str, float]) -> dict[str, np.ndarray]:
    parts = {name: np.flatnonzero(part_of_row == i) for i, name in enumerate(fractions)}
    for name, rows in parts.items():
        if not len(rows) and fractions[name]:
            raise DataError(
                f"part {name!r} of the split would be empty: {len(part_of_row)} records at a fraction of "
                f"{fractions[name]}; raise the fraction or take another seed"
            )
    return parts
