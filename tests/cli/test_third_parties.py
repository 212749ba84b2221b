"""Packages of third parties, built and installed by pip: every verb takes their pieces, and the core knows none."""

import csv
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

from installing import install
from meristem.inference.formats import read_embeddings

PACKAGES = Path(__file__).parents[1] / "packages"
CORE = Path(__file__).parents[2] / "core"
RUN = "import sys; from meristem.cli.main import main; sys.exit(main(sys.argv[1:]))"
WORDS = ("lab_codes", "lab-codes", "field_notes", "field-notes", "letter-pairs", "codenet", "sequel")
"""What the packages and their pieces are called, but for names that are plain words."""


class Site:
    """A folder with installed packages, and the command line beside them.

    Args:
        folder: the working directory of all commands.
        projects: to build and to install.
    """

    def __init__(self, folder: Path, projects: Iterable[Path] = ()):
        self.folder = folder
        self.site = folder / "site"
        self.wheels = [install(project, self.site) for project in projects]
        path = os.pathsep.join([str(self.site), *filter(None, [os.environ.get("PYTHONPATH")])])
        self.environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}

    def start(self, *arguments: str) -> subprocess.Popen:
        command = [sys.executable, "-c", RUN, *arguments]
        return subprocess.Popen(
            command, cwd=self.folder, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def run(self, *arguments: str, code: int = 0) -> str:
        process = self.start(*arguments)
        out, err = process.communicate(timeout=300)
        assert process.returncode == code, f"{arguments}: {out}{err}"
        return out + err


def rows(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV file."""
    return list(csv.DictReader(path.read_text().splitlines()))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    return Site(tmp_path_factory.mktemp("lab"), sorted(PACKAGES.iterdir()))


ON_CPU = ("--trainer.accelerator", "cpu")
CODES = "{first: AABDBADAB, second: DCBADC}, {first: CDABC, second: DACCDAB}, {first: ABCD, second: ABCD}"
FIT = (
    *("fit", "--data.domain", "lab-codes", "--data.sources", "@sample", "--model.architecture", "tiny"),
    *("--model.objective", "Sequel", "--data.views", "{rate: 0.3}", "--data.tokens_per_batch", "200"),
    *("--evals", f"[{{class_path: Spread, init_args: {{codes: [{CODES}]}}}}]"),
    *("--watch.validate_every_n_steps", "20", "--watch.save_every_n_steps", "5", *ON_CPU),
)


@pytest.mark.slow
def test_a_wheel_holds_the_package_and_its_entry_points_and_is_what_is_imported(site):
    for project, wheel in zip(sorted(PACKAGES.iterdir()), site.wheels, strict=True):
        held = zipfile.ZipFile(wheel).namelist()
        files = {path.relative_to(project).as_posix() for path in (project / project.name).rglob("*") if path.is_file()}
        assert {name for name in files if "__pycache__" not in name} == {n for n in held if ".dist-info/" not in n}
        assert [name for name in held if name.endswith(".dist-info/entry_points.txt")]
        code = f"from importlib.util import find_spec; print(find_spec({project.name!r}).origin)"
        done = subprocess.run([sys.executable, "-c", code], env=site.environment, capture_output=True, text=True)
        assert Path(done.stdout.strip()) == site.site / project.name / "__init__.py"


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
    whole = rows(site.folder / "whole" / "metrics.csv")
    spreads = [[row["val/spread/distance"] for row in some] for some in (rows(run / "metrics.csv"), whole)]
    assert spreads[0] == spreads[1]
    assert [bool(spread) for spread in spreads[0]] == [step in (20, 40) for step in range(1, 41)]
    weights = [(site.folder / name / "model-last" / "model.safetensors").read_bytes() for name in ("killed", "whole")]
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_a_model_embeds_predicts_and_goes_out_and_back(site, run, tmp_path, rng):
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
    # CodeNet reads one code; two letters are a token, so that a pair is one code where the first is of even length
    pairs = [("".join(rng.choice(list("ABCD"), 2 * n)), "".join(rng.choice(list("ABCD"), n))) for n in range(3, 9)]
    for model, output, codes in (
        (str(run), "pairs", [f"{first} > {second}" for first, second in pairs]),
        ("back", "again", [f"{first}{second} > A" for first, second in pairs]),
    ):
        (site.folder / f"{output}.codes").write_text("".join(f"c{i}: {code}\n" for i, code in enumerate(codes)))
        site.run("embed", model, f"{output}.codes", "--output", output, "--precision", "fp32")
    there, back = (read_embeddings(site.folder / output).values for output in ("pairs", "again"))
    np.testing.assert_array_equal(back, there)
    # the mutant: nothing is installed, so that nothing of the model directory can be opened
    assert "'letter-pairs'; installed: " in Site(tmp_path).run("embed", str(run), sample, "--output", "vectors", code=2)


@pytest.mark.slow
def test_a_prediction_depends_on_both_inputs_of_a_record(site, run):
    pairs = {"a": ("ABCDAB", "CDABCD"), "b": ("ABCDAB", "DDACBA"), "c": ("DCBACD", "CDABCD")}
    (site.folder / "three.codes").write_text("".join(f"{name}: {x} > {y}\n" for name, (x, y) in pairs.items()))
    # the mutant: a model whose card names no objective that joins the inputs reads the first one alone
    alone = site.folder / "alone"
    shutil.copytree(run / "model", alone)
    card = json.loads((alone / "config.json").read_text())
    assert card.pop("joined_by") == "Sequel"
    (alone / "config.json").write_text(json.dumps(card))
    said = {}
    for model in (run, alone):
        site.run("predict", str(model), "three.codes", "--output", f"{model.name}.csv")
        said[model] = [
            [value for name, value in row.items() if name.startswith("sequel")]
            for row in rows(site.folder / f"{model.name}.csv")
        ]
    first, other_second, other_first = said[run]
    assert first != other_second
    assert first != other_first
    assert said[alone][0] == said[alone][1] != said[alone][2]


@pytest.mark.slow
def test_a_learned_and_lossy_tokenizer_trains_embeds_and_scores(site):
    notes = str(PACKAGES / "field_notes" / "field_notes" / "notes.txt")
    fit = ("fit", "--data.domain", "field-notes", "--data.sources", notes, "--model.architecture", "small", *ON_CPU)
    site.run(*fit, "--model.objective", "MaskedTokens", "--trainer.max_steps", "3", "--run_dir", "notes")
    shouted = site.folder / "shouted.txt"
    shouted.write_text(Path(notes).read_text("utf-8").upper(), "utf-8")
    for name, source in (("plain", notes), ("folded", str(shouted))):
        site.run("embed", "notes", source, "--output", name)
        site.run("score", "notes", source, "--output", f"{name}.csv")
    plain, folded = (read_embeddings(site.folder / name).values for name in ("plain", "folded"))
    np.testing.assert_array_equal(plain, folded)
    scores = [[row["log_likelihood"] for row in rows(site.folder / f"{name}.csv")] for name in ("plain", "folded")]
    assert scores[0] == scores[1]


@pytest.fixture(scope="module")
def new_site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """What `domains new` writes, installed as it is."""
    folder = tmp_path_factory.mktemp("new")
    Site(folder).run("domains", "new", "lab_rna")
    return Site(folder, [folder / "lab_rna"])


@pytest.mark.slow
def test_a_new_domain_goes_the_whole_way_as_written(new_site):
    folder, draw = new_site.folder, random.Random(0)
    texts = {f"r{i}": "".join(draw.choices("ACGUacgu", k=draw.randint(8, 30))) for i in range(40)}
    fasta = "".join(f">{name}\n{text}\n" for name, text in texts.items())
    (folder / "yours.fasta").write_text(fasta)
    (folder / "others.fasta").write_text(fasta.upper())
    table = "".join(f"{name},{text},{draw.choice(('open', 'shut'))}\n" for name, text in texts.items())
    (folder / "labelled.csv").write_text("id,sequence,kind\n" + table)

    # the commands of the README that was written, in their order
    readme = (folder / "lab_rna" / "README.md").read_text().replace("\\\n", " ")
    commands = [shlex.split(line)[1:] for line in readme.splitlines() if line.startswith("    meristem ")]
    assert [command[0] for command in commands] == ["domains", "fit", "embed", "export", "fit", "predict"]
    for command in commands:
        new_site.run(*command, *(("--trainer.max_steps", "3", *ON_CPU) if command[0] == "fit" else ()))
    predicted = rows(folder / "kinds.csv")
    assert [row["id"] for row in predicted] == [name.upper() for name in texts]
    assert {row["kind"] for row in predicted} <= {"open", "shut"}

    new_site.run("import", "exported", "back")
    for model, output in (("runs/first", "first"), ("back", "again")):
        new_site.run("embed", model, "yours.fasta", "--output", output, "--precision", "fp32")
    first, again = (read_embeddings(folder / name).values for name in ("first", "again"))
    assert first.shape == (40, 128)
    np.testing.assert_array_equal(first, again)


def words_in(text: str) -> list[str]:
    """Names of third parties that a text holds, in any case."""
    return [word for word in WORDS if word in text.lower()]


def core_files() -> list[Path]:
    """Every file of text that the core consists of."""
    return [path for path in CORE.rglob("*") if path.is_file() and "__pycache__" not in path.parts]


def test_no_file_of_the_core_knows_a_third_party():
    assert len(core_files()) > 150
    for path in core_files():
        assert not words_in(path.read_text("utf-8")), path
    written = "".join(path.read_text("utf-8") for path in PACKAGES.rglob("*") if path.suffix in (".py", ".toml"))
    assert words_in(written) == list(WORDS)


def test_the_name_of_a_third_party_in_any_file_of_the_core_would_be_found(rng):
    """The mutants: a file of the core that asks for a package by name, imports it, or tells of it."""
    files = core_files()
    for word in WORDS:
        text = files[int(rng.integers(len(files)))].read_text("utf-8")
        for line in ('if domain.name == "{}":', "import {}.head", "# such as {}", "class {}Readout:"):
            for name in (word, word.title(), word.upper()):
                assert words_in(f"{text}\n{line.format(name)}\n") == [word]
