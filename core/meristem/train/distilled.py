"""Learning labels from a teacher as well: a trained model whose answers are targets beside the labels."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from meristem.data.parts import RunData
from meristem.errors import ConfigError, require
from meristem.model.heads import readouts_of
from meristem.model.model import Model
from meristem.model.outputs import Outputs
from meristem.model_directory import load_any
from meristem.objectives.mixing import Mixing
from meristem.objectives.supervised import Supervised, Target
from meristem.types import PackedBatch, Term


class Distilled(Supervised):
    """Predict labels, and what a teacher says of the same packs (Hinton 2015, arXiv 1503.02531).

    The loss of the teacher stands beside that of the labels as `<target>_teacher`; a record without a label has it too.
    Evaluation is that of `Supervised`. The teacher is in no checkpoint: its directory must stay where it is.

    Args:
        targets: what is predicted: classes of whole records, which the teacher predicts too.
        teacher: a run directory, a model directory, or a foreign one.
        teacher_weight: of its loss beside that of the labels.
        temperature: divides the logits of both, where its answers are soft; the loss is multiplied by its square.
        is_hard: the teacher's likeliest class is the target (Touvron 2021, arXiv 2012.12877), not its probabilities.
        mixing: of records of patches in pairs, in training; the teacher sees them mixed.
    """

    def __init__(
        self,
        targets: list[Target],
        teacher: str,
        teacher_weight: float = 1.0,
        temperature: float = 1.0,
        is_hard: bool = False,
        mixing: Mixing = Mixing(),  # noqa: B008 (frozen)
    ):
        super().__init__(targets, mixing)
        for name, value in (("teacher_weight", teacher_weight), ("temperature", temperature)):
            require(value > 0, f"objective.{name} must be above 0", value)
        if is_hard and temperature != 1:
            raise ConfigError("objective.temperature has no effect with is_hard")
        for target in targets:
            if target.level == "token" or target.task == "regression":
                raise ConfigError(f"Distilled predicts classes of whole records; target {target.name!r} is none")
        self.teacher, self.teacher_weight = teacher, teacher_weight
        self.temperature, self.is_hard = temperature, is_hard
        self._teacher: Model | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Without the teacher: workers prepare records alone."""
        return {**vars(self), "_teacher": None}

    def bind(self, data: RunData) -> None:
        super().bind(data)
        card, model = load_any(Path(self.teacher))
        if card.tokenizer.fingerprint != data.tokenizer.fingerprint:
            raise ConfigError(
                "objective.teacher must read the very tokens of the student (data.tokenizer); "
                f"{self.teacher} reads others"
            )
        given = {readout.name: readout.classes for readout in card.readouts}
        for readout in readouts_of(self.heads):
            if given.get(readout.name) != readout.classes:
                got = ", ".join(given.get(readout.name, ())) or "no such label"
                raise ConfigError(
                    f"objective.teacher must predict {readout.name!r} with the classes {', '.join(readout.classes)}; "
                    f"{self.teacher} has {got}"
                )
        self._teacher = model.requires_grad_(False)

    def counts(self, batch: PackedBatch) -> Mapping[str, float]:
        num = float(batch.layout.num_sequences)
        return {**super().counts(batch), **{f"{target.name}_teacher": num for target in self.targets}}

    def more_terms(self, batch: PackedBatch, outputs: Outputs) -> dict[str, Term]:
        assert self._teacher is not None, "a student is trained after bind"
        teacher = self._teacher.to(batch.ids.device)
        terms = {}
        with torch.no_grad():
            answers = teacher(batch, self.wanted(batch)).heads
        for target in self.targets:
            own_SC, given_SC = (heads[target.name].float() for heads in (outputs.heads, answers))
            if self.is_hard:
                total = F.cross_entropy(own_SC, given_SC.argmax(-1), reduction="sum")
            else:
                own_SC, given_SC = (F.log_softmax(one / self.temperature, -1) for one in (own_SC, given_SC))
                total = F.kl_div(own_SC, given_SC, reduction="sum", log_target=True) * self.temperature**2
            count = torch.tensor(float(len(own_SC)), device=total.device)
            terms[f"{target.name}_teacher"] = Term(total, count, self.teacher_weight * target.weight)
        return terms
