"""The vision domain: readers of pictures, patches as tokens, and the architectures of vision transformers."""

from pathlib import Path

from meristem.domain import Domain
from meristem.objectives.objective import Objective
from meristem_domains.vision.attention import ATTENTION
from meristem_domains.vision.presets import PRESETS
from meristem_domains.vision.reading import PictureReader
from meristem_domains.vision.tokenizer import tokenizer
from meristem_domains.vision.views import PictureViews


def classify_digits() -> Objective:
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
    views=PictureViews,
    scorers={"attention": ATTENTION},
)

__all__ = ["domain"]
