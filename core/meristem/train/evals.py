"""Runs the suites of a run on the weights that a validation measures."""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from meristem.errors import ConfigError
from meristem.model_directory import save_model
from meristem.train.ranks import full_state
from meristem.train.spec import DataSpec
from meristem.train.suite import Suite
from meristem.train.task import Task


class Evals:
    """The evaluation suites of a run; their data is read and checked when the object is made.

    Raises:
        ConfigError: a suite's options cannot be.
        DataError: a record that a suite cannot use.
    """

    def __init__(self, suites: Sequence[Suite], data: DataSpec):
        self.suites, self.data = suites, data
        self.names: list[str] = []
        for suite in suites:
            try:
                self.names += [f"{suite.name}/{figure}" for figure in suite.read(data)]
            except ConfigError as error:
                raise ConfigError(f"evals, {suite.name}: {error}") from error

    def measure(self, model: Path) -> dict[str, float]:
        """Measure a model directory with every suite; figures that are not defined are left out."""
        found: dict[str, float | None] = {}
        for suite in self.suites:
            found |= {f"{suite.name}/{figure}": value for figure, value in suite.run(model, self.data).items()}
        known = {name: found.get(name) for name in self.names}
        return {name: float(value) for name, value in known.items() if value is not None}

    def values(self, task: Task) -> dict[str, float]:
        """Measure the weights that validation uses. Collective: all processes call it and get equal figures."""
        if not self.suites:
            return {}
        tensors, found = full_state(task.evaluated), torch.zeros(len(self.names), dtype=torch.float64)
        error: Exception | None = None
        if task.ranks.is_first:
            # suites may train probes, which a validation's inference mode would forbid
            try:
                with TemporaryDirectory() as folder, torch.inference_mode(False), torch.enable_grad():
                    save_model(Path(folder) / "model", task.card, task.evaluated, tensors)
                    values = self.measure(Path(folder) / "model")
                found = torch.tensor([values.get(name, float("nan")) for name in self.names], dtype=torch.float64)
            except Exception as caught:  # the other processes wait for this one
                error = caught
        if task.ranks.any([error is not None])[0]:
            raise error or ConfigError("a suite of evals failed in the first process, which says why")
        shared = task.ranks.sum(found).tolist()
        return {name: value for name, value in zip(self.names, shared) if value == value}
