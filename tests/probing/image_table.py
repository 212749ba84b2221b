"""A domain as a third party would write one: pictures in a column of a Parquet file."""

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from meristem.data.records import LABEL_PREFIX, SPLIT, ReadOptions, Source
from meristem.data.tables import batch_of
from meristem.domain import Domain
from meristem_domains.vision.patches import PatchTokenizer

SIDE_PX, PATCH_PX = 16, 4


def tokenizer() -> PatchTokenizer:
    return PatchTokenizer(image_px=(SIDE_PX, SIDE_PX), patch_px=PATCH_PX)


def read(source: Source, options: ReadOptions) -> Iterator[pa.RecordBatch]:
    table = pq.read_table(source.path).combine_chunks()
    extra = {LABEL_PREFIX + name: table[name].combine_chunks() for name in options.label_columns}
    if options.split_column:
        extra[SPLIT] = table[options.split_column].combine_chunks()
    ids, payloads = table["id"].combine_chunks(), table["image"].combine_chunks()
    yield batch_of(ids, payloads, source, np.arange(1, len(table) + 1), extra)


domain = Domain("image_table", read, tokenizer, {}, Path())


def write_images(path: Path, images: list[np.ndarray], **columns: list) -> Path:
    """A Parquet file of PNGs."""
    encoded = []
    for image in images:
        stream = io.BytesIO()
        Image.fromarray(image).save(stream, "PNG")
        encoded.append(stream.getvalue())
    ids = [f"i{number}" for number in range(len(images))]
    pq.write_table(pa.table({"id": ids, "image": pa.array(encoded, pa.large_binary()), **columns}), path)
    return path
