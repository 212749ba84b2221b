"""Writes the sample: the handwritten digits that ship with scikit-learn, as PNG files in a Parquet table.

    python -m meristem_domains.vision.make_sample

1,797 pictures of 8 x 8 pixels with 17 shades of grey (Alpaydin and Kaynak 1998, doi:10.24432/C50P49), scaled to 0..255.
The column `split` deals them out once and for all: 1,259 to train on, 179 for validation, 359 for the test, each class
in the same share.
"""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

SAMPLE = Path(__file__).parent / "digits.parquet"

SEED = 0


def split(labels: np.ndarray) -> list[str]:
    """The part of each digit: a fifth of each class for the test, a tenth for validation."""
    rng = np.random.default_rng(SEED)
    parts = np.full(len(labels), "train", object)
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        num_test, num_validation = round(len(rows) / 5), round(len(rows) / 10)
        parts[rows[:num_test]] = "test"
        parts[rows[num_test : num_test + num_validation]] = "validation"
    return parts.tolist()


def write(path: Path = SAMPLE) -> None:
    """Write the sample."""
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    payloads = []
    for pixels in np.round(digits.images * (255 / 16)).astype(np.uint8):
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, "PNG", optimize=True)
        payloads.append(stream.getvalue())
    table = pa.table(
        {
            "id": [f"digit{row:04d}" for row in range(len(payloads))],
            "image": pa.array(payloads, pa.binary()),
            "label": pa.array(digits.target, pa.int8()),
            "split": split(digits.target),
        }
    )
    pq.write_table(table, path, compression="zstd")


if __name__ == "__main__":
    write()
