"""Texts from files of prompts: the same as one prompt at a time, whatever happens on the way."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_models import random_protein, redraw, tiny_config

from meristem.cli.main import main
from meristem.errors import ConfigError, DataError
from meristem.generation.options import GenerateOptions
from meristem.generation.text import Generator
from meristem.inference.generate import Generate, RunningGenerate
from meristem.inference.run import run_job
from meristem.model.config import Attention, Causal, Embedding, Learned
from meristem.model_directory import ModelCard, load_any, save_model
from meristem_domains.protein import domain
from model_runs import specs

DRAWN = GenerateOptions(max_new_tokens=7, num_samples=2, top_k=12, seed=11)


@pytest.fixture
def model(tmp_path: Path, rng: np.random.Generator) -> Path:
    """A decoder."""
    torch.manual_seed(int(rng.integers(2**31)))
    config = tiny_config(
        embedding=Embedding(vocab_size=33),
        attention=Attention(num_heads=4, pattern=Causal()),
        position=Learned(max_positions=40),
    )
    card = ModelCard(config, domain.tokenizer(), specs(("tokens",)), domain=domain.name)
    made = redraw(card.build())
    made.heads["tokens"].bias.data[[0, 1, 2, 3, 31, 32]] = -30  # special symbols within a text are rare
    save_model(tmp_path / "decoder", card, made)
    return tmp_path / "decoder"


def write_prompts(path: Path, prompts: list[str]) -> str:
    path.write_text("".join(f"{prompt}\n" for prompt in prompts))
    return str(path)


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("options", [DRAWN, GenerateOptions(max_new_tokens=5, num_beams=3, temperature=0.0)])
def test_texts_are_those_of_one_prompt_at_a_time(
    model: Path, tmp_path: Path, rng: np.random.Generator, options: GenerateOptions
) -> None:
    prompts = [random_protein(rng, 1, 30) for _ in range(40)]
    prompts[5] = prompts[30] = prompts[0]
    source, output = write_prompts(tmp_path / "in.txt", prompts), tmp_path / "out.jsonl"
    done = run_job(Generate(options=options, tokens_per_batch=200), model, [source], output)
    rows = rows_of(output)
    assert [(row["prompt"], row["prompt_number"], row["sample"]) for row in rows] == [
        (prompt, number, sample) for number, prompt in enumerate(prompts) for sample in range(options.num_samples)
    ]
    assert (done["records"], done["computed"], done["rows"]) == (40, len(set(prompts)), len(rows))
    card, loaded = load_any(model)
    generator = Generator(loaded, card.tokenizer)
    wanted = [sample for prompt in prompts for sample in next(generator.generate([prompt], options))]
    assert [row["text"] for row in rows] == [sample.text for sample in wanted]
    assert [row["ids"] for row in rows] == [list(sample.generated.ids) for sample in wanted]
    for row, sample in zip(rows, wanted):
        np.testing.assert_allclose(row["log_probabilities"], sample.generated.log_probabilities, atol=1e-5)
    again = run_job(Generate(options=options), model, [source], output)
    assert again == json.loads(json.dumps(done)), "it was not made again"
    with pytest.raises(ConfigError, match="is there already"):
        run_job(Generate(options=replace(options, max_new_tokens=4)), model, [source], output)


def test_prompts_may_be_a_column_of_a_table_and_bad_ones_are_skipped(
    model: Path, tmp_path: Path, rng: np.random.Generator
) -> None:
    prompts = [random_protein(rng, 1, 30) for _ in range(20)]
    rows = "".join(f"r{row},{prompt}\n" for row, prompt in enumerate(prompts))
    (tmp_path / "in.csv").write_text(f"name,begin\n{rows}long,{'M' * 39}\n")
    output = tmp_path / "out.jsonl"
    command = ["generate", str(model), "--prompts", str(tmp_path / "in.csv"), "--output", str(output)]
    command += ["--column", "begin", "--id-column", "name", "--max-new-tokens", "3"]
    assert main(command) == 2
    assert not list(tmp_path.glob("out*"))
    assert main([*command, "--on-error", "skip", "--devices", "2"]) == 0
    made = [(row["id"], row["prompt"]) for row in rows_of(output)]
    assert made == [(f"r{row}", prompt) for row, prompt in enumerate(prompts)]
    manifest = json.loads((tmp_path / "out.jsonl.manifest.json").read_text())
    [refused] = manifest["refused"]["records"]
    assert refused["id"] == "long"
    assert "must be 40 tokens or fewer" in refused["reason"]
    (tmp_path / "bad.txt").write_bytes(b"MK\n\xff\n")
    with pytest.raises(DataError, match=r"bad\.txt:2: must be UTF-8"):
        run_job(Generate(), model, [str(tmp_path / "bad.txt")], tmp_path / "bad.jsonl")


def test_a_batch_that_does_not_fit_is_halved(
    model: Path, tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_prompts(tmp_path / "in.txt", [random_protein(rng, 1, 30) for _ in range(12)])
    run_job(Generate(options=DRAWN), model, [source], tmp_path / "whole.jsonl")
    real, refused = Generator.go_on, []

    def tight(self: Generator, prompts: list[np.ndarray], *given: Any) -> Any:
        if len(prompts) > 2:
            refused.append(len(prompts))
            raise torch.OutOfMemoryError("no memory")
        return real(self, prompts, *given)

    monkeypatch.setattr(Generator, "go_on", tight)
    run_job(Generate(options=DRAWN), model, [source], tmp_path / "out.jsonl")
    assert refused
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_a_stopped_run_makes_only_what_is_left(
    model: Path, tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_prompts(tmp_path / "in.txt", [random_protein(rng, 1, 30) for _ in range(60)])
    run_job(Generate(options=DRAWN), model, [source], tmp_path / "whole.jsonl")
    real, calls = RunningGenerate.rows, []

    def dying(self: RunningGenerate, *given: Any) -> Any:
        calls.append(len(given[0]))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, *given)

    monkeypatch.setattr(RunningGenerate, "rows", dying)
    with pytest.raises(KeyboardInterrupt):
        run_job(Generate(options=DRAWN), model, [source], tmp_path / "out.jsonl")
    run_job(Generate(options=DRAWN), model, [source], tmp_path / "out.jsonl")
    assert len(calls) == 3 + 2, "four chunks, two of them finished"
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
