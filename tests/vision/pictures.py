"""Pictures on disk, in the ways that people keep them."""

import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from meristem.data.records import ReadOptions, Source, record_at
from meristem.types import Record
from meristem_domains.vision import domain


def encoded(rng: np.random.Generator, kind: str = "PNG", height: int = 12, width: int = 16, shade: int = 0) -> bytes:
    """A noisy picture; its mean grows with the shade."""
    pixels = np.clip(rng.integers(0, 120, (height, width, 3)) + 40 * shade, 0, 255).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


def write_folder(root: Path, contents: Mapping[str, bytes]) -> Path:
    """Files at paths."""
    for name, content in contents.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


def write_tar(path: Path, contents: Mapping[str, bytes], mode: str = "w") -> Path:
    """Members in the order given."""
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, content in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def classes(rng: np.random.Generator, count: int = 4) -> dict[str, bytes]:
    """Class folders, in the order in which they are read."""
    return {
        f"{name}/{i:03d}.png": encoded(rng, shade=shade)
        for shade, name in enumerate(("cat", "dog"))
        for i in range(count)
    }


def read_all(path: Path | str, **options: object) -> list[Record]:
    """Records of a source."""
    batches = domain.reader.read(Source(str(path)), ReadOptions(**options))  # type: ignore[arg-type]
    return [record_at(batch, row) for batch in batches for row in range(batch.num_rows)]


def labels(records: list[Record], name: str = "label") -> list[object]:
    return [record.labels.get(name) for record in records]


def as_json(**values: object) -> bytes:
    return json.dumps(values).encode()


def column(values: list[bytes]) -> pa.Array:
    return pa.array(values, pa.binary())
