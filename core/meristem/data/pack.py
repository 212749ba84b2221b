"""From token sequences to packs: end to end, shortest first, no padding."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import DTypeLike

from meristem.types import IGNORE, Layout, PackedBatch, TokenColumn, Tokens


def pack(sequences: Sequence[Tokens], records: Sequence[int]) -> PackedBatch:
    """Lay sequences end to end, sorted by length, so that equal lengths are neighbours.

    Spare rows (symbol 0, position 0, targets `IGNORE`) fill a pack up to `MIN_ROWS`. A sequence without
    a target or label that another one has gets it filled in as missing.

    Args:
        sequences: at least one of the main side. Of each other side there are none, or as many: its i-th sequence
            belongs to the i-th of the main side.
        records: index of the record that each sequence came from.
    """
    assert len(sequences) == len(records)
    places: dict[str, list[int]] = {"": []}
    for i, tokens in enumerate(sequences):
        places.setdefault(tokens.side, []).append(i)
    main = places.pop("")
    assert main, "a pack holds at least one sequence"
    for name, side in places.items():
        assert len(side) == len(main), f"{len(side)} sequences of the side {name!r} for {len(main)} others"
        assert all(records[s] == records[m] for s, m in zip(side, main)), f"a sequence of {name!r} is another record's"
    # equal lengths of the other sides become neighbours as well, where they can
    order = np.lexsort([[len(sequences[i]) for i in side] for side in (*places.values(), main)])  # the last key leads

    def packed(side: list[int], sides: Mapping[str, PackedBatch]) -> PackedBatch:
        fields = _lay([sequences[side[i]] for i in order])
        return PackedBatch(**fields, records=tuple(int(records[side[i]]) for i in order), sides=sides)

    return packed(main, {name: packed(side, {}) for name, side in places.items()})


def pack_column(column: TokenColumn, rows: np.ndarray, records: Sequence[int], is_pinned: bool = False) -> PackedBatch:
    """The pack of `rows` of a column, equal to `pack` of the same sequences, without a loop over them.

    Args:
        rows: rows of the column, in any order; at least one.
        records: index of the record that each of `rows` came from.
        is_pinned: made in pinned memory, from which a GPU fetches while others work.
    """
    assert len(rows), "a pack holds at least one sequence"
    assert len(rows) == len(records)
    rows = np.asarray(rows)
    order = np.argsort(column.lengths[rows], kind="stable")
    index, offsets = column.index_of(rows[order])
    lengths = np.diff(offsets)
    layout = Layout.of(lengths, is_special=None if column.is_special is None else column.is_special[index])
    if column.positions is None:
        positions = (np.arange(layout.num_tokens) - np.repeat(offsets[:-1], lengths))[:, None]
    else:
        positions = column.positions[index]

    def empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Rows of all tokens, still to be filled; the spare ones are zeros."""
        made = torch.empty(layout.num_rows, *shape, dtype=dtype, pin_memory=is_pinned)
        made[layout.num_tokens :] = 0
        return made

    def filled(values: np.ndarray) -> torch.Tensor:
        made = empty(values.shape[1:], torch.int64)
        made[: layout.num_tokens].numpy()[:] = values
        return made

    features = None
    if column.features is not None:  # many bytes: gathered by all threads, once, to where they are needed
        features = empty(column.features.shape[1:], torch.float32)
        values = torch.from_numpy(np.require(column.features, np.float32, "W"))  # what is read-only torch does not take
        torch.index_select(values, 0, torch.from_numpy(index), out=features[: layout.num_tokens])
    return PackedBatch(
        layout=layout,
        positions=filled(positions),
        ids=filled(column.ids[index]),
        features=features,
        token_types=None if column.token_types is None else filled(column.token_types[index]),
        records=tuple(np.asarray(records)[order].tolist()),
    )


def column_of(sequences: Sequence[Tokens], replaced: Mapping[str, int] | None = None) -> TokenColumn:
    """Sequences end to end, all of symbols or all of patches."""
    named = {name: [getattr(tokens, name) for tokens in sequences] for name in TokenColumn.ROW_FIELDS}
    joined: dict[str, Any] = {
        name: np.concatenate(values) for name, values in named.items() if values and values[0] is not None
    }
    ids = np.concatenate([np.zeros(0, np.int64), *(tokens.ids for tokens in sequences)])
    return TokenColumn(ids, np.cumsum([0, *map(len, sequences)]), replaced or {}, **joined)


def _lay(sequences: list[Tokens]) -> dict[str, Any]:
    """The fields of one side of a pack, in the order of `sequences`."""
    no = np.zeros(max(map(len, sequences)), bool)
    is_special = [no[: len(tokens)] if tokens.is_special is None else tokens.is_special for tokens in sequences]
    layout = Layout.of([len(tokens) for tokens in sequences], is_special=np.concatenate(is_special))
    if any(tokens.prefix_length for tokens in sequences):
        layout = replace(layout, prefix_lengths=tuple(tokens.prefix_length for tokens in sequences))

    def rows(values: list[np.ndarray | None], fill: int = 0, dtype: DTypeLike = np.int64) -> torch.Tensor | None:
        """One field of all sequences, end to end; `fill` for sequences that lack it, None if all lack it."""
        shape = next((np.shape(one)[1:] for one in values if one is not None), None)
        if shape is None:
            return None
        blank = np.broadcast_to(np.array(fill, dtype), (layout.max_length, *shape))
        out = np.full((layout.num_rows, *shape), fill, dtype)
        parts = [blank[: len(tokens)] if one is None else one for tokens, one in zip(sequences, values)]
        np.concatenate(parts, out=out[: layout.num_tokens], casting="unsafe")
        return torch.from_numpy(out)

    targets, labels = {}, {}
    for name, like in _first_of([tokens.targets for tokens in sequences]).items():
        targets[name] = rows([tokens.targets.get(name) for tokens in sequences], IGNORE, _tensor_dtype(like))
    for name, like in _first_of([tokens.labels for tokens in sequences]).items():
        dtype = _tensor_dtype(like)
        missing = np.full(like.shape, np.nan if dtype == np.float32 else IGNORE, dtype)
        stacked = np.stack([np.asarray(tokens.labels.get(name, missing), dtype) for tokens in sequences])
        labels[name] = torch.from_numpy(stacked)
    return {
        "layout": layout,
        "positions": rows([tokens.positions for tokens in sequences]),
        "ids": rows([tokens.ids for tokens in sequences]),
        "features": rows([tokens.features for tokens in sequences], dtype=np.float32),
        "token_types": rows([tokens.token_types for tokens in sequences]),
        "targets": targets,
        "labels": labels,
    }


def _first_of(named: list[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Every name that occurs, with the first array that bears it."""
    found: dict[str, np.ndarray] = {}
    for values in named:
        for name, value in values.items():
            found.setdefault(name, np.asarray(value))
    return found


def _tensor_dtype(like: np.ndarray) -> np.dtype:
    return np.dtype(np.float32 if np.issubdtype(like.dtype, np.floating) else np.int64)
