"""The contract of a suite: what is measured of a model at each validation of a run, beside the loss."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from meristem.train.spec import DataSpec


class Suite(ABC):
    """Measures a model; `evals` of a config names the suites of a run.

    A suite is a frozen dataclass: its fields are what a config says as `init_args`. A package offers one under a name
    with an entry point of the group `meristem.suites`. What is drawn at random must come from a seed of its own.
    """

    name: str
    """Begins the names of its figures: `metrics.csv` has them in columns `val/<name>/<figure>`."""

    @abstractmethod
    def read(self, data: "DataSpec") -> list[str]:
        """Read the suite's own data and check its options; called once, before the first training step.

        Returns:
            Names of the figures that `run` finds.

        Raises:
            ConfigError: options that cannot be.
            DataError: a record that cannot be used.
        """

    @abstractmethod
    def run(self, model: Path, data: "DataSpec") -> Mapping[str, float | None]:
        """Figures of a model by name, None where one is not defined; those that `read` did not name are not recorded.

        Where several processes train together only the first calls it, so it must not communicate.

        Args:
            model: a model directory, which is there during the call.
        """
