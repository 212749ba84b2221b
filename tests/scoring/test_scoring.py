"""Contacts and likelihoods, against what the slow and obvious way gives."""

import csv
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from small_scored import by_brute_force

from meristem.cli.main import main
from meristem.data.pack import pack
from meristem.model.config import (
    Attention,
    Causal,
    Embedding,
    FeedForward,
    Full,
    Learned,
    Pattern,
    TokenHead,
    TransformerConfig,
)
from meristem.model.model import Model
from meristem.model_directory import ModelCard, save_model
from meristem.scoring.contacts import contact_maps
from meristem_domains.protein.alphabet import tokenizer as protein_tokenizer
from model_runs import specs

TOKENIZER = protein_tokenizer()


def build(heads: tuple[str, ...], **changes: object) -> Model:
    values = {
        "width": 32,
        "num_layers": 2,
        "embedding": Embedding(vocab_size=33, mask_id=32, mask_dropout_frac=0.12),
        "attention": Attention(num_heads=4),
        "feedforward": FeedForward(width=64),
        "head": TokenHead(),
    }
    model = Model(TransformerConfig(**{**values, **changes}), specs(heads))
    for parameter in model.parameters():
        draw = torch.randn_like(parameter)
        parameter.data = draw / parameter.shape[-1] ** 0.5 if parameter.ndim > 1 else 1 + 0.3 * draw
    return model.eval()


def random_protein(rng: np.random.Generator, length: int) -> str:
    return "".join(rng.choice(list("LAGVSERTIDPKQNFYMHWC"), length))


def column_of(*sequences: str) -> object:
    import pyarrow as pa

    return TOKENIZER.encode_column(pa.array(sequences, pa.large_string()))


@pytest.fixture
def proteins(rng: np.random.Generator) -> list[str]:
    return [random_protein(rng, int(n)) for n in (5, 17, 17, 40)]


def maps_by_hand(model: Model, sequence: str) -> np.ndarray:
    """Symmetric, corrected maps `[L, H, n, n]`, one element at a time."""
    hidden = model.trunk(pack([TOKENIZER.encode(sequence)], [0]), attentions=(0, 1))
    found = []
    for layer in (0, 1):
        maps = hidden.attentions[layer][0][:, 1:-1, 1:-1].double().detach().numpy()
        maps = maps + maps.transpose(0, 2, 1)
        rows, columns, total = maps.sum(2), maps.sum(1), maps.sum((1, 2))
        found.append(
            np.array(
                [
                    [[m[i, j] - r[i] * c[j] / t for j in range(len(r))] for i in range(len(r))]
                    for m, r, c, t in zip(maps, rows, columns, total)
                ]
            )
        )
    return np.stack(found)


def test_contacts_are_the_logistic_regression_of_corrected_maps(proteins: list[str]) -> None:
    model = build(("contacts",))
    weights = model.heads["contacts"].regression.weight.double().detach().numpy().reshape(2, 4)
    bias = model.heads["contacts"].regression.bias.item()
    for sequence, got in zip(proteins, contact_maps(model, column_of(*proteins), (1, 1)), strict=True):
        logits = np.einsum("lh,lhij->ij", weights, maps_by_hand(model, sequence)) + bias
        assert got.shape == (len(sequence), len(sequence))
        np.testing.assert_allclose(got, 1 / (1 + np.exp(-logits)), atol=1e-5)  # fp32 sums of 8 maps
        np.testing.assert_allclose(got, got.T, atol=1e-6)


def test_without_weights_contacts_are_the_mean_of_corrected_maps(proteins: list[str]) -> None:
    model = build(())
    for sequence, got in zip(proteins, contact_maps(model, column_of(*proteins), (1, 1)), strict=True):
        np.testing.assert_allclose(got, maps_by_hand(model, sequence).mean((0, 1)), atol=1e-5)


@pytest.fixture
def fasta(proteins: list[str], tmp_path: Path) -> Path:
    path = tmp_path / "in.fasta"
    path.write_text("".join(f">{name} x\n{s}\n" for name, s in zip(("a", "b/1", "a", "file"), proteins)))
    return path


def save(model: Model, folder: Path) -> Path:
    save_model(folder, ModelCard(model.config, TOKENIZER, specs(tuple(model.heads)), domain="protein"), model)
    return folder


