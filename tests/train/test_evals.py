"""`evals` measure at each validation what `meristem probe` measures of the model that the run leaves."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import yaml
from random_proteins import random_proteins

import meristem
from installing import write_package
from meristem.cli.main import main
from meristem.cli.run_config import parse
from meristem.errors import ConfigError
from meristem.probing.suite import Probe
from meristem.train import evals as evals_module
from meristem.train.suite import Suite
from meristem.train.task import Task

EVALS = """
evals:
  - class_path: Probe
    init_args: {name: kinds, sources: kinds.csv, label: kind, method: both, missing_labels: [unknown], seed: 3}
  - class_path: Probe
    init_args: {name: share, sources: kinds.csv, label: share, method: linear, split_column: part}
"""
KINDS = [f"kinds/{method}/{figure}" for method in ("linear", "knn") for figure in ("accuracy", "macro_f1", "mcc")]
SHARE = [f"share/linear/{figure}" for figure in ("spearman", "r2", "rmse")]

COUNTING = '''
from dataclasses import dataclass
import meristem
from meristem.train.suite import Suite

@dataclass(frozen=True)
class Lengths(Suite):
    """Norm of a sequence's vector.

    Attributes:
        sequence: of any length.
    """

    sequence: str
    name: str = "lengths"

    def read(self, data):
        return ["norm", "none"]

    def run(self, model, data):
        return {"norm": float((meristem.load(model, device="cpu").embed([self.sequence]) ** 2).sum()), "none": None}
'''


@pytest.fixture
def labelled(bench, rng: np.random.Generator):
    """A run with two probes on a table whose labels follow from the residues."""
    lines = ["sequence,kind,share,part"]
    for i, sequence in enumerate(random_proteins(rng, 70)):
        kind = "unknown" if i % 9 == 0 else "ab"[sequence.count("L") > len(sequence) / 20]
        lines.append(f"{sequence},{kind},{sequence.count('A') / len(sequence):.4f},{['train', 'test'][i % 3 == 0]}")
    (bench.path / "kinds.csv").write_text("\n".join(lines) + "\n")
    bench.replace("max_steps: 40", "max_steps: 9")
    bench.replace("validate_every_n_steps: 7", "validate_every_n_steps: 3")
    bench.replace("save_every_n_steps: 3", "save_every_n_steps: 2")
    bench.config.write_text(bench.config.read_text() + EVALS)
    return bench


def probed(bench, run: str) -> dict[str, float]:
    """What the command finds of the last model of a run."""
    common = ("probe", f"{run}/model-last", "kinds.csv")
    assert main([*common, "--label", "kind", "--missing-label", "unknown", "--seed", "3", "--output", f"{run}-a"]) == 0
    more = ("--method", "linear", "--split-column", "part")
    assert main([*common, "--label", "share", *more, "--output", f"{run}-b"]) == 0
    found = {}
    for name, folder in (("kinds", f"{run}-a"), ("share", f"{run}-b")):
        metrics = json.loads((bench.path / folder / "metrics.json").read_text())
        for method in {"linear", "knn"} & metrics.keys():
            found |= {f"{name}/{method}/{figure}": value for figure, value in metrics[method].items()}
    return {name: found[name] for name in [*KINDS, *SHARE]}


def recorded(row: dict[str, str]) -> dict[str, float]:
    return {name: float(row[f"val/{name}"]) for name in [*KINDS, *SHARE]}


def test_figures_are_those_of_the_command_on_the_averaged_weights_that_are_saved(labelled, monkeypatch):
    average = ("--model.ema_decay", "0.9", "--model.optimizer.lr", "0.01")
    assert labelled.run("--run_dir", "run", *average).code == 0
    rows = labelled.rows("run")
    assert recorded(rows[-1]) == probed(labelled, "run")
    assert [bool(row["val/kinds/knn/mcc"]) for row in rows] == [row["step"] in "369" for row in rows]
    assert not [path for path in (labelled.path / "cache").rglob("*") if "run" in path.parts]
    # the mutant: the weights of the first validation
    kept: list[dict] = []

    def stale(module):
        kept.append({name: value.clone() for name, value in module.state_dict().items()})
        return kept[0]

    monkeypatch.setattr(evals_module, "full_state", stale)
    assert labelled.run("--run_dir", "stale", *average).code == 0
    assert recorded(labelled.rows("stale")[-1]) != recorded(rows[-1]) == probed(labelled, "stale")


@pytest.mark.slow
def test_a_run_that_goes_on_has_the_rows_of_an_unbroken_one_and_losses_of_one_without_evals(labelled):
    assert labelled.run("--run_dir", "whole").code == 0
    for steps in ("4", "5", "9"):
        assert labelled.run("--run_dir", "parts", "--trainer.max_steps", steps).code == 0
    whole, parts = labelled.rows("whole"), labelled.rows("parts")
    assert [row for row in parts if row["step"] in "369"] == [row for row in whole if row["step"] in "369"]
    assert labelled.run("--run_dir", "bare", "--evals", "null").code == 0
    assert [row["loss"] for row in labelled.rows("bare")] == [row["loss"] for row in whole]
    assert [row["val/loss"] for row in labelled.rows("bare")] == [row["val/loss"] for row in whole]


def test_a_figure_can_choose_the_best_model_and_validate_measures_it(labelled):
    watch = ("--watch.monitor", "kinds/linear/mcc", "--watch.mode", "max")
    assert labelled.run("--run_dir", "run", *watch).code == 0
    best = max(float(row["val/kinds/linear/mcc"]) for row in labelled.rows("run") if row["val/loss"])
    done = labelled.run(config="run/config.yaml", verb="validate")
    said = dict(line.split() for line in done.out.splitlines()[1:])
    assert said["kinds/linear/mcc"] == f"{best:.5g}"


def test_a_run_begun_without_evals_goes_on(labelled):
    assert labelled.run("--run_dir", "run", "--evals", "null", "--trainer.max_steps", "2").code == 0
    kept = labelled.path / "run" / "config.yaml"
    values = yaml.safe_load(kept.read_text())
    assert values.pop("evals") is None
    kept.write_text(yaml.safe_dump(values))
    assert labelled.run("--trainer.max_steps", "3", config="run/config.yaml").code == 0
    other = labelled.run("--run_dir", "run", "--trainer.max_steps", "5")
    assert other.code == 2
    assert "started otherwise: evals was None" in other.err


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "class_path: Probe",
            "class_path: Prob",
            "tiny.yaml:21: .* offers the suite 'Prob'; installed: Probe ",
        ),
        ("label: kind", "label: no_such", "kinds.csv.*no_such"),
        ("method: both", "method: nearest", "method must be .*knn.*; got nearest"),
        ("seed: 3", "speed: 3", "speed is no key of evals; it takes .*label"),
        ("seed: 3", "seed: -3", "evals, kinds: seed must be 0 or more; got -3"),
        ("name: share", "name: kinds", "evals must have names of their own .*; got twice: kinds"),
        ("label: kind,", "", "tiny.yaml:.*evals needs label"),
        ("class_path: Probe", "class_path: meristem.train.watch.Watch", "evals must be.*Watch"),
        ("class_path: Probe", "class_path: no_such.Suite", "evals.*no_such"),
        ("validation_frac: 0.2", "validation_frac: 0", "evals need a validation part"),
        ("save_every_n_steps: 2", "save_every_n_steps: 2, monitor: kinds/knn/f1", "watch.monitor must be one of .*knn"),
    ],
)
def test_what_cannot_be_is_one_error_before_the_first_step(labelled, old, new, message):
    text = labelled.config.read_text()
    assert old in text
    labelled.config.write_text(text.replace(old, new, 1))
    done = labelled.run("--run_dir", "run")
    assert done.code == 2
    assert len(done.err.strip().splitlines()) == 1, done.err
    assert re.search(message, done.err), done.err
    assert not (labelled.path / "run").exists()


def test_a_suite_of_an_installed_package_is_run_by_its_name(labelled, tmp_path, monkeypatch):
    site = tmp_path / "site"
    package = {"meristem.suites": {"Lengths": "lab_lengths:Lengths"}}
    write_package(site, "lab-lengths", package, {"lab_lengths": COUNTING})
    monkeypatch.syspath_prepend(str(site))
    more = "\n  - {class_path: Lengths, init_args: {sequence: MKTAYIAK}}\n"
    labelled.config.write_text(labelled.config.read_text().rstrip() + more)
    assert labelled.run("--run_dir", "run").code == 0
    row = labelled.rows("run")[-1]
    vector = meristem.load("run/model-last", device="cpu").embed(["MKTAYIAK"])
    assert (float(row["val/lengths/norm"]), row["val/lengths/none"]) == (float((vector**2).sum()), "")
    said = yaml.safe_load((labelled.path / "run" / "config.yaml").read_text())["evals"][-1]
    assert said == {"class_path": "lab_lengths.Lengths", "init_args": {"sequence": "MKTAYIAK", "name": "lengths"}}


class _Two:
    """Processes of which this is the second: it measures nothing and takes what the first one found."""

    count, is_first, device = 2, False, None

    def any(self, facts):
        return list(facts)

    def sum(self, values):
        return values + 0.5


def test_a_process_that_is_not_the_first_takes_its_figures(labelled, monkeypatch):
    class Fixed(Suite):
        name = "fixed"

        def read(self, data):
            return ["one"]

        def run(self, model, data):
            raise AssertionError("measured twice")

    monkeypatch.setattr(Task, "ranks", _Two())
    monkeypatch.setattr(evals_module, "full_state", lambda module: {})
    task = Task.__new__(Task)
    monkeypatch.setattr(Task, "evaluated", None)
    assert evals_module.Evals([Fixed()], None).values(task) == {"fixed/one": 0.5}


def test_python_takes_the_objects(labelled):
    spec = parse(["--config", "tiny.yaml", "--run_dir", "python", "--trainer.enable_progress_bar", "false"])
    probe = Probe(name="kinds", sources=["kinds.csv"], label="kind", method="knn", missing_labels=["unknown"], seed=3)
    meristem.fit(replace(spec, evals=[probe]))
    assert float(labelled.rows("python")[-1]["val/kinds/knn/mcc"]) == probed(labelled, "python")["kinds/knn/mcc"]
    with pytest.raises(ConfigError, match="evals must be suites"):
        replace(spec, evals=["Probe"])
