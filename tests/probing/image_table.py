"""Pictures in a column of a Parquet file."""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from meristem_domains.vision.patches import PatchTokenizer

SIDE_PX, PATCH_PX = 16, 4


def tokenizer() -> PatchTokenizer:
    return PatchTokenizer(image_px=(SIDE_PX, SIDE_PX), patch_px=PATCH_PX)


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
