"""Pictures that differ by kind, and a model that self-distillation can train in seconds."""

import io

import numpy as np
import torch
from PIL import Image
from torch import nn

from labelled import ready
from meristem.data.pack import pack
from meristem.data.parts import RunData
from meristem.model.config import Attention, Embedding, FeedForward, Init, Prefix, SinCos2D, TransformerConfig
from meristem.model.model import Model
from meristem.train.ranks import Ranks
from meristem.types import PackedBatch, Record
from meristem_domains.vision.multi_crop import MultiCrop
from meristem_domains.vision.objectives.self_distillation import SelfDistillation
from meristem_domains.vision.patches import PatchTokenizer

TOKENIZER = PatchTokenizer((16, 16), 4)

CONFIG = TransformerConfig(
    width=32,
    num_layers=2,
    embedding=Embedding(vocab_size=1, patch_features=48),
    position=SinCos2D(),
    attention=Attention(num_heads=4),
    feedforward=FeedForward(width=64),
    pool=Prefix(),
    init=Init(std=0.15),  # of so small a model, about what keeps the size of rows
)

CROPS = MultiCrop(global_px=16, local_px=8, num_local=2, local_scale=(0.3, 0.5), blur_px=(0.1, 0.5))

NUM_PROTOTYPES = 16

GROUNDS = ((200, 60, 60), (60, 200, 60), (60, 60, 200), (180, 180, 60))


def objective_of(**options) -> SelfDistillation:
    """A small objective, bound to pictures and model."""
    small = {"crops": CROPS, "num_prototypes": NUM_PROTOTYPES, "hidden_width": 32, "bottleneck_width": 16}
    objective = SelfDistillation(**{**small, **options})
    objective.bind_model(CONFIG)
    objective.bind(RunData(TOKENIZER))
    return objective


def picture_records(rng: np.random.Generator, count: int) -> list[Record]:
    """Stripes on a ground of one of four colours, with noise; the kind is the label."""
    records = []
    for i in range(count):
        kind = i % len(GROUNDS)
        rows, columns = np.indices((20, 20))
        wave = np.sin(1.2 * (rows if kind % 2 else columns) + rng.uniform(0, 6))
        pixels = np.array(GROUNDS[kind]) + 40 * wave[..., None]
        pixels = (pixels + rng.normal(0, 20, pixels.shape)).clip(0, 255).astype(np.uint8)
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, "PNG")
        records.append(Record.of(str(i), stream.getvalue(), {"kind": kind}))
    return records


def packed_views(objective: SelfDistillation, records: list[Record], seed: int = 0) -> PackedBatch:
    """The pack of all views of these records."""
    rngs = [np.random.default_rng([seed, row]) for row in range(len(records))]
    views = [objective.prepare(record, ready(), rng) for record, rng in zip(records, rngs)]
    return pack([one for of_record in views for one in of_record], [r for r, some in enumerate(views) for _ in some])


def built(
    objective: SelfDistillation, total_steps: int = 100, config: TransformerConfig = CONFIG
) -> tuple[Model, nn.ModuleDict]:
    """A model and what training needs beside it."""
    model, extra = Model(config), objective.build(config)
    objective.start(model, extra, total_steps)
    return model, extra


def take_step(
    objective: SelfDistillation,
    model: Model,
    extra: nn.ModuleDict,
    batch: PackedBatch,
    optimizer: torch.optim.Optimizer,
) -> float:
    """One step as the task takes it: sums divided by counts."""
    out = objective.loss_of(model, extra, batch)
    counts = objective.counts(batch)
    loss = sum(term.weight * term.sum / counts[name] for name, term in out.terms.items() if counts[name])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    objective.after_step(model, extra, Ranks())
    return float(loss.detach())


def with_life(extra) -> None:
    """A teacher that has moved away, and a centre."""
    with torch.no_grad():
        for parameter in extra["teacher"].parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
        extra["teacher"].center.normal_(std=0.2)
