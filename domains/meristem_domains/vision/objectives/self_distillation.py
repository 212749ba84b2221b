"""Self-distillation (DINO): from parts of a picture, a model predicts the output of its own moving average."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torchmetrics import Metric

from meristem.data.parts import Encoder, RunData
from meristem.errors import ConfigError, require
from meristem.model.config import Learned, TransformerConfig
from meristem.model.config.checks import require_frac
from meristem.model.model import Model
from meristem.model.outputs import Outputs, Wanted
from meristem.objectives.objective import Objective, Processes
from meristem.objectives.teacher import PrototypeHead, Teacher
from meristem.shapes import Float, Tensor
from meristem.types import INPUT, Layout, LossOut, PackedBatch, Record, Term, Tokens
from meristem_domains.vision.multi_crop import NUM_GLOBAL, MultiCrop
from meristem_domains.vision.patches import PatchTokenizer
from meristem_domains.vision.pictures import StandardImage

VIEW = "view"
"""Name of the label that holds the index of a sequence among the views of its record."""

DISTILLATION = "distillation"

SPREAD = "spread"

KOLEO_EPS = 1e-6
"""Added to a squared distance, so that two equal vectors give a finite loss; their gradient is 0."""


class SelfDistillation(Objective):
    """Self-distillation without labels (DINO; Caron 2021, arXiv 2104.14294).

    A record becomes two large views and some small ones, each a sequence of its own length, all in one pack. The
    student sees all views, the teacher the large ones. A head turns the model's pooled vector into scores of
    `num_prototypes`. The loss is the cross-entropy of the student's distribution over the prototypes relative to the
    teacher's, over all pairs of a large view and another view of the same record (equations 1 to 4). The teacher's
    weights are a moving average of the student's; its scores are centred and sharpened.

    The spread regulariser (KoLeo; Sablayrolles 2019, arXiv 1806.03198, as in Oquab 2023, arXiv 2304.07193) pushes the
    student's vectors of the large views away from their nearest neighbour among the other records of the pack, so it
    depends on which records a pack holds. It is 0 in a pack of one record.

    Args:
        crops: sizes of the views and their augmentations.
        num_prototypes: number of outputs of the head (K).
        hidden_width: width of the first two layers of the head.
        bottleneck_width: width of the third layer of the head.
        student_temperature: temperature of the student's distribution.
        teacher_temperature: temperature of the teacher's distribution after `warmup_steps`.
        first_temperature: temperature of the teacher's distribution in the first step; it changes linearly.
        warmup_steps: number of steps in which the teacher's temperature changes.
        momentum: share of the teacher's weights that is kept in the first step; it rises to 1 by a cosine over the run.
        center_momentum: share of the centre that is kept in each step.
        spread_weight: weight of the spread regulariser; 0 leaves it out.
    """

    payload_inputs = (INPUT,)
    reads_pool = True
    tokenizers: tuple[PatchTokenizer, PatchTokenizer]  # of large views and of small views; set by bind

    def __init__(
        self,
        crops: MultiCrop,
        num_prototypes: int = 4096,
        hidden_width: int = 2048,
        bottleneck_width: int = 256,
        student_temperature: float = 0.1,
        teacher_temperature: float = 0.04,
        first_temperature: float = 0.04,
        warmup_steps: int = 0,
        momentum: float = 0.996,
        center_momentum: float = 0.9,
        spread_weight: float = 0.1,
    ):
        widths = {"num_prototypes": num_prototypes, "hidden_width": hidden_width, "bottleneck_width": bottleneck_width}
        for name, width in widths.items():
            require(width >= 1, f"objective.{name} must be 1 or more", width)
        for name, temperature in (
            ("student_temperature", student_temperature),
            ("teacher_temperature", teacher_temperature),
            ("first_temperature", first_temperature),
        ):
            require(temperature > 0, f"objective.{name} must be above 0", temperature)
        require(warmup_steps >= 0, "objective.warmup_steps must be 0 or more", warmup_steps)
        require_frac(momentum, "objective.momentum")
        require_frac(center_momentum, "objective.center_momentum")
        require(spread_weight >= 0, "objective.spread_weight must be 0 or more", spread_weight)
        self.crops, self.num_prototypes = crops, num_prototypes
        self.hidden_width, self.bottleneck_width = hidden_width, bottleneck_width
        self.student_temperature, self.warmup_steps = student_temperature, warmup_steps
        self.temperatures = (first_temperature, teacher_temperature)
        self.momentum, self.center_momentum, self.spread_weight = momentum, center_momentum, spread_weight

    def bind(self, data: RunData) -> None:
        tokenizer = data.tokenizer
        if not isinstance(tokenizer, PatchTokenizer):
            raise ConfigError(f"objective SelfDistillation needs pictures; got a tokenizer of {tokenizer.kind}")
        for side in (self.crops.global_px, self.crops.local_px):
            rule = f"objective.crops: global_px and local_px must be multiples of a patch, {tokenizer.patch_px}"
            require(not side % tokenizer.patch_px, rule, side)
        large, small = (
            replace(tokenizer, image_px=(side, side), resize_px=None, crop_frac=1.0, max_patches=None)
            for side in (self.crops.global_px, self.crops.local_px)
        )
        self.tokenizers = (large, small)

    def bind_model(self, config: TransformerConfig) -> None:
        super().bind_model(config)
        if config.pool is None:
            raise ConfigError(
                "objective SelfDistillation needs a model with a pool of its own, such as "
                "pool: {kind: Prefix} for the class token (architecture.pool); got none"
            )
        if isinstance(config.position, Learned):
            raise ConfigError(
                "objective SelfDistillation needs positions that serve views of two sizes: position: "
                "{kind: SinCos2D} or {kind: Rotary, num_axes: 2} (architecture.position); got a learned table"
            )

    @property
    def view_lengths(self) -> tuple[int, int]:
        """Number of tokens of a large view and of a small view."""
        large, small = (int(np.prod(one.grid)) + sum(one.num_special) for one in self.tokenizers)
        return large, small

    def lengths(self, lengths: np.ndarray) -> np.ndarray:
        large, small = self.view_lengths
        return np.full_like(lengths, NUM_GLOBAL * large + self.crops.num_local * small)

    def prepare(self, record: Record, encode: Encoder, rng: np.random.Generator) -> tuple[Tokens, ...]:
        """One sequence of tokens for each view, which is cut out of the original picture."""
        large, small = self.tokenizers
        pixels = large.pixels(record.payload)
        if isinstance(pixels, StandardImage):
            raise ConfigError(
                "objective SelfDistillation cuts its views out of whole pictures: data.views must be null"
            )
        views = self.crops.draw(pixels, rng)
        encoded = [(large if view < NUM_GLOBAL else small).encode(pixels) for view, pixels in enumerate(views)]
        return tuple(replace(one, labels={VIEW: np.array(view)}) for view, one in enumerate(encoded))

    def counts(self, batch: PackedBatch) -> Mapping[str, float]:
        num_records = len(batch.records) // self.crops.num_views
        counts = {DISTILLATION: float(num_records * NUM_GLOBAL * (self.crops.num_views - 1))}
        if self.spread_weight:
            counts[SPREAD] = float(NUM_GLOBAL * num_records) if num_records > 1 else 0.0
        return counts | self.router_counts(batch)

    def build(self, config: TransformerConfig) -> nn.ModuleDict:
        def head(width: int) -> PrototypeHead:
            return PrototypeHead(width, self.hidden_width, self.bottleneck_width, self.num_prototypes, config.init)

        teacher = Teacher(config, head, self.temperatures, self.warmup_steps, self.momentum, self.center_momentum)
        assert teacher.model.pool is not None, "bind_model refuses a model without a pool"
        return nn.ModuleDict({"head": head(teacher.model.pool.width), "teacher": teacher})

    def start(self, model: Model, extra: nn.ModuleDict, total_steps: int) -> None:
        teacher, head = _parts(extra)
        teacher.begin_as(model, head, total_steps)

    def after_step(self, model: Model, extra: nn.ModuleDict, processes: Processes) -> None:
        teacher, head = _parts(extra)
        teacher.follow(model, head, processes.sum)

    def wanted(self, batch: PackedBatch) -> Wanted:
        return Wanted(is_pooled=True)

    def loss(self, outputs: Outputs, extra: nn.ModuleDict, batch: PackedBatch) -> LossOut:
        teacher, head = _parts(extra)
        num_views, vectors_SD = self.crops.num_views, outputs.pooled
        assert vectors_SD is not None, "the model was asked for its pool"
        student_NVC = by_record(head(vectors_SD).float(), batch, num_views)
        large = large_views(batch, self.view_lengths[0])
        teacher_NGC = by_record(teacher.scores(large), large, NUM_GLOBAL)
        if head.training:
            teacher.remember(teacher_NGC)
        targets_NGC = teacher.distribution(teacher_NGC)
        nats_NGV = pair_losses(targets_NGC, F.log_softmax(student_NVC / self.student_temperature, dim=-1))
        num_pairs = torch.tensor(float(len(nats_NGV) * NUM_GLOBAL * (num_views - 1)), device=nats_NGV.device)
        terms = {DISTILLATION: Term(nats_NGV.sum(), num_pairs)}
        if self.spread_weight:
            large_NGD = by_record(vectors_SD.float(), batch, num_views)[:, :NUM_GLOBAL]
            terms[SPREAD] = spread_term(large_NGD, self.spread_weight)
        # what shows a collapse: for each large view its entropy, and the divergence of the student from it
        entropy_NG = torch.special.entr(targets_NGC).sum(-1)
        gap_NG = nats_NGV.detach().sum(-1) / (num_views - 1) - entropy_NG
        figures = torch.stack([entropy_NG, gap_NG], dim=-1).flatten(0, 1)
        return LossOut(terms, {DISTILLATION: figures}, {DISTILLATION: targets_NGC.flatten(0, 1)})

    def metrics(self) -> dict[str, Metric]:
        return {
            **super().metrics(),
            f"{DISTILLATION}/teacher_entropy": FigureMean(0),
            f"{DISTILLATION}/used_entropy": UsedEntropy(self.num_prototypes),
            f"{DISTILLATION}/gap": FigureMean(1),
        }


def _parts(extra: nn.ModuleDict) -> tuple[Teacher, PrototypeHead]:
    teacher, head = extra["teacher"], extra["head"]
    assert isinstance(teacher, Teacher)
    assert isinstance(head, PrototypeHead)
    return teacher, head


def by_record(values: Float[Tensor, "S C"], batch: PackedBatch, num_views: int) -> Float[Tensor, "N V C"]:
    """Values of the sequences of a pack, sorted by record and view."""
    places = {record: place for place, record in enumerate(dict.fromkeys(batch.records))}
    assert len(values) == len(places) * num_views, "a pack holds every view of a record"
    place_S = torch.tensor([places[record] for record in batch.records]).to(values.device)
    order_S = torch.argsort(place_S * num_views + batch.labels[VIEW])
    return values[order_S].unflatten(0, (len(places), num_views))


def large_views(batch: PackedBatch, length: int) -> PackedBatch:
    """The large views of a pack, which are its last rows, since packs are sorted by length."""
    lengths = batch.layout.lengths
    first = lengths.index(length)
    assert set(lengths[first:]) == {length}, "a large view lies before a small one"
    start = batch.layout.starts[first]
    rows = slice(start, None)
    assert batch.features is not None
    special = tuple(row - start for row in batch.layout.special_rows if row >= start)
    layout = Layout(lengths[first:], batch.layout.num_spare, batch.layout.device, special_rows=special)
    return PackedBatch(
        layout=layout,
        positions=batch.positions[rows],
        ids=batch.ids[rows],
        features=batch.features[rows],
        labels={VIEW: batch.labels[VIEW][first:]},
        records=batch.records[first:],
    )


def pair_losses(targets: Float[Tensor, "N G C"], log_probs: Float[Tensor, "N V C"]) -> Float[Tensor, "N G V"]:
    """Cross-entropy (nats) of each view relative to each large view of its record; 0 for a view and itself."""
    nats_NGV = -torch.einsum("ngc,nvc->ngv", targets, log_probs)
    is_other_GV = ~torch.eye(targets.shape[1], log_probs.shape[1], dtype=torch.bool, device=targets.device)
    return nats_NGV * is_other_GV


def spread_term(vectors: Float[Tensor, "N G D"], weight: float) -> Term:
    """Minus the sum of log distances to the nearest neighbour, among the same views of other records."""
    num_records, num_large, _ = vectors.shape
    if num_records < 2:
        return Term(vectors.sum() * 0.0, torch.zeros((), device=vectors.device), weight)
    unit_GND = F.normalize(vectors, dim=-1).transpose(0, 1)
    with torch.no_grad():
        cosines_GNN = unit_GND @ unit_GND.transpose(1, 2)
        own = torch.eye(num_records, dtype=torch.bool, device=vectors.device)
        nearest_GN = cosines_GNN.masked_fill(own, -2.0).argmax(-1)
    neighbours_GND = unit_GND.gather(1, nearest_GN[..., None].expand_as(unit_GND))
    squares_GN = (unit_GND - neighbours_GND).square().sum(-1)
    logs_GN = 0.5 * (squares_GN + KOLEO_EPS).log()
    count = torch.tensor(float(num_records * num_large), device=vectors.device)
    return Term(-logs_GN.sum(), count, weight)


class FigureMean(Metric):
    """The mean of one of the figures of the large views over an evaluation.

    If the teacher's output is uniform for every picture, its mean entropy is log K, the highest value.

    Args:
        column: 0 for the entropy (nats) of the teacher's distribution; 1 for the divergence (nats) of the student's
            distributions from it, which is the loss minus the entropy.
    """

    total: torch.Tensor
    count: torch.Tensor

    def __init__(self, column: int) -> None:
        super().__init__()
        self.column = column
        # not torchmetrics' MeanMetric, which falls back to single precision when a model is moved
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, figures: torch.Tensor, distributions: torch.Tensor) -> None:
        self.total += figures[:, self.column].double().sum()
        self.count += len(figures)

    def compute(self) -> torch.Tensor:
        return self.total / self.count


class UsedEntropy(Metric):
    """The entropy (nats) of the teacher's mean distribution; log K where all prototypes are used alike.

    It is low if the teacher's output is the same for all pictures.
    """

    total: torch.Tensor

    def __init__(self, num_prototypes: int) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(num_prototypes, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, figures: torch.Tensor, distributions: torch.Tensor) -> None:
        self.total += distributions.double().sum(0)

    def compute(self) -> torch.Tensor:
        return torch.special.entr(self.total / self.total.sum()).sum()
