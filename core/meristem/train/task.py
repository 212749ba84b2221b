"""A model, an objective and an optimiser as Lightning runs them, exact in what is summed and what is random."""

import hashlib
import signal
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import lightning as L
import torch
from torch import nn
from torchmetrics import Metric

from meristem.errors import CheckpointError, ConfigError, require
from meristem.model.block import compile_blocks
from meristem.model.config import TransformerConfig
from meristem.model.grid import resampled
from meristem.model.model import Model
from meristem.model.plain import from_json
from meristem.model_directory import InputCard, ModelCard, load_card, load_model
from meristem.registry import name_of
from meristem.shapes import Tensor
from meristem.train.ema import MovingAverage
from meristem.train.optim import build_optimizer
from meristem.train.ranks import Ranks
from meristem.train.spec import ModelSpec
from meristem.types import PackedBatch, Term

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
"""Signals that end a run after a whole step; where two come, the first of these counts."""


@dataclass(frozen=True)
class StepResult:
    """Exact figures of one optimiser step or one validation, over all its packs and ranks.

    Attributes:
        loss: the sum of the terms' weighted means.
        terms: the mean of each term.
        num_tokens: rows that the trunk computed.
        is_scored: there was any target; without one there is no loss to speak of.
    """

    loss: float
    terms: Mapping[str, float]
    num_tokens: int
    is_scored: bool = True

    @property
    def losses(self) -> dict[str, float]:
        """The loss, and each term by its name where there are several."""
        terms = {f"loss/{name}": value for name, value in self.terms.items()}
        return {"loss": self.loss, **(terms if len(terms) > 1 else {})}


class NotFinite(ConfigError):
    """The loss is no number any more; nothing was saved after it."""


