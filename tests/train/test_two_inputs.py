"""Runs on records of two inputs: which column and which tokenizer is whose, and what is refused before a step."""

import contextlib
import io
from dataclasses import replace

import letters
import numpy as np
import pytest
from letters import LETTERS
from random_proteins import random_proteins

from meristem.cli.main import main
from meristem.cli.run_config import parse
from meristem.inference.formats import read_embeddings
from meristem.model_directory import load_card, load_model, save_model
from meristem.train import datamodule
from meristem.train.run import build
from meristem_domains.protein import domain as protein

TRANSLATION = """
model:
  architecture:
    width: 32
    num_layers: 1
    num_decoder_layers: 1
    embedding: {}
    attention: {num_heads: 4}
    feedforward: {width: 64}
    layers: [{start: 1, attention: {num_heads: 4, pattern: {kind: Causal}}}]
    head: {}
  objective: {class_path: SequenceToSequence}
  optimizer: {lr: 1e-3, warmup_steps: 2}
data: {domain: protein, sources: pairs.csv, tokens_per_batch: 512, split: {validation_frac: 0.3}}
trainer: {max_steps: 4, accelerator: cpu}
watch: {validate_every_n_steps: 2}
"""

NEXT = """
model:
  architecture:
    width: 32
    num_layers: 1
    embedding: {token_types: 2}
    attention: {num_heads: 4}
    feedforward: {width: 64}
    pool: {kind: Prefix, is_dense: true}
    head: {}
  objective: {class_path: NextSentence}
  optimizer: {lr: 1e-3, warmup_steps: 2}
data: {domain: protein, sources: pairs.csv, tokens_per_batch: 512, split: {validation_frac: 0.3}}
trainer: {max_steps: 4, accelerator: cpu}
watch: {validate_every_n_steps: 2}
"""


@pytest.fixture
def pairs(bench, rng):
    """A run folder with configs, and with a table of pairs of proteins and of texts, each of a family."""
    first, second = random_proteins(rng, 40), random_proteins(rng, 40)
    texts = ["".join(rng.choice(list(LETTERS[:-1]), rng.integers(3, 20))) for _ in first]
    rows = [f"{a},{b},{text},f{i % 9}" for i, (a, b, text) in enumerate(zip(first, second, texts))]
    (bench.path / "pairs.csv").write_text("\n".join(["a,b,text,family", *rows, ""]))
    (bench.path / "translation.yaml").write_text(TRANSLATION)
    (bench.path / "next.yaml").write_text(NEXT)
    return bench


@pytest.mark.parametrize(("config", "inputs"), [("translation", ("source", "target")), ("next", ("first", "second"))])
def test_both_inputs_are_columns_of_a_table(pairs, config, inputs):
    columns = [f"--data.column.{name}={column}" for name, column in zip(inputs, "ab")]
    done = pairs.run(*columns, "--run_dir", "run", config=f"{config}.yaml")
    assert done.code == 0, done.err
    assert [row["step"] for row in pairs.rows("run")] == list("1234")
    table = pairs.path / "pairs.csv"
    table.write_text(table.read_text().replace("a,b,", f"{inputs[0]},{inputs[1]},", 1))
    again = pairs.run("--run_dir", "again", config=f"{config}.yaml")  # columns of the inputs' own names
    assert again.code == 0, again.err
    assert pairs.rows("again")[-1]["loss"] == pairs.rows("run")[-1]["loss"]


@pytest.mark.parametrize(("config", "inputs"), [("translation", ("source", "target")), ("next", ("first", "second"))])
def test_the_command_in_the_readme_of_a_model_works_as_printed(pairs, config, inputs):
    columns = [f"--data.column.{name}={column}" for name, column in zip(inputs, "ab")]
    assert pairs.run(*columns, "--run_dir", "run", config=f"{config}.yaml").code == 0
    model = pairs.path / "run" / "model"
    [command] = [line for line in (model / "README.md").read_text().splitlines() if "    meristem " in line]
    for name, column in zip(inputs, "ab"):
        command = command.replace(f"{name}=COLUMN", f"{name}={column}")
    places = {"THIS_DIRECTORY": str(model), "INPUT": str(pairs.path / "pairs.csv"), "vectors": str(pairs.path / "out")}
    words = [places.get(word, word) for word in command.split()]
    assert words[:2] == ["meristem", "embed"]
    assert "COLUMN" not in command
    assert main(words[1:]) == 0
    assert len(read_embeddings(pairs.path / "out").ids) == 40
    # of a domain that is not installed nothing can be read
    card, weights = load_model(model)
    save_model(model, replace(card, domain="letters"), weights)
    assert "    meristem inspect THIS_DIRECTORY\n" in (model / "README.md").read_text()


