"""Every command that `meristem import` prints works as printed, with real inputs in the place of INPUT."""

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import (
    BertConfig,
    BertForMaskedLM,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    EsmcConfig,
    EsmcForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from meristem.cli import import_model
from meristem.cli.main import main
from meristem.domain import load_domain
from meristem.model_directory import load_card
from references import redraw, save
from small_vocabularies import trained

SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
STACKS = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
UNIGRAM_ROLES = json.dumps({"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"})
UNIGRAMS = {"tokenizer.json": trained("unigrams").to_str(), "tokenizer_config.json": UNIGRAM_ROLES}

MODELS: dict[str, tuple[Callable[[], Any], dict[str, str]]] = {
    "BERT": (
        lambda: BertForMaskedLM(BertConfig(**SMALL, vocab_size=500)),
        {"tokenizer.json": trained("word pieces").to_str()},
    ),
    "GPT-2": (
        lambda: GPT2LMHeadModel(
            GPT2Config(vocab_size=500, n_embd=32, n_layer=1, n_head=4, bos_token_id=0, eos_token_id=0)
        ),
        {"tokenizer.json": trained("byte pairs").to_str()},
    ),
    "T5": (lambda: T5ForConditionalGeneration(T5Config(**STACKS, vocab_size=400)), UNIGRAMS),
    "ESM-C": (lambda: EsmcForMaskedLM(EsmcConfig(**SMALL)), {}),
    "ViT": (lambda: ViTForImageClassification(ViTConfig(**SMALL, image_size=16, patch_size=8)), {}),
    "DINOv2": (lambda: Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**SMALL, image_size=16, patch_size=8)), {}),
}
OF_TEXT = ("BERT", "GPT-2", "T5")


def printed_commands(said: str) -> list[list[str]]:
    return [shlex.split(line) for line in said.splitlines() if re.match(r"\s+meristem ", line)]


def import_and_run(arguments: list[str], out: Path, capsys: pytest.CaptureFixture[str]) -> tuple[list[str], str]:
    """Imports, then runs what was printed.

    Returns:
        Verbs that were printed, and all that the import said.
    """
    assert main(["import", *arguments, str(out), "--skip-parity"]) == 0
    said = capsys.readouterr().out
    commands = printed_commands(said)
    for command in commands:
        replaced = [str(load_domain(load_card(out).domain).sample) if word == "INPUT" else word for word in command[1:]]
        assert main(replaced) == 0, (replaced, capsys.readouterr().err)
    return [command[1] for command in commands], said


@pytest.mark.parametrize("name", MODELS)
def test_printed_commands_work(
    name: str, tmp_path: Path, rng: np.random.Generator, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    make, files = MODELS[name]
    folder = save(redraw(make(), rng), tmp_path / "hf", files)
    monkeypatch.chdir(tmp_path)  # where a command writes `vectors`
    verbs, said = import_and_run([str(folder)], tmp_path / "own model", capsys)
    if name in OF_TEXT:
        assert verbs == ["inspect"]
        assert "read by the domain text, which is not installed; --domain names another: protein, vision" in said
    else:
        assert verbs == ["inspect", "embed"]
        assert (tmp_path / "vectors").is_dir()


@pytest.mark.parametrize("name", OF_TEXT)
def test_a_domain_that_is_named_is_the_one_of_the_printed_command(
    name: str, tmp_path: Path, rng: np.random.Generator, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    make, files = MODELS[name]
    folder = save(redraw(make(), rng), tmp_path / "hf", files)
    monkeypatch.chdir(tmp_path)
    verbs, _ = import_and_run([str(folder), "--domain", "protein"], tmp_path / "own", capsys)
    assert verbs == ["inspect", "embed"]


def test_a_domain_that_is_not_there_is_refused_before_anything_is_written(
    tmp_path: Path, rng: np.random.Generator, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save(redraw(MODELS["ESM-C"][0](), rng), tmp_path / "hf")
    assert main(["import", str(folder), str(tmp_path / "own"), "--domain", "rna"]) == 2
    assert "domain must be installed or a dotted path; got 'rna'" in capsys.readouterr().err
    assert not (tmp_path / "own").exists()


def test_a_command_for_a_domain_that_is_not_installed_would_be_caught(
    tmp_path: Path, rng: np.random.Generator, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    """The mutant prints `embed` whatever is installed."""
    monkeypatch.setattr(import_model, "installed", lambda group: {"text": None, "protein": None})
    make, files = MODELS["BERT"]
    folder = save(redraw(make(), rng), tmp_path / "hf", files)
    assert main(["import", str(folder), str(tmp_path / "own"), "--skip-parity"]) == 0
    inspect, embed = printed_commands(capsys.readouterr().out)
    assert main(inspect[1:]) == 0
    assert main([str(tmp_path / "x.fasta") if word == "INPUT" else word for word in embed[1:]]) == 2
