"""Vectors of records, one each or one a token."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from meristem.errors import ConfigError
from meristem.files import replacing
from meristem.inference.encoding import Reading
from meristem.inference.engine import PLAIN_POOLS, Advance, Embedder, unheard
from meristem.inference.formats import WRITERS
from meristem.inference.job import Job, Running
from meristem.model.model import Model
from meristem.model_directory import ModelCard
from meristem.types import TokenColumn

CHUNK_VALUES = 1 << 24
"""Numbers that the vectors of a chunk hold about, where each token has one: 64 MB."""


class RunningEmbed(Running):
    """Embeds token columns."""

    def __init__(self, job: "Embed", card: ModelCard, model: Model, device: str):
        pool = job.pool or default_pool(card)
        self.reading = Reading.of(card)
        trunk = job.trunk(model, device, job.layer)
        self.embedder = Embedder(trunk, pool)
        self.tokens_per_batch = trunk.tokens_per_batch
        self.identity = {"pool": pool, "layer": trunk.layer}
        self.facts = {"width": self.embedder.width}
        self.fault = (
            f"its vector is not finite (layer {trunk.layer}, {job.precision}); the model is damaged, or needs "
            "--precision fp32"
        )
        self._is_pooled = self.is_reused = pool != "none"
        self._vocab = pa.array(card.tokenizer.vocab, pa.string())

    def rows(self, column: TokenColumn, advance: Advance = unheard) -> pa.Table:
        values = self.embedder.embed(column, advance)
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])
        lengths = column.payload_lengths
        columns = {"length": pa.array(lengths, pa.int32())}
        if self._is_pooled:
            return pa.table({**columns, "embedding": vectors})
        bounds = np.concatenate([[0], np.cumsum(lengths)])
        symbols = column.payload_ids
        # a patch is no symbol
        tokens = pa.DictionaryArray.from_arrays(pa.array(symbols, pa.int32(), mask=symbols < 0), self._vocab)
        offsets = pa.array(bounds, pa.int32())
        lists = {"tokens": tokens, "embedding": vectors}
        return pa.table({**columns, **{n: pa.ListArray.from_arrays(offsets, one) for n, one in lists.items()}})

    def num_values(self, column: TokenColumn) -> np.ndarray:
        return self.embedder.num_vectors(column)

    def most_symbols(self, most: int) -> int:
        return most if self._is_pooled else min(most, max(1024, CHUNK_VALUES // self.embedder.width))


@dataclass(frozen=True, kw_only=True)
class Embed(Job):
    """Embed records.

    Attributes:
        pool: mean, cls, max, own (the model's), or none for one vector a token; None for own, and mean where the model
            has none.
        layer: whose vectors are wanted: 0 is the embedding, -1 the last.
        format: parquet, or h5 or npz beside it.
    """

    verb: ClassVar[str] = "embed"
    running: ClassVar[type[Running]] = RunningEmbed

    pool: str | None = None
    layer: int = -1
    format: str = "parquet"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.format not in ("parquet", *WRITERS):
            raise ConfigError(f"format must be one of parquet, {', '.join(WRITERS)}; got {self.format!r}")

    def finish(self, parts: Path, output: Path, manifest: dict[str, Any]) -> None:
        if self.format == "parquet":
            return
        target = parts / f"embeddings.{self.format}"
        with replacing(target) as temporary:
            WRITERS[self.format](parts, temporary, manifest["records"], manifest["rows"])
        manifest["file"] = target.name


def default_pool(card: ModelCard) -> str:
    """The model's own pooling, and mean where it has none."""
    own = card.architecture.pool
    return next((name for name, pool in PLAIN_POOLS.items() if pool == own), "mean" if own is None else "own")