def test_a_domain_may_tokenize_the_input_of_another(pairs):
    columns = ["--data.column", "{source: a, target: text}"]
    foreign = ["--data.inputs", "{target: {domain: 'letters:domain'}}"]
    refused = pairs.run(*columns, "--run_dir", "run", config="translation.yaml", verb="fit")
    assert refused.code == 0, refused.err  # letters are residues as well, read as such
    done = pairs.run(*columns, *foreign, "--run_dir", "letters", config="translation.yaml")
    assert done.code == 0, done.err
    assert pairs.rows("letters")[-1]["loss"] != pairs.rows("run")[-1]["loss"]
    card = load_card(pairs.path / "letters" / "model")
    assert [card.inputs[name].domain or card.domain for name in card.inputs] == ["protein", "letters"]
    assert card.tokenizer_of("source") == protein.tokenizer()
    assert card.tokenizer_of("target") == letters.domain.tokenizer() != protein.tokenizer()
    assert list(load_card(pairs.path / "run" / "model").inputs) == ["source", "target"]
    # what goes on from that model reads each input as it does, without saying so again
    start = ["--model.init_from", "letters/model", "--trainer.max_steps", "1"]
    for more, run in (([], "silent"), (foreign, "said")):
        assert pairs.run(*columns, *start, *more, "--run_dir", run, config="translation.yaml").code == 0
        assert load_card(pairs.path / run / "model").inputs == card.inputs
    assert pairs.rows("silent") == pairs.rows("said")
    other = ["--data.inputs", "{target: {domain: 'letters:domain', tokenizer: {more: AB}}}"]
    done = pairs.run(*columns, *start, *other, "--run_dir", "other", config="translation.yaml")
    assert done.code == 2
    assert "the model must have the vocabulary of the domain" in done.err
    table = pairs.path / "pairs.csv"
    table.write_text(table.read_text().replace(",f3\n", "!,f3\n", 1).replace("!", " 7", 1))
    done = pairs.run(*columns, *foreign, "--run_dir", "bad", config="translation.yaml")
    assert done.code == 2
    assert "pairs.csv:5: '7' is not in the alphabet" in done.err
    assert len(done.err.splitlines()) == 1
    skipped = pairs.run(*columns, *foreign, "--data.on_error", "skip", "--run_dir", "bad", config="translation.yaml")
    assert skipped.code == 0, skipped.err
    assert "1 record(s) refused" in skipped.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data.column", "a"], "column must say which input it is of, one of source, target"),
        (["--data.column", "{first: a}"], "column must be of an input, one of source, target; got 'first'"),
        (["--data.column", "{source: a}"], "pairs.csv:1: a table needs a column for the input 'target'"),
        (["--data.column", "{source: a, target: c}"], "pairs.csv:1: no column 'c'; columns: a, b, text, family"),
        (["--data.sources", "proteins.fasta"], "proteins.fasta:1: no column for the input 'target': FASTA has none"),
        (
            ["--data.inputs", "{source: {domain: 'letters:domain'}}"],
            "data.inputs must name inputs of the objective behind",
        ),
        (
            ["--data.inputs", "{other: {domain: 'letters:domain'}}"],
            "its first one, which data.tokenizer reads: target; got",
        ),
        (["--data.inputs", "{target: {domain: lettres}}"], "domain must be installed or a dotted path; got 'lettres'"),
        (
            ["--data.inputs", "{target: {domain: 'letters:domain', tokenizer: {less: a}}}"],
            "the tokenizer of letters does not",
        ),
        (
            ["--data.inputs", "{target: {domain: 'letters:domain', tokenizer: {more: ABCDEFG}}}"],
            "the input 'target' has 36 symbols, and the model rows for 33; set model.architecture.embedding.vocab_size",
        ),
    ],
)
def test_what_fits_no_input_is_one_line_and_leaves_nothing(pairs, arguments, message):
    columns = [] if "--data.column" in arguments else ["--data.column", "{source: a, target: text}"]
    done = pairs.run(*columns, *arguments, "--run_dir", "run", config="translation.yaml")
    assert done.code == 2
    assert message in done.err
    assert len(done.err.splitlines()) == 1
    assert not (pairs.path / "run").exists()


def bound_data(path, *arguments: str) -> datamodule.DataModule:
    config = parse(["--config", "translation.yaml", "--data.column", "{source: a, target: b}", *arguments])
    task, data = build(config)
    with contextlib.redirect_stderr(io.StringIO()):
        data.bind(task)
    return data


@pytest.mark.parametrize("method", ["hash", "similarity"])
def test_a_group_lies_in_one_part_of_a_run(pairs, method, monkeypatch):
    def families(*arguments: str) -> list[set[str]]:
        data = bound_data(pairs.path, "--data.split.method", method, *arguments)
        named = [record.id for part in data.parts.values() for record in part.store.records(part.rows)]
        assert sorted(named, key=int) == [str(i) for i in range(1, 41)]
        return [{f"f{(int(r.id) - 1) % 9}" for r in part.store.records(part.rows)} for part in data.parts.values()]

    train, validation = families("--data.group_column", "family")
    assert not train & validation
    train, validation = families()  # the mutant: a split that knows no group
    assert train & validation


def test_a_group_in_both_files_is_refused(pairs, rng):
    rows = [f"{a},{a},x,f{i + 3}" for i, a in enumerate(random_proteins(rng, 9))]
    (pairs.path / "more.csv").write_text("\n".join(["a,b,text,family", *rows, ""]))
    arguments = ["--data.column", "{source: a, target: b}", "--data.validation_sources", "more.csv"]
    done = pairs.run(*arguments, "--data.group_column", "family", "--run_dir", "run", config="translation.yaml")
    assert done.code == 2
    assert "more.csv:2: the group 'f3' must lie in one part; this record is in validation, and" in done.err
    assert np.all([word in done.err for word in ("pairs.csv:5", "in train")])
