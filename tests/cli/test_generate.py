"""`meristem generate` and `meristem.generate`: texts from prompts, streams, files, and bad input in one line."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import meristem
from meristem.cli.main import main
from meristem.generation.options import GenerateOptions
from meristem.generation.text import Generator
from meristem.model.config import Attention, Causal, Embedding, FeedForward, Learned, TokenHead, TransformerConfig
from meristem.model_directory import ModelCard, load_any, save_model
from meristem_domains.protein.alphabet import tokenizer as protein_tokenizer
from model_runs import specs


def config(**changes: Any) -> TransformerConfig:
    values: dict[str, Any] = {
        "width": 32,
        "num_layers": 2,
        "embedding": Embedding(vocab_size=33),
        "attention": Attention(num_heads=4, pattern=Causal()),
        "feedforward": FeedForward(width=48),
        "head": TokenHead(activation=None),
    }
    return TransformerConfig(**{**values, **changes})


def save(folder: Path, architecture: TransformerConfig) -> Path:
    card = ModelCard(architecture, protein_tokenizer(), specs(("tokens",)), domain="protein")
    model = card.build()
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * (0.3 if parameter.ndim > 1 else 0.1)
    # trained models hardly ever make a special symbol within a sequence
    model.heads["tokens"].bias.data[[0, 1, 2, 3, 31, 32]] = -30
    save_model(folder, card, model)
    return folder


@pytest.fixture
def folder(tmp_path: Path, rng: np.random.Generator) -> Path:
    return save(tmp_path / "decoder", config())


def test_texts_go_on_from_prompts_in_their_order(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["generate", str(folder), "--prompt", "MKT", "--prompt", "GSH", "--max-new-tokens", "20", "--seed", "3"]
    assert main(argv) == 0
    first = capsys.readouterr().out.splitlines()
    assert [line[:3] for line in first] == ["MKT", "GSH"]
    assert all(len(line) > 3 for line in first)
    assert main(argv) == 0
    assert capsys.readouterr().out.splitlines() == first
    assert main([*argv[:-1], "4"]) == 0
    assert capsys.readouterr().out.splitlines() != first
    made = meristem.generate(folder, ["MKT", "GSH"], max_new_tokens=20, seed=3)
    assert [f"MKT{made[0]}", f"GSH{made[1]}"] == first


def test_a_file_of_prompts_gives_a_file_of_samples(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_text("MKT\nGSHM\nA\n")
    output = tmp_path / "texts.jsonl"
    argv = ["generate", str(folder), "--prompts", str(tmp_path / "prompts.txt"), "--output", str(output), "-n", "2"]
    assert main([*argv, "--max-new-tokens", "9", "--tokens-per-batch", "40"]) == 0
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(row["prompt"], row["sample"]) for row in rows] == [(p, n) for p in ("MKT", "GSHM", "A") for n in (0, 1)]
    for row in rows:
        assert len(row["ids"]) == len(row["log_probabilities"]) <= 9
        assert abs(sum(row["log_probabilities"]) - row["score"]) < 1e-6
        assert row["reason"] == "stop" or len(row["ids"]) == 9
        assert len(row["text"]) <= len(row["ids"])
    made = meristem.generate(folder, ["MKT", "GSHM", "A"], num_samples=2, max_new_tokens=9)
    assert [row["text"] for row in rows] == [text for texts in made for text in texts]
    assert "6 texts" in capsys.readouterr().out
    assert not list(tmp_path.glob("*.part"))


def test_prompts_come_from_standard_input(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"MKT\nGSH\n")))
    assert main(["generate", str(folder), "--prompts", "-", "--beams", "3", "--max-new-tokens", "5"]) == 0
    assert [line[:3] for line in capsys.readouterr().out.splitlines()] == ["MKT", "GSH"]


def test_a_text_is_streamed_as_it_is_made(folder: Path) -> None:
    card, model = load_any(folder)
    generator = Generator(model, card.tokenizer)
    pieces: list[str] = []
    options = GenerateOptions(max_new_tokens=15, temperature=1.2)
    [[sample]] = generator.generate(["MKT"], options, lambda prompt, number, piece: pieces.append(piece))
    assert "".join(pieces) == sample.text
    assert len(pieces) > 1


def test_a_stop_text_ends_a_text_where_it_stands(folder: Path) -> None:
    model = meristem.load(folder, device="cpu")
    [whole] = model.generate(["MKTAY"], max_new_tokens=40, temperature=1.0, seed=5)
    stop = whole[4:6]
    [stopped] = model.generate(["MKTAY"], max_new_tokens=40, temperature=1.0, seed=5, stop=(stop,))
    assert stopped == whole[: whole.index(stop) + 2]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "one of --prompt TEXT and --prompts FILE must be given"),
        (["--prompt", "MKT", "--prompts", "x"], "one of --prompt TEXT and --prompts FILE must be given"),
        (["--prompt", "MK7"], "prompt:1: record '1': '7' is not in the alphabet"),
        (["--prompt", "MKT", "--prompt", "M!"], "prompt:2: record '2': '!' is not in the alphabet"),
        (["--prompts", "none.txt"], "none.txt: no such file"),
        (["--prompt", "MKT", "--compile"], "--compile has no effect on generate"),
        (["--prompt", "MKT", "--top-k", "0"], "top_k must be 1 or more; got 0"),
        (["--prompt", "MKT", "--temperature", "0", "--top-p", "0.5"], "top_p has no effect at temperature 0"),
        (["--prompt", "MKT", "--beams", "2", "--stop", "A"], "num_beams searches and draws nothing"),
        (["--prompt", "MKT", "--output", "texts.csv"], "--output must end in .jsonl; got texts.csv"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    argv: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", str(folder), *argv]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_an_empty_line_is_named_and_nothing_is_left(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_text("MKT\n\nGSH\n")
    output = tmp_path / "texts.jsonl"
    assert main(["generate", str(folder), "--prompts", str(tmp_path / "prompts.txt"), "--output", str(output)]) == 2
    assert "prompts.txt:2: a prompt must not be empty" in capsys.readouterr().err
    assert not list(tmp_path.glob("texts*"))


def test_models_that_cannot_do_it_are_refused(
    tmp_path: Path, rng: np.random.Generator, capsys: pytest.CaptureFixture[str]
) -> None:
    encoder = save(tmp_path / "encoder", config(attention=Attention(num_heads=4)))
    assert main(["generate", str(encoder), "--prompt", "MKT"]) == 2
    assert "generating needs a decoder or an encoder-decoder" in capsys.readouterr().err
    short = save(tmp_path / "short", config(position=Learned(max_positions=10)))
    assert main(["generate", str(short), "--prompt", "MKT", "--max-new-tokens", "8"]) == 2
    assert "prompt:1: record '1': prompt and new tokens must be 10 tokens or fewer" in capsys.readouterr().err