class Task(L.LightningModule):
    """Trains a model for an objective.

    Lightning divides a loss by the packs of a step and averages over ranks; the loss given to it is a sum
    divided by the targets of the whole step and multiplied by both, so every target weighs the same.

    Args:
        spec: what is trained; its objective is bound to the data by the data module.
        seed: random seed of initial weights and of what the model does at random.
    """

    def __init__(self, spec: ModelSpec, seed: int = 0):
        super().__init__()
        self.spec, self.seed, self.objective = spec, seed, spec.objective
        self.init_card: ModelCard | None = load_card(spec.init_from) if spec.init_from else None
        chosen = self.init_card.architecture if self.init_card else spec.architecture
        if chosen is None:
            raise ConfigError("model.architecture must be set, or model.init_from a model directory; got neither")
        if not isinstance(chosen, TransformerConfig):
            chosen = from_json(TransformerConfig, chosen)
        said = {name: value for name in ("dropout", "drop_path") if (value := getattr(spec, name)) is not None}
        chosen = replace(chosen, residual=replace(chosen.residual, **said))
        self.architecture = self.objective.complete(chosen)
        self.model: Model
        self.average: MovingAverage | None = None
        self.remarks: list[str] = []
        self.fresh_heads: tuple[str, ...] = ()
        self.metrics: dict[str, Metric] = {}
        self._confusions: dict[str, Metric] = {}
        self._sums: dict[str, Tensor] = {}
        self._weights: dict[str, float] = {}
        self._totals: dict[str, float] = {}
        self._num_tokens = 0
        self.grad_norm: Tensor = torch.zeros(())
        self.step_lr = 0.0
        self.wish = 0
        self._agreed_wish = 0

    @property
    def ranks(self) -> Ranks:
        """The processes that train together."""
        return Ranks.of(self.trainer)

    @property
    def card(self) -> ModelCard:
        """What a model directory says beside the weights."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        return ModelCard(
            architecture=self.architecture,
            tokenizer=data.tokenizer,
            heads=self.model.specs,
            domain=data.domain.name,
            inputs={name: data.input_cards.get(name, InputCard()) for name in self.objective.inputs},
            joined_by=name_of("meristem.objectives", type(self.objective)) if self.objective.joined_inputs else "",
        )

    def configure_model(self) -> None:
        """Build the model once data and objective are known; on the meta device it costs nothing."""
        if hasattr(self, "model"):
            return
        with torch.random.fork_rng():
            torch.manual_seed(fold(self.seed, "init"))
            self.model = Model(self.architecture, self.objective.heads)
            self.extra = self.objective.build(self.architecture)
        if self.spec.init_from and not self.trainer.ckpt_path:
            self._load_initial(self.spec.init_from)
        self.objective.start(self.model, self.extra, self.trainer.max_steps)
        self._freeze_unused()
        if self.spec.freeze_trunk:
            self.model.trunk.requires_grad_(False)
        if self.spec.ema_decay is not None:
            self.average = MovingAverage(self.spec.ema_decay, self.model, self.extra)
        if self.spec.compile:
            compile_blocks(self.model.trunk, self.trainer.strategy.root_device)
        self.metrics, self._confusions = self.objective.metrics(), self.objective.confusions()

    def _freeze_unused(self) -> None:
        """Freeze the model's own pool where nothing reads it: parameters without a gradient stop several processes."""
        pool = self.model.pool
        names = [] if pool is None else [name for name, _ in pool.named_parameters(prefix="pool")]
        is_read = self.objective.reads_pool or any(pool in self.model.head(name).shared for name in self.model.heads)
        if pool is not None and names and not is_read:
            pool.requires_grad_(False)
            self.remarks.append(
                f"frozen, since objective {type(self.objective).__name__} does not use the model's own pool "
                f"(architecture.pool): {', '.join(names)}"
            )

    @property
    def evaluated(self) -> Model:
        """The model that evaluations use and model directories hold: the average where there is one."""
        return self.model if self.average is None else self.average.model

    @property
    def evaluated_extra(self) -> nn.ModuleDict:
        """What the objective has beside `evaluated`."""
        return self.extra if self.average is None else self.average.extra

    def _load_initial(self, path: str) -> None:
        """Take over the trunk and the pool strictly, and each head that is the same; say which are new."""
        card, given = load_model(path)
        tensors = resampled(given.trunk.state_dict(), card.architecture, self.architecture)
        self.model.trunk.load_state_dict(tensors, strict=True)
        if self.model.pool is not None:  # the architecture is the given one's, pool and all
            assert given.pool is not None
            self.model.pool.load_state_dict(given.pool.state_dict(), strict=True)
        taken = []
        for name, head in self.model.heads.items():
            old = given.heads[name].state_dict() if name in given.heads else {}
            shapes = {key: value.shape for key, value in head.state_dict().items()}
            known = {readout.name: readout.classes for readout in given.readouts}
            same_classes = all(known.get(r.name) == r.classes for r in self.model.readouts if r.name == name)
            if shapes == {key: value.shape for key, value in old.items()} and same_classes:
                head.load_state_dict(old, strict=True)
                taken.append(name)
        self.fresh_heads = tuple(name for name in self.model.heads if name not in taken)
        self.remarks.append(
            f"{path}: trunk taken over{' and frozen' if self.spec.freeze_trunk else ''}"
            + (f", heads taken over: {', '.join(taken)}" if taken else "")
            + (f", new heads: {', '.join(self.fresh_heads)}" if self.fresh_heads else "")
        )

    def train(self, mode: bool = True) -> "Task":
        """A frozen trunk stays in evaluation mode: its dropout would be noise without a use."""
        super().train(mode)
        if self.spec.freeze_trunk and hasattr(self, "model"):
            self.model.trunk.eval()
        return self

    def configure_optimizers(self) -> Any:
        trained = nn.ModuleList([self.model, self.extra])  # a decoder or a head of the objective learns as well
        is_scaled = self.trainer.precision == "16-mixed"
        optimizer, schedule = build_optimizer(trained, self.spec.optimizer, self.trainer.max_steps, not is_scaled)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def training_step(self, batch: PackedBatch, batch_idx: int) -> Tensor:
        accumulate, world = self.trainer.accumulate_grad_batches, self.ranks.count
        micro = batch_idx % accumulate
        if micro == 0:
            self._sums, self._num_tokens = {}, 0
            self._totals = self._count_over_ranks(batch.step_counts)
        self._reseed(micro)
        out = self.objective.loss_of(self.model, self.extra, batch)
        loss = torch.zeros((), device=self.device)
        for name, term in out.terms.items():
            # a step without a target of this term adds nothing, but a gradient of zero
            share = 1 / self._totals[name] if self._totals[name] else 0.0
            loss = loss + term.sum * (term.weight * share * accumulate * world)
        self._add(out.terms)
        self._num_tokens += batch.layout.num_tokens
        return loss

    def _count_over_ranks(self, counts: Mapping[str, float]) -> dict[str, float]:
        """What each term counts in the whole step, on all ranks; wishes to stop travel with it."""
        names = sorted(counts)
        values = [*(counts[name] for name in names), *(float(self.wish == one) for one in STOP_SIGNALS)]
        summed = self.ranks.sum(torch.tensor(values, dtype=torch.float64)).tolist()
        self._agreed_wish = _first_wish(summed[len(names) :])
        return dict(zip(names, summed))

    def _reseed(self, micro: int) -> None:
        """Make everything random in the model a function of (seed, step, number of the pack in the step)."""
        pack = micro * self.ranks.count + self.ranks.number
        torch.manual_seed(fold(self.seed, "step", self.trainer.global_step, pack, 0))

    @property
    def stop_signal(self) -> int:
        """Number of the signal that asks all processes to stop after this step; 0 for none.

        One that reaches a process of several during a step (`wish`) is known to all of them in the next.
        """
        return self.wish if self.ranks.count == 1 else self._agreed_wish

    def agree_to_stop(self) -> int:
        """The same, of what was asked up to now; collective."""
        self._agreed_wish = _first_wish(self.ranks.any([self.wish == one for one in STOP_SIGNALS]))
        return self._agreed_wish

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip by the norm over all parameters, and keep that norm and the learning rate for the record."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.grad_norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]).detach()
        if gradient_clip_val:
            torch.nn.utils.clip_grads_with_norm_(parameters, float(gradient_clip_val), self.grad_norm)
        # with layer decay, that of the heads
        self.step_lr = max(float(group["lr"]) for group in optimizer.param_groups)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.objective.after_step(self.model, self.extra, self.ranks)
        if self.average is not None:
            self.average.update(self.model, self.extra, self.trainer.global_step + 1)

    def on_validation_epoch_start(self) -> None:
        self._sums, self._num_tokens = {}, 0
        for metric in (*self.metrics.values(), *self._confusions.values()):
            metric.to(self.device).reset()
            metric.dist_sync_fn = lambda values, group: self.ranks.gather(values)

    def validation_step(self, batch: PackedBatch, batch_idx: int) -> None:
        out = self.objective.loss_of(self.evaluated, self.evaluated_extra, batch)
        self._add(out.terms, is_counted=not batch.is_repeat)
        if batch.is_repeat:
            return
        self._num_tokens += batch.layout.num_tokens
        for name, metric in (*self.metrics.items(), *self._confusions.items()):
            key = name.partition("/")[0]
            if len(out.targets[key]):
                metric.update(out.predictions[key], out.targets[key])

    on_test_epoch_start = on_validation_epoch_start
    test_step = validation_step

    def metric_values(self) -> dict[str, float]:
        """Metrics of the part just evaluated, by name."""
        return {name: float(value) for name, value in self._computed(self.metrics).items()}

    def confusion_values(self) -> dict[str, Tensor]:
        """`[C, C]` by name: records (or tokens) of each class, by the class that they were taken for."""
        return {name: value.cpu() for name, value in self._computed(self._confusions).items()}

    def _computed(self, metrics: Mapping[str, Metric]) -> dict[str, Tensor]:
        """Metrics that any process has figures for; collective."""
        has_figures = self.ranks.any([metric.update_called for metric in metrics.values()])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a process without figures computes those of the others
            return {name: one.compute() for (name, one), is_there in zip(metrics.items(), has_figures) if is_there}

    def _add(self, terms: Mapping[str, Term], is_counted: bool = True) -> None:
        """Add up sums and counts on the device: no step waits for a figure; or nothing, but for the names."""
        for name, term in terms.items():
            pair = torch.stack([term.sum.detach().double(), term.count.detach().double()])
            pair = pair if is_counted else torch.zeros_like(pair)
            self._sums[name] = self._sums[name] + pair if name in self._sums else pair
            self._weights[name] = term.weight

    def summed(self) -> Tensor:
        """Sums and counts of all terms (in order of name), and tokens, over all ranks: `[2 * terms + 1]`."""
        parts = [self._sums[name] for name in sorted(self._sums)]
        tokens = torch.tensor([float(self._num_tokens)], dtype=torch.float64, device=self.device)
        return self.ranks.sum(torch.cat([*parts, tokens]))

    def result_of(self, flat: Tensor) -> StepResult:
        """The figures that `summed` gave, on the host."""
        *pairs, num_tokens = flat.tolist()
        sums = dict(zip(sorted(self._sums), zip(pairs[::2], pairs[1::2])))
        terms = {name: total / count if count else float("nan") for name, (total, count) in sums.items()}
        known = [self._weights[name] * terms[name] for name, (_, count) in sums.items() if count]
        return StepResult(sum(known) if known else float("nan"), terms, int(num_tokens), bool(known))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        packs_per_step = self.trainer.accumulate_grad_batches * self.ranks.count
        checkpoint["meristem"] = {"packs_per_step": packs_per_step, "seed": self.seed}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put Lightning's counters where they stand after a whole step, wherever the checkpoint was written."""
        said = checkpoint.get("meristem")
        if said is None:
            raise CheckpointError("the checkpoint was not written by meristem fit")
        packs_per_step = self.trainer.accumulate_grad_batches * self.ranks.count
        rule, was = "trainer.accumulate_grad_batches times devices must stay as it was", said["packs_per_step"]
        require(was == packs_per_step, rule, f"{packs_per_step}, was {was}")
        if "fit_loop" in checkpoint.get("loops", {}):
            packs = checkpoint["global_step"] * self.trainer.accumulate_grad_batches
            _place_loops(checkpoint["loops"]["fit_loop"], checkpoint["global_step"], packs)