def test_score_contacts_writes_a_map_a_record_and_says_what_they_are(
    proteins: list[str], fasta: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for heads, said in (
        (("tokens", "contacts"), "probabilities of contact, by the model's own"),
        (("tokens",), "scores that rank, not probabilities"),
    ):
        model = build(heads)
        own = save(model, tmp_path / f"own{len(heads)}")
        out, plots = tmp_path / f"c{len(heads)}.npz", tmp_path / f"plots{len(heads)}"
        arguments = ["--contacts", "--output", str(out), "--plots", str(plots)]
        assert main(["score", str(own), str(fasta), *arguments]) == 0
        assert said in capsys.readouterr().out
        found = np.load(out)
        assert list(found) == ["a", "b/1", "a#2", "file"]
        for got, wanted in zip(found.values(), contact_maps(model, column_of(*proteins), (1, 1)), strict=True):
            np.testing.assert_array_equal(got, wanted)
        pictures = sorted(plots.iterdir())
        assert [p.name for p in pictures] == ["00001_a.png", "00002_b_1.png", "00003_a_2.png", "00004_file.png"]
        assert all(p.read_bytes().startswith(b"\x89PNG") for p in pictures)


@pytest.mark.parametrize(
    ("pattern", "arguments", "one_pass", "closing"),
    [
        (Full(), [], False, False),
        (Full(), ["--one-pass"], True, False),
        (Causal(), [], False, False),
        (Causal(), ["--closing"], False, True),
    ],
)
def test_score_writes_a_likelihood_a_record(
    pattern: Pattern,
    arguments: list[str],
    one_pass: bool,
    closing: bool,
    proteins: list[str],
    fasta: Path,
    tmp_path: Path,
) -> None:
    """Of a causal model too, though its alphabet has a mask."""
    model = build(("tokens",), attention=Attention(num_heads=4, pattern=pattern))
    own = save(model, tmp_path / "own")
    for name in ("s.csv", "s.parquet"):
        assert main(["score", str(own), str(fasta), "--output", str(tmp_path / name), *arguments]) == 0
    with (tmp_path / "s.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row["id"] for row in rows] == ["a", "b/1", "a", "file"]
    kind = "masked" if isinstance(pattern, Full) else "causal"
    perplexity = "pseudo_perplexity" if kind == "masked" else "perplexity"
    assert list(rows[0]) == ["id", "length", "num_scored", "log_likelihood", perplexity]
    for row, sequence in zip(rows, proteins):
        ids = TOKENIZER.encode(sequence).ids.tolist()
        wanted = by_brute_force(kind, model, TOKENIZER, ids, one_pass=one_pass, closing=closing)
        assert int(row["length"]) == len(sequence)
        assert int(row["num_scored"]) == len(sequence) + closing
        assert float(row["log_likelihood"]) == pytest.approx(sum(wanted), rel=1e-5)  # fp32
        assert float(row[perplexity]) == pytest.approx(np.exp(-np.mean(wanted)), rel=1e-5)
    table = pq.read_table(tmp_path / "s.parquet").to_pydict()
    assert table["log_likelihood"] == [float(row["log_likelihood"]) for row in rows]


def test_a_damaged_model_scores_nothing(fasta: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = build(("tokens",))
    model.heads["tokens"].bias.data[7] = float("nan")
    own = save(model, tmp_path / "own")
    assert main(["score", str(own), str(fasta), "--output", str(tmp_path / "s.csv")]) == 2
    assert "record 'a': its likelihood is not finite" in capsys.readouterr().err
    assert not (tmp_path / "s.csv").exists()


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        (">a\nMK1\n", ["--output", "o.csv"], "in.fasta:2"),
        (">a\n" + "M" * 31 + "\n", ["--output", "o.csv"], "in.fasta:1: a record must be 30 tokens or fewer.*got 31"),
        (">a\nMK\n>b\n" + "M" * 31 + "\n", ["--contacts", "--output", "o.npz"], "in.fasta:3: a record must be 30"),
        (">a\nMK\n", ["--output", "o.npz"], "--output must end in .csv or .parquet; got o.npz"),
        (">a\nMK\n", ["--contacts", "--output", "o.csv"], "--output must end in .npz; got o.csv"),
        (">a\nMK\n", ["--output", "o.csv", "--plots", "p"], "--plots has no effect without --contacts"),
        (">a\nMK\n", ["--output", "o.csv", "--tokens-per-batch", "0"], "--tokens-per-batch must be 1 or more; got 0"),
        (
            ">a\nMK\n",
            ["--output", "o.csv", "--domain", "nope"],
            "domain must be installed or a dotted path; got 'nope'",
        ),
    ],
)
def test_what_cannot_be_scored_is_one_line_and_leaves_nothing(
    text: str,
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import re

    monkeypatch.chdir(tmp_path)
    own = save(build(("tokens",), position=Learned(max_positions=32)), tmp_path / "own")
    (tmp_path / "in.fasta").write_text(text)
    assert main(["score", str(own), "in.fasta", *arguments]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert re.search(message, said[0]), said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.fasta", "own"]
