"""A tiny run in a folder of its own, started as a user would."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

RESIDUES = np.array(list("LAGVSERTIDPKQNFYMHWC"))

CONFIG = """
model:
  architecture:
    width: 32
    num_layers: 2
    embedding: {mask_dropout_frac: 0.12}
    attention: {num_heads: 4, dropout: 0.1}
    feedforward: {width: 64, dropout: 0.1}
  dropout: 0.1
  objective: {class_path: Masked}
  optimizer: {lr: 1e-3, warmup_steps: 5}
data:
  domain: protein
  sources: proteins.fasta
  tokens_per_pack: 256
  split: {validation_frac: 0.2}
trainer: {max_steps: 40, accumulate_grad_batches: 2, accelerator: cpu}
watch: {validate_every_n_steps: 7, save_every_n_steps: 3}
"""


class Bench:
    """A folder with a config and proteins, and the command line in it."""

    def __init__(self, path: Path):
        self.path = path
        self.config = path / "tiny.yaml"
        self.config.write_text(CONFIG)

    def command(self, *arguments: str, verb: str = "fit", config: str = "tiny.yaml") -> list[str]:
        return [sys.executable, "-m", "meristem.cli.main", verb, "--config", config, *arguments]

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "OMP_NUM_THREADS": "1", "MERISTEM_CACHE": str(self.path / "cache")}

    def run(self, *arguments: str, **options: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*arguments, **options), cwd=self.path, env=self.environment, capture_output=True, text=True
        )

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            self.command(*arguments),
            cwd=self.path,
            env=self.environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def rows(self, run: str) -> list[dict[str, str]]:
        """Rows of `metrics.csv` without what depends on the clock."""
        with (self.path / run / "metrics.csv").open(newline="") as file:
            return [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in csv.DictReader(file)]


def random_proteins(rng: np.random.Generator, count: int, longest: int = 90) -> list[str]:
    return ["".join(rng.choice(RESIDUES, rng.integers(20, longest))) for _ in range(count)]


@pytest.fixture
def bench(tmp_path: Path, rng: np.random.Generator) -> Bench:
    proteins = random_proteins(rng, 100)
    fasta = "".join(f">protein{i}\n{sequence}\n" for i, sequence in enumerate(proteins))
    (tmp_path / "proteins.fasta").write_text(fasta)
    return Bench(tmp_path)
