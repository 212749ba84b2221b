"""Packages of third parties beside Meristem: every verb takes their pieces, and no file of the core knows them."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from installing import install
from meristem.inference.formats import read_embeddings

PACKAGES = Path(__file__).parents[1] / "packages"
CORE = Path(__file__).parents[2] / "core"
RUN = "import sys; from meristem.cli.main import main; sys.exit(main(sys.argv[1:]))"


class Site:
    """A folder with installed packages, and the command line beside them."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.site = folder / "site"
        for project in sorted(PACKAGES.iterdir()):
            install(project, self.site)
        self.environment = os.environ | {"PYTHONPATH": str(self.site), "OMP_NUM_THREADS": "1"}

    def start(self, *arguments: str) -> subprocess.Popen:
        command = [sys.executable, "-c", RUN, *arguments]
        return subprocess.Popen(
            command, cwd=self.folder, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def run(self, *arguments: str) -> str:
        process = self.start(*arguments)
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, f"{arguments}: {out}{err}"
        return out + err


def rows(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV file."""
    return list(csv.DictReader(path.read_text().splitlines()))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    return Site(tmp_path_factory.mktemp("lab"))


FIT = (
    *("fit", "--data.domain", "lab-codes", "--data.sources", "@sample", "--model.architecture", "tiny"),
    *("--model.objective", "Sequel", "--data.views", "{rate: 0.3}", "--data.tokens_per_batch", "200"),
    *("--trainer.accelerator", "cpu", "--watch.validate_every_n_steps", "20", "--watch.save_every_n_steps", "5"),
)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lab-codes", "field-notes"])
def test_the_domain_keeps_the_contract(site, name):
    out = site.run("domains", "check", name)
    assert f"{name} keeps the contract" in out
    assert ("lossy: " in out) == (name == "field-notes")


@pytest.fixture(scope="module")
def run(site) -> Path:
    """A run that was killed on its way, and went on."""
    steps = ("--trainer.max_steps", "40")
    process = site.start(*FIT, *steps, "--run_dir", "killed")
    checkpoint = site.folder / "killed" / "checkpoints" / "last.ckpt"
    while process.poll() is None and not checkpoint.exists():
        time.sleep(0.02)
    if process.poll() is None:
        process.send_signal(signal.SIGKILL)
    process.communicate()
    site.run(*FIT, *steps, "--run_dir", "killed")
    site.run(*FIT, *steps, "--run_dir", "whole")
    return site.folder / "killed"


@pytest.mark.slow
def test_a_run_that_was_killed_ends_as_one_that_was_not(site, run):
    losses = [[row["loss"] for row in rows(site.folder / name / "metrics.csv")] for name in ("killed", "whole")]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 40
    weights = [(site.folder / name / "model-last" / "model.safetensors").read_bytes() for name in ("killed", "whole")]
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_a_model_embeds_predicts_and_goes_out_and_back(site, run):
    sample = str(PACKAGES / "lab_codes" / "lab_codes" / "sample.codes")
    site.run("embed", str(run), sample, "--output", "vectors", "--precision", "fp32")
    vectors = read_embeddings(site.folder / "vectors")
    assert vectors.values.shape == (48, 32)
    site.run("predict", str(run), sample, "--output", "predicted.csv")
    predicted = rows(site.folder / "predicted.csv")
    assert len(predicted) == 48
    assert {row["sequel"] for row in predicted} <= {"goes on", "is turned"}
    site.run("score", str(run), sample, "--scorer", "likeness", "--output", "alike.npz", "--plots", "figures")
    with np.load(site.folder / "alike.npz") as alike:
        assert len(alike.files) == 48
        assert all(np.allclose(np.diag(alike[name]), 1, atol=1e-5) for name in alike.files)
    assert len(list((site.folder / "figures").glob("*.png"))) == 48
    out = site.run("export", str(run), "exported", "--to", "hf")
    assert json.loads((site.folder / "exported" / "config.json").read_text())["model_type"] == "codenet"
    assert "sequel" in out  # CodeNet has no place for it
    site.run("import", "exported", "back")
    site.run("embed", "back", sample, "--output", "again", "--precision", "fp32")
    np.testing.assert_array_equal(read_embeddings(site.folder / "again").values, vectors.values)


def test_no_file_of_the_core_knows_a_third_party():
    words = ("lab_codes", "lab-codes", "field_notes", "field-notes", "letter-pairs", "codenet", "sequel")
    for path in CORE.rglob("*.py"):
        text = path.read_text("utf-8").lower()
        assert not [word for word in words if word in text], path
