"""A run on disk: its paths, its configuration, and how far it came.

<run>/config.yaml              resolved
<run>/run.json                 step, and whether and why the run is finished
<run>/metrics.csv              a row a step
<run>/curves.png
<run>/<name>.png               what the objective has to show of the last validation, such as `reconstruction`
<run>/refused.csv              records that were left out, where there are any
<run>/tensorboard/
<run>/checkpoints/last.ckpt    all that going on needs
<run>/model/                   the best by validation, or the last where nothing is validated
<run>/model-last/              the last
"""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from meristem.errors import CheckpointError, ConfigError, DataError
from meristem.files import read_json, write_file, write_json
from meristem.objectives.objective import Objective
from meristem.train.spec import FREE_KEYS, fill_in


class RunDirectory:
    """Where a run keeps its things."""

    def __init__(self, path: Path):
        self.path = path
        self.config = path / "config.yaml"
        self.metrics = path / "metrics.csv"
        self.curves = path / "curves.png"
        self.refused = path / "refused.csv"
        self.last_checkpoint = path / "checkpoints" / "last.ckpt"
        self.best_model = path / "model"
        self.last_model = path / "model-last"

    @property
    def is_started(self) -> bool:
        return self.config.exists() or self.metrics.exists() or self.last_checkpoint.exists()

    def write_config(self, values: Mapping[str, Any]) -> None:
        """Write `config.yaml`, the values that the run is started with."""
        write_file(self.config, yaml.safe_dump(dict(values), sort_keys=False).encode())

    def require_same(self, values: Mapping[str, Any], objective: type[Objective]) -> None:
        """Refuse to go on with a run that was started with other `values_of` a config; `FREE_KEYS` may differ.

        Raises:
            ConfigError: names what differs, and the command that goes on.
        """
        if not self.config.exists():
            return
        old = yaml.safe_load(self.config.read_text(encoding="utf-8"))
        with suppress(ConfigError, KeyError, TypeError):  # runs of earlier versions left more open
            fill_in(old, objective)
        free = tuple(f"{key}." for key in FREE_KEYS)
        was, now = _flat(old), _flat(values)
        differing = [key for key in sorted(was.keys() | now.keys()) if was.get(key) != now.get(key)]
        differing = [key for key in differing if not f"{key}.".startswith(free)]
        if differing:
            key = differing[0]
            more = f" and {len(differing) - 1} more" if len(differing) > 1 else ""
            raise ConfigError(
                f"{self.path} was started otherwise: {key} was {was.get(key)!r}, is {now.get(key)!r}{more}; "
                f"to go on with it: meristem fit --config {self.config}; to start anew: --run_dir ANOTHER"
            )

    def checkpoint_to_go_on_from(self) -> Path | None:
        """The last checkpoint, which must be there if steps were taken; None for a run that did not take a step."""
        if self.last_checkpoint.exists():
            return self.last_checkpoint
        if self.metrics.exists():
            raise CheckpointError(
                f"{self.path} holds a run that has taken steps, but no {self.last_checkpoint.relative_to(self.path)}; "
                "put it back, or start anew with another --run_dir"
            )
        return None

    def read_state(self) -> dict[str, Any]:
        """What `write_state` wrote last; empty for a new run."""
        try:
            return read_json(self.path / "run.json")
        except DataError:
            return {}

    def write_state(self, **state: Any) -> None:
        """Say how far the run came: `step`, and `finished` with the reason once it is."""
        write_json(self.path / "run.json", state)


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested values by dotted key."""
    if not isinstance(values, Mapping) or not values:
        return {prefix: values}
    return {
        key: value
        for name, inner in values.items()
        for key, value in _flat(inner, f"{prefix}.{name}".lstrip(".")).items()
    }


def csv_text(rows: Iterable[Sequence[Any]]) -> str:
    """Rows as lines of CSV; None is an empty cell, and a number reads back as it was, bit for bit."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
