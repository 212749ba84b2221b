"""Pictures: folders, tables and tar files in, patches as tokens, and the shapes of vision transformers."""

from pathlib import Path

from meristem.domain import Domain
from meristem.objectives.objective import Objective
from meristem_domains.vision.attention import ATTENTION
from meristem_domains.vision.presets import PRESETS
from meristem_domains.vision.reading import PictureReader
from meristem_domains.vision.tokenizer import tokenizer
from meristem_domains.vision.views import picture_views


def classify_digits() -> Objective:
    """The objective of the sample."""
    from meristem.objectives.supervised import Supervised, Target  # imports torchmetrics, which takes seconds

    return Supervised([Target(name="label")])


domain = Domain(
    name="vision",
    reader=PictureReader(),
    tokenizer=tokenizer,
    presets=PRESETS,
    sample=Path(__file__).parent / "digits.parquet",
    sample_options={"tokenizer": {"image_px": 8, "patch_px": 2, "num_channels": 1}, "views": {"shift_frac": 0.1}},
    sample_objective=classify_digits,
    views=picture_views,
    scorers={"attention": ATTENTION},
)

__all__ = ["domain"]
