"""`meristem inspect` says what a model is, and what a config would make."""

import json
from pathlib import Path

import pytest

from meristem.cli.main import main
from meristem.model.config import Attention, Embedding, FeedForward, TokenHead, TransformerConfig
from meristem.model.heads import Readout
from meristem.model_directory import ModelCard, hash_weights, save_model
from meristem_domains.protein.alphabet import tokenizer
from model_runs import specs


@pytest.fixture
def own(tmp_path: Path) -> Path:
    config = TransformerConfig(
        width=32,
        num_layers=2,
        embedding=Embedding(vocab_size=33),
        attention=Attention(num_heads=4),
        feedforward=FeedForward(width=64),
        head=TokenHead(),
    )
    readouts = (Readout(name="place", classes=("[in]", "out")),)
    facts = {"steps": 12}
    card = ModelCard(config, tokenizer(), specs(("tokens",), readouts), domain="protein", facts=facts)
    save_model(tmp_path / "own", card, card.build())
    return tmp_path / "own"


def test_the_facts_of_a_model_are_counted(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(own), "--json", "--length", "100"]) == 0
    facts = json.loads(capsys.readouterr().out)
    counts = facts["parameters"]
    attention = 2 * (32 * 96 + 96 + 32 * 32 + 32)
    assert counts["blocks attention"] == attention
    assert counts["head place"] == 2 * 32 + 2
    assert counts["total"] == sum(count for name, count in counts.items() if name != "total")
    assert facts["weights_bytes"]["fp32"] == 4 * counts["total"]
    assert facts["flops_per_token"]["length"] == 100
    assert facts["hash"] == hash_weights(own)
    assert facts["vocabulary"]["symbols"][-1] == "<mask>"
    assert facts["facts"] == {"steps": 12}


def test_tables_name_every_part(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(own)]) == 0
    said = capsys.readouterr().out
    for part in (
        "attention.num_heads",
        "LayerNorm",
        "labels: classification",
        "[in], out",
        "million at 512 tokens",
        "MiB in fp32",
    ):
        assert part in said


def test_a_config_is_inspected_as_fit_would_build_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "protein/esm2_8m", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["architecture"]["width"] == 320
    # the 8M shape: trunk, symbol head, and no contact head yet
    assert facts["parameters"]["total"] == 7_512_353


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "got 'nowhere' (no such file)"),
        (["protein/esm2_8m", "--length", "0"], "--length must be 1 or more; got 0"),
    ],
)
def test_what_cannot_be_inspected_is_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", *arguments]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert message in said[0]


def test_a_folder_without_a_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path)]) == 2
    assert "got a folder without config.json" in capsys.readouterr().err


def test_the_meta_device_of_a_config_costs_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "protein/esm2_650m", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"]["total"] == 651_042_593


def test_model_is_not_changed_by_looking(own: Path) -> None:
    before = {file.name: file.read_bytes() for file in own.iterdir()}
    assert main(["inspect", str(own)]) == 0
    assert before == {file.name: file.read_bytes() for file in own.iterdir()}


def test_throughput_is_measured_and_an_input_weighed(
    own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fasta = tmp_path / "a.fasta"
    fasta.write_text("".join(f">r{i}\n{'MKTAYIAKQR' * (1 + i % 7)}\n" for i in range(200)))
    assert main(["inspect", str(own), "--throughput", "--input", str(fasta), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)["throughput"]
    assert all(rate > 0 for rate in facts["tokens_per_second"].values())
    assert facts["input"]["records"] == facts["input"]["vectors"] == 200
    assert facts["input"]["seconds"] >= 0
    assert main(["embed", str(own), str(fasta), "--output", str(tmp_path / "out")]) == 0
    capsys.readouterr()
    written = sum(part.stat().st_size for part in (tmp_path / "out").glob("part-*.parquet"))
    assert 0.5 * written < facts["input"]["bytes"] < 2 * written
    assert main(["inspect", str(own), "--throughput", "--input", str(fasta), "--pool", "none"]) == 0
    shown = capsys.readouterr().out
    assert "tokens/s" in shown
    assert "7,940 vectors of 32" in shown


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--input", "a.fasta"], "--input needs --throughput"),
        (["--throughput", "--input", "nowhere.fasta"], "nowhere.fasta"),
        (["--throughput", "--pool", "middle"], "pool must be one of"),
    ],
)
def test_a_wrong_question_about_throughput_is_refused(
    own: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(own), *arguments]) == 2
    assert said in capsys.readouterr().err


def test_throughput_of_a_config_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "protein/sample", "--throughput"]) == 2
    assert "--throughput needs the directory of a model; got protein/sample" in capsys.readouterr().err
