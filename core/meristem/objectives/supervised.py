"""Labels of records and of tokens: classes and values, several at once, some of them missing."""

import warnings
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torchmetrics import Metric
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassConfusionMatrix,
    MulticlassF1Score,
    MulticlassMatthewsCorrCoef,
)
from torchmetrics.regression import MeanAbsoluteError, R2Score, SpearmanCorrCoef

from meristem.data.parts import Encoder, RunData
from meristem.errors import ConfigError, require
from meristem.model.heads import HeadSpec
from meristem.model.heads.labels import Standardise
from meristem.model.model import Model
from meristem.model.outputs import Outputs, Wanted
from meristem.objectives.mixing import PARTNER, SHARE, Mixing, mix
from meristem.objectives.objective import Objective, Processes
from meristem.objectives.targets import BoundTarget, Target, encode_labels, learn
from meristem.shapes import Float, Int, Tensor
from meristem.types import IGNORE, LossOut, PackedBatch, Record, Term, Tokens


class Supervised(Objective):
    """Predict labels: the text of a class is its name, values are numbers.

    A label that is missing counts for nothing: one that is null or empty, or a word of `data.missing_labels`. Classes
    are those of the training records, by number where all names are whole numbers, else by the alphabet.

    Args:
        targets: what is predicted; at least one.
        mixing: of records of patches in pairs, in training; for classes of whole records, without weights.
    """

    def __init__(self, targets: list[Target], mixing: Mixing = Mixing()):  # noqa: B008 (frozen)
        names = [target.name for target in targets]
        is_once = bool(names) and len(set(names)) == len(names)
        require(is_once, "objective.targets must name one column or more, each once", names)
        self.targets = tuple(targets)
        self.label_columns = tuple(names)
        self.mixing = mixing
        self._bound: dict[str, BoundTarget] = {}
        self._grid: tuple[int, ...] = ()
        for target in targets if mixing.is_on else ():
            if target.level == "token" or target.task == "regression" or target.class_weights is not None:
                raise ConfigError(
                    f"objective.mixing needs targets that are classes of whole records, without class_weights; "
                    f"{target.name!r} is not"
                )

    def bind(self, data: RunData) -> None:
        self._grid = data.tokenizer.grid
        if self.mixing.is_on and not self._grid:
            raise ConfigError(
                "objective.mixing needs records that are patches on one grid, as data.tokenizer makes them; "
                "otherwise set mixing.rate: 0"
            )
        self._bound = {target.name: learn(target, data) for target in self.targets}
        while data.leave_out():  # once more: classes and scales are those of the records that are left
            self._bound = {target.name: learn(target, data) for target in self.targets}
        self.remarks = tuple(bound.remark for bound in self._bound.values())

    @property
    def heads(self) -> Mapping[str, HeadSpec]:
        return {name: bound.readout for name, bound in self._bound.items()}

    def prepare(self, record: Record, encode: Encoder, rng: np.random.Generator) -> tuple[Tokens, ...]:
        tokens = encode(self.inputs[0])
        labels, targets = {}, {}
        for name, bound in self._bound.items():
            known = encode_labels(record.labels.get(name), bound, record)
            if bound.target.level == "record":
                labels[name] = known
            else:
                targets[name] = self._token_targets(known, bound, tokens)
        return (replace(tokens, labels={**tokens.labels, **labels}, targets={**tokens.targets, **targets}),)

    @staticmethod
    def _token_targets(encoded: np.ndarray, bound: BoundTarget, tokens: Tokens) -> np.ndarray:
        """Targets of the rows of a sequence, which may be a window of its record (its spans say which)."""
        inner = tokens.payload_rows
        rows = np.full(len(tokens), IGNORE, np.int64 if bound.is_classes else np.float32)
        if encoded.ndim:
            assert tokens.spans is not None, "targets of tokens need to know where each token lies"
            encoded = encoded[tokens.spans[inner, 0]]
            rows[inner] = encoded if bound.is_classes else np.where(np.isnan(encoded), IGNORE, encoded)
        return rows

    def counts(self, batch: PackedBatch) -> Mapping[str, float]:
        """As torch's cross-entropy counts: with class weights, the sum of the weights of the targets."""
        counts = {}
        for name, bound in self._bound.items():
            known = _known(self._of(batch, bound))[1]
            counts[name] = float(len(known))
            if bound.class_weights:
                weights_C = torch.tensor(bound.class_weights, dtype=torch.float64)
                counts[name] = float(weights_C[known.long().cpu()].sum())
        return counts | self.router_counts(batch)

    @staticmethod
    def _of(batch: PackedBatch, bound: BoundTarget) -> Tensor:
        """`[S]` or `[T]` targets in a pack."""
        return (batch.labels if bound.target.level == "record" else batch.targets)[bound.target.name]

    def seen(self, batch: PackedBatch, is_training: bool) -> PackedBatch:
        """In training with its records mixed in pairs, but for those that lack a label."""
        if not (is_training and self.mixing.is_on):
            return batch
        may_S = torch.stack([batch.labels[name] != IGNORE for name in self._bound]).all(0)
        return mix(batch, self.mixing, self._grid, may_S)

    def wanted(self, batch: PackedBatch) -> Wanted:
        return Wanted(tuple(self._bound), num_first=0)

    def loss(self, outputs: Outputs, extra: nn.ModuleDict, batch: PackedBatch) -> LossOut:
        terms, predictions, targets = {}, {}, {}
        for name, bound in self._bound.items():
            labels_R = self._of(batch, bound)
            rows_M, wanted_M = _known(labels_R)
            out_MC = outputs.heads[name].index_select(0, rows_M).float()
            count = torch.tensor(float(len(rows_M)), device=out_MC.device)
            if bound.is_classes:
                nats_M = _class_nats(out_MC, wanted_M, bound, outputs.is_training)
                if PARTNER in batch.labels:
                    others_M, shares_M = labels_R[batch.labels[PARTNER][rows_M]], batch.labels[SHARE][rows_M]
                    nats_M = torch.lerp(_class_nats(out_MC, others_M, bound, outputs.is_training), nats_M, shares_M)
                total = nats_M.sum()
                if bound.class_weights:
                    count = torch.tensor(bound.class_weights, device=total.device).index_select(0, wanted_M).sum()
                predictions[name], targets[name] = out_MC.detach(), wanted_M
            else:
                total = F.mse_loss(out_MC[:, 0], wanted_M, reduction="sum")
                mean, std = bound.readout.mean[0], bound.readout.std[0]
                predictions[name], targets[name] = out_MC.detach()[:, 0] * std + mean, wanted_M * std + mean
            terms[name] = Term(total, count, bound.target.weight)
        if outputs.is_training:
            terms |= self.more_terms(batch, outputs)
        return LossOut(terms, predictions, targets)

    def more_terms(self, batch: PackedBatch, outputs: Outputs) -> dict[str, Term]:
        """What else training asks of the outputs of a pack, as the model read it: nothing here."""
        return {}

    def after_step(self, model: Model, extra: nn.ModuleDict, processes: Processes) -> None:
        for module in model.heads.modules():
            if isinstance(module, Standardise):
                module.take_in(processes.gather)

    def metrics(self) -> dict[str, Metric]:
        found = super().metrics()
        for name, bound in self._bound.items():
            if bound.is_classes:
                num = len(bound.readout.classes)
                found[f"{name}/accuracy"] = MulticlassAccuracy(num, average="micro")
                if num > 5:
                    found[f"{name}/top5"] = MulticlassAccuracy(num, top_k=5, average="micro")
                found[f"{name}/mcc"] = MulticlassMatthewsCorrCoef(num)
                found[f"{name}/macro_f1"] = MulticlassF1Score(num, average="macro")
            else:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", UserWarning)  # it keeps every value: a rank needs them all
                    found[f"{name}/spearman"] = SpearmanCorrCoef()
                found[f"{name}/mae"] = MeanAbsoluteError()
                found[f"{name}/r2"] = R2Score()
        return found

    def confusions(self) -> dict[str, Metric]:
        return {
            name: MulticlassConfusionMatrix(len(bound.readout.classes))
            for name, bound in self._bound.items()
            if bound.is_classes
        }


def _known(values: Tensor) -> tuple[Int[Tensor, "M"], Tensor]:
    """Rows that have a target, and their targets."""
    rows = ((values != IGNORE) & ~values.isnan()).nonzero().squeeze(1)
    return rows, values.index_select(0, rows)


def _class_nats(
    logits: Float[Tensor, "M C"], wanted: Int[Tensor, "M"], bound: BoundTarget, is_training: bool
) -> Float[Tensor, "M"]:
    """Cross-entropies; smoothed in training alone, so that evaluations compare."""
    weights_C = torch.tensor(bound.class_weights, device=logits.device) if bound.class_weights else None
    smoothing = bound.target.label_smoothing if is_training else 0.0
    return F.cross_entropy(logits, wanted, weights_C, reduction="none", ignore_index=IGNORE, label_smoothing=smoothing)
