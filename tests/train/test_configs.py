"""Configs: every shipped one is whole, overrides take, and what is wrong is said in one line with its place."""

import re
from pathlib import Path

import pytest
import yaml

from meristem.cli.configs import shipped_configs
from meristem.cli.run_config import parse
from meristem.model.config import TransformerConfig
from meristem.model.plain import from_json
from meristem.train.run import build
from meristem.train.spec import values_of

SHIPPED = {name: path for name, path in shipped_configs().items() if name.startswith("protein/")}


def test_every_protein_config_is_found():
    expected = {"esm2_8m", "esm2_35m", "esm2_150m", "esm2_650m", "sample", "secondary_structure", "localization"}
    assert {f"protein/{name}" for name in expected | {"fitness"}} <= set(SHIPPED)
    assert len(SHIPPED) == len(list((Path(__file__).parents[2] / "configs" / "protein").glob("*.yaml")))


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_config_is_whole_and_says_what_it_takes(name, bench):
    header = SHIPPED[name].read_text().split("\nmodel:")[0]
    for word in ("command:", "hardware:", "minutes:", "expected:"):
        assert word in header
    sources = [] if "sources:" in SHIPPED[name].read_text() else ["--data.sources", "proteins.fasta"]
    config = parse(["--config", name, *sources])
    assert config is not None
    assert config.run_dir == f"runs/{SHIPPED[name].stem}"
    architecture = from_json(TransformerConfig, values_of(config)["model"]["architecture"])
    assert architecture.embedding.vocab_size == 33
    build(config)


def test_esm2_configs_have_the_published_shapes(bench):
    shapes = {"8m": (6, 320, 20), "35m": (12, 480, 20), "150m": (30, 640, 20), "650m": (33, 1280, 20)}
    for size, shape in shapes.items():
        config = parse(["--config", f"protein/esm2_{size}", "--data.sources", "x.fasta"])
        architecture = values_of(config)["model"]["architecture"]
        assert (architecture["num_layers"], architecture["width"], architecture["attention"]["num_heads"]) == shape


def test_overrides_take_and_the_last_file_wins(bench):
    (bench.path / "over.yaml").write_text("model: {architecture: {attention: {num_heads: 8}}, dropout: 0.3}\n")
    config = parse(
        [
            "--config=tiny.yaml",
            *("--config", "over.yaml"),
            *("--model.architecture.feedforward.width", "48"),
            *("--model.architecture.position", "{kind: Learned, max_positions: 77}"),
            *("--model.objective.rate", "0.3"),
            *("--trainer.max_steps", "11"),
        ]
    )
    architecture = values_of(config)["model"]["architecture"]
    assert architecture["attention"]["num_heads"] == 8
    assert architecture["attention"]["dropout"] == 0.1
    assert architecture["feedforward"]["width"] == 48
    assert architecture["position"]["kind"] == "Learned"
    assert architecture["position"]["max_positions"] == 77
    task, _ = build(config)
    assert task.architecture.residual.dropout == 0.3
    assert task.objective.rate == 0.3
    assert config.trainer.max_steps == 11


def test_printed_config_is_the_config(bench):
    printed = bench.run("--print_config", "--seed", "5")
    assert printed.code == 0
    (bench.path / "printed.yaml").write_text(printed.out)
    assert yaml.safe_load(printed.out)["seed"] == 5
    again = values_of(parse(["--config", "printed.yaml"]))
    assert again == values_of(parse(["--config", "tiny.yaml", "--seed", "5"])) | {"run_dir": "runs/tiny"}


WRONG = {
    "doubled key": ("lr: 1e-3", "lr: 1e-3, lr: 2", "'lr' must stand once"),
    "unknown key": ("lr: 1e-3", "lrr: 1e-3", "lrr is no key"),
    "unknown part": ("watch:", "wach:", "wach is no key"),
    "word for a number": ("lr: 1e-3", "lr: high", "must be a number; got high"),
    "number out of range": ("lr: 1e-3", "lr: -1", "must be positive"),
    "choice that is none": ("{validation_frac: 0.2}", "{method: random}", "'hash', 'column', 'similarity'"),
    "unknown objective": ("MaskedTokens", "Maskd", "Denoising, Distilled, MaskedPatches, MaskedTokens, NextSentence"),
    "unknown option of the objective": ("MaskedTokens}", "MaskedTokens, init_args: {rat: 1}}", "rat is no key"),
    "option of the objective out of range": ("MaskedTokens}", "MaskedTokens, init_args: {rate: 3}}", "at most 1"),
    "width that heads do not divide": ("width: 32", "width: 30", "nearest: 32"),
    "unknown key of the architecture": ("num_heads", "num_haeds", "num_heads"),
    "unknown domain": ("domain: protein", "domain: protien", "installed: "),
    "no YAML": ("watch:", "watch: }", "YAML"),
    "what Lightning has and a run has not": ("max_steps: 40", "max_epochs: 4", "max_steps"),
}


@pytest.mark.parametrize(("old", "new", "said"), WRONG.values(), ids=WRONG.keys())
def test_wrong_config_is_named_by_file_and_line_and_leaves_nothing(bench, old, new, said):
    bench.replace(old, new)
    line = bench.config.read_text()[: bench.config.read_text().index(new)].count("\n") + 1
    before = sorted(bench.path.iterdir())
    done = bench.run("--run_dir", "run")
    assert done.code == 2
    assert re.fullmatch(rf"meristem: error: tiny\.yaml:{line}: .*\n", done.err), done.err
    assert said in done.err
    assert sorted(bench.path.iterdir()) == before


WRONG_ARGUMENTS = {
    "unknown key": (["--trainer.epochs", "3"], "trainer.epochs"),
    "no such file": (["--data.sources", "nowhere.fasta"], "nowhere.fasta: no such file"),
    "no such model": (["--model.init_from", "nowhere"], "nowhere must be a model directory"),
    "no such preset": (["--model.architecture", "esm2_9m"], "esm2_8m"),
    "frozen trunk from scratch": (["--model.freeze_trunk", "true"], "model.init_from"),
    "no steps": (["--trainer.max_steps", "0"], "max_steps must be 1 or more"),
    "option that the tokenizer has not": (["--data.tokenizer", "{nonstandrad: x}"], "nonstandrad"),
    "monitor that nobody measures": (["--watch.monitor", "place/mcc"], "watch.monitor"),
}


@pytest.mark.parametrize(("arguments", "said"), WRONG_ARGUMENTS.values(), ids=WRONG_ARGUMENTS.keys())
def test_wrong_argument_is_one_line_and_leaves_no_run(bench, arguments, said):
    done = bench.run("--run_dir", "run", *arguments)
    assert done.code == 2
    assert re.search(r"meristem: error: [^\n]*\n$", done.err)
    assert said in done.err
    assert not (bench.path / "run").exists()


def test_a_file_is_no_run_directory(bench):
    done = bench.run("--run_dir", "proteins.fasta")
    assert done.code == 2
    assert "must be a folder" in done.err


def test_missing_required_key_is_named(bench):
    bench.replace("  sources: proteins.fasta\n", "")
    done = bench.run()
    assert done.code == 2
    assert "data.sources must be set" in done.err
