"""Pictures: folders, tables and tar files in, patches as tokens, and the shapes of vision transformers."""

from pathlib import Path

from meristem.domain import Domain
from meristem_domains.vision.attention import ATTENTION
from meristem_domains.vision.augment import augment
from meristem_domains.vision.presets import PRESETS
from meristem_domains.vision.reading import files, read
from meristem_domains.vision.tokenizer import tokenizer

domain = Domain(
    name="vision",
    read=read,
    tokenizer=tokenizer,
    presets=PRESETS,
    sample=Path(__file__).parent / "digits.parquet",
    sample_tokenizer={"image_px": 8, "patch_px": 2, "num_channels": 1},
    files=files,
    augment=augment,
    scorers={"attention": ATTENTION},
)

__all__ = ["domain"]
