"""Vectors of the records of a store, cached in a folder that is named by a hash of everything they depend on."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from meristem.data.records import PAYLOAD, Source
from meristem.data.store import RecordStore
from meristem.data.tokenizer import column_bytes
from meristem.errors import DataError
from meristem.inference.embed import Embed
from meristem.inference.engine import best_device, best_precision
from meristem.inference.formats import read_embeddings
from meristem.inference.output import MANIFEST, read_manifest
from meristem.inference.run import run_job
from meristem.model_directory import hash_weights
from meristem.probing.fit import Watch


def stored_vectors(
    store: RecordStore,
    model: Path,
    inputs: Sequence[str],
    job: Embed,
    cache_dir: Path,
    title: str,
    watch: Watch,
) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """The vectors of the records of a store, from the cache where they are there.

    Args:
        inputs: the files of the store, in its order.
        job: how to embed; its `read` is that of the store.
        title: what `watch` calls the work.

    Returns:
        `[M]` rows of the store that have a vector, which are all but those that the tokenizer refused; `[M, D]`
        vectors; and their manifest.
    """
    folder = cache_dir / _key(store, model, inputs, job)
    is_there = (folder / MANIFEST).exists() and bool(read_manifest(folder).get("complete"))
    if is_there:
        manifest = read_manifest(folder)
    else:
        with watch.embedding(title) as report:
            manifest = run_job(job, model, inputs, folder, report)
    vectors = read_embeddings(folder)
    ids = np.array(store.column("id").to_pylist(), object)
    rows = np.arange(len(store))
    if len(vectors) != len(store):
        refused = {(one["file"], one["line"], one["id"]) for one in manifest["refused"]["records"]}
        places = zip(store.column("file").to_pylist(), store.column("line").to_pylist(), ids.tolist())
        rows = np.flatnonzero([place not in refused for place in places])
    if len(rows) != len(vectors) or (ids[rows] != vectors.ids).any():
        raise DataError(f"{folder}: holds vectors of other records; remove it and run the command again")
    if is_there:
        watch.reused(len(rows))
    return rows, vectors.values, manifest


def _key(store: RecordStore, model: Path, inputs: Sequence[str], job: Embed) -> str:
    """A hash of everything the vectors depend on, which labels and splits are not."""
    device = best_device()
    wanted = asdict(replace(job, precision=best_precision(job.precision, device)))
    wanted["read"] = {name: wanted["read"][name] for name in ("columns", "id_column")}
    wanted |= {"model": hash_weights(model), "device": device}
    wanted.pop("tokens_per_batch")
    # refused records are known by their files
    wanted["inputs"] = [Source(name).name for name in inputs] if job.is_skipping else []
    digest = hashlib.blake2b(json.dumps(wanted, sort_keys=True, default=str).encode(), digest_size=16)
    for name in ("id", PAYLOAD):
        for chunk in store.column(name).chunks:
            text, bounds = column_bytes(chunk)
            digest.update(np.diff(bounds).tobytes())
            digest.update(text.data)
    return digest.hexdigest()
