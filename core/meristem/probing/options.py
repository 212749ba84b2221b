"""How to probe."""

from dataclasses import dataclass, field
from pathlib import Path

from meristem.errors import ConfigError
from meristem.inference.embed import Embed

METHODS = {"linear": ("linear",), "knn": ("knn",), "both": ("linear", "knn")}
"""The probes that each value of `method` stands for."""


@dataclass(frozen=True, kw_only=True)
class ProbeOptions:
    """How to probe; the suite `meristem.probing.suite.Probe` says what the options mean that it has as well.

    Attributes:
        embed: how the records are read and embedded, with any pool but none. Label and split columns are added.
        cache_dir: folder of record stores and vectors; None for the default one.
    """

    label: str
    missing_labels: tuple[str, ...] = ()
    method: str = "both"
    task: str = "auto"
    k: int | None = None
    temperature: float = 0.07
    split: str = "hash"
    split_column: str = ""
    group_column: str = ""
    test_frac: float | None = None
    validation_frac: float = 0.1
    seed: int = 0
    embed: Embed = field(default_factory=Embed)
    cache_dir: Path | None = None

    def __post_init__(self) -> None:
        tasks, splits = ("auto", "classification", "regression"), ("hash", "similarity")
        for name, allowed in (("method", METHODS), ("task", tasks), ("split", splits)):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name} must be one of {', '.join(allowed)}; got {getattr(self, name)!r}")
        if not self.label:
            raise ConfigError("label must name a column; got none")
        if self.embed.pool == "none":
            raise ConfigError("a probe needs one vector a record; pool none gives one a token: use mean")
        if self.k is not None and self.k < 1:
            raise ConfigError(f"k must be 1 or more; got {self.k}")
        if not self.temperature > 0:
            raise ConfigError(f"temperature must be above 0; got {self.temperature}")
        if self.seed < 0:
            raise ConfigError(f"seed must be 0 or more; got {self.seed}")
        test = 0.0 if self.test_frac is None else self.test_frac
        if not (test > 0 or self.test_frac is None) or self.validation_frac < 0 or test + self.validation_frac >= 1:
            raise ConfigError(
                "test_frac must be above 0, validation_frac 0 or more, and both leave some for training; "
                f"got {test} and {self.validation_frac}"
            )
        if self.split_column and (self.split != "hash" or self.test_frac is not None):
            raise ConfigError("split and test_frac have no effect with a split column; leave them out")
