"""What a head predicts, as a value that a model directory keeps."""

from dataclasses import dataclass, field
from typing import Literal

from meristem.errors import ConfigError
from meristem.model.config import Mean, Pool


@dataclass(frozen=True, kw_only=True)
class Readout:
    """One prediction from the trunk: a class or a value, for each record or for each token.

    Attributes:
        name: of the label it predicts.
        level: one prediction a record or one a token.
        task: classes, or values.
        classes: names of the classes in the order of the logits; empty for values.
        mean: of the training values, by output; predictions are `output * std + mean`.
        std: of the training values, by output.
        pool: how a record's rows become one vector; None for the model's own pool; unused at token level.
        is_standardised: the head sees each feature less its running mean, over its running deviation.
        hidden_width: width of the hidden layer of the head; 0 for a linear head.
        dropout: before the last map, in training.
    """

    name: str
    level: Literal["record", "token"] = "record"
    task: Literal["classification", "regression"] = "classification"
    classes: tuple[str, ...] = ()
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    pool: Pool | None = field(default_factory=Mean)
    is_standardised: bool = False
    hidden_width: int = 0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in ("classes", "mean", "std"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.task == "classification" and len(self.classes) < 2:
            raise ConfigError(f"label {self.name!r} must have two classes or more; got {list(self.classes)}")

    @property
    def num_outputs(self) -> int:
        return len(self.classes) if self.task == "classification" else len(self.mean)