def _place_loops(loops: dict[str, Any], step: int, packs: int) -> None:
    """Set the counters of Lightning's fit loop to "step whole steps done, validation after them done too".

    A checkpoint may be written in a hook, when some counters are ahead of others; Lightning then guesses
    where to go on. All of them follow from the step.
    """

    def set_all(progress: dict[str, Any], value: int) -> None:
        for part in ("total", "current"):
            for key in progress[part]:
                progress[part][key] = value

    set_all(loops["epoch_loop.batch_progress"], packs)
    loops["epoch_loop.batch_progress"]["is_last_batch"] = False
    set_all(loops["epoch_loop.scheduler_progress"], step)
    optimizer = loops["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]
    set_all(optimizer["step"], step)
    set_all(optimizer["zero_grad"], step)
    set_all(loops["epoch_loop.val_loop.batch_progress"], 0)
    loops["epoch_loop.state_dict"]["_batches_that_stepped"] = step
    for part in ("total", "current"):
        loops["epoch_progress"][part] |= {"ready": 1, "started": 1, "processed": 0, "completed": 0}


def _first_wish(has_wish: Sequence[float]) -> int:
    """The stop signal that counts of those that any process got."""
    return next((int(one) for one, wished in zip(STOP_SIGNALS, has_wish) if wished), 0)


def fold(seed: int, *parts: int | str) -> int:
    """One seed of many numbers: equal only where all are equal."""
    digest = hashlib.blake2b(repr((seed, *parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
