"""`meristem score`: likelihoods, contacts and scorers of other domains, against the slow and obvious way."""

import csv
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import torch
from small_scored import by_brute_force

from meristem.cli.main import main
from meristem.contract import BrokenContract, run_contract
from meristem.data.pack import pack
from meristem.domain import load_domain
from meristem.errors import ConfigError
from meristem.inference.score import find_scorers
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
from meristem.model.outputs import Wanted
from meristem.model_directory import ModelCard, save_model
from meristem.scoring.running import RunningModel
from meristem.scoring.scorer import NoOptions
from meristem_domains.protein.alphabet import tokenizer as protein_tokenizer
from meristem_domains.protein.contacts import contact_maps
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


@pytest.fixture
def proteins(rng: np.random.Generator) -> list[str]:
    return [random_protein(rng, int(n)) for n in (5, 17, 17, 40)]


def contacts_of(model: Model, proteins: list[str]) -> list[np.ndarray]:
    running = RunningModel(model, TOKENIZER)
    return list(contact_maps(running, TOKENIZER.encode_values(proteins), NoOptions()))


def maps_by_hand(model: Model, sequence: str) -> np.ndarray:
    """Symmetric, corrected maps `[L, H, n, n]`, one element at a time."""
    hidden = model.trunk(pack([TOKENIZER.encode(sequence)], [0]), Wanted(attentions=(0, 1)))
    found = []
    for layer in (0, 1):
        maps = hidden.attentions[layer][0][:, 1:-1, 1:-1].double().detach().numpy()
        maps = maps + maps.transpose(0, 2, 1)
        rows, columns, total = maps.sum(2), maps.sum(1), maps.sum((1, 2))
        corrected = [
            [[m[i, j] - r[i] * c[j] / t for j in range(len(r))] for i in range(len(r))]
            for m, r, c, t in zip(maps, rows, columns, total)
        ]
        found.append(np.array(corrected))
    return np.stack(found)


def test_contacts_are_the_logistic_regression_of_corrected_maps(proteins: list[str]) -> None:
    model = build(("contacts",))
    weights = model.heads["contacts"].regression.weight.double().detach().numpy().reshape(2, 4)
    bias = model.heads["contacts"].regression.bias.item()
    for sequence, got in zip(proteins, contacts_of(model, proteins), strict=True):
        logits = np.einsum("lh,lhij->ij", weights, maps_by_hand(model, sequence)) + bias
        assert got.shape == (len(sequence), len(sequence))
        np.testing.assert_allclose(got, 1 / (1 + np.exp(-logits)), atol=1e-5)  # fp32 sums of 8 maps
        np.testing.assert_allclose(got, got.T, atol=1e-6)


def test_without_weights_contacts_are_the_mean_of_corrected_maps(proteins: list[str]) -> None:
    model = build(())
    for sequence, got in zip(proteins, contacts_of(model, proteins), strict=True):
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
        arguments = ["--scorer", "contacts", "--output", str(out), "--plots", str(plots)]
        assert main(["score", str(own), str(fasta), *arguments]) == 0
        assert said in capsys.readouterr().out
        found = np.load(out)
        assert list(found) == ["a", "b/1", "a#2", "file"]
        for got, wanted in zip(found.values(), contacts_of(model, proteins), strict=True):
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
    assert "in.fasta:1: record 'a': its score is not finite" in capsys.readouterr().err
    assert not (tmp_path / "s.csv").exists()


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        (">a\nMK1\n", ["--output", "o.csv"], "in.fasta:2"),
        (">a\n" + "M" * 31 + "\n", ["--output", "o.csv"], "in.fasta:1: record 'a': must be 30 tokens or fewer.*got 31"),
        (
            ">a\nMK\n>b\n" + "M" * 31 + "\n",
            ["--scorer", "contacts", "--output", "o.npz"],
            "in.fasta:3: record 'b': must be 30",
        ),
        (">a\nMK\n", ["--output", "o.npz"], "--output must end in .csv, .tsv, .parquet; got o.npz"),
        (">a\nMK\n", ["--scorer", "contacts", "--output", "o.csv"], "--output must end in .npz; got o.csv"),
        (">a\nMK\n", ["--output", "o.csv", "--plots", "p"], "--plots has no effect on the scorer"),
        (">a\nMK\n", ["--output", "o.csv", "--tokens-per-batch", "0"], "tokens_per_batch must be 1 or more; got 0"),
        (
            ">a\nMK\n",
            ["--output", "o.csv", "--domain", "nope"],
            "domain must be installed or a dotted path; got 'nope'",
        ),
        (">a\nMK\n", ["--output", "o.csv", "--scorer", "no"], "must be one of likelihood, contacts, .*; got 'no'"),
        (
            ">a\nMK\n",
            ["--output", "o.csv", "--layer", "3"],
            "unrecognized option --layer: .*; options of the scorer likelihood: --one-pass, --closing",
        ),
        (
            ">a\nMK\n",
            ["--output", "o.npz", "--scorer", "contacts", "--closing"],
            "unrecognized option --closing: .*; options of the scorer contacts: none",
        ),
        (">a\nMK\n", ["--output", "o.csv", "--closing"], "closing has no effect on a bidirectional model"),
        (">a\nMK\n", ["--output", "o.csv", "--prefix-tokens", "x"], "--prefix-tokens: invalid int value: 'x'"),
        (">a\nMK\n", ["--output", "o.npz", "--scorer", "attention"], "needs a model of patches"),
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


def test_no_two_arrays_have_one_name(tmp_path: Path, rng: np.random.Generator) -> None:
    """Ids that look like the names of repeated ones, and any other order of few ids."""
    own = save(build(()), tmp_path / "own")
    for ids in (["a", "a#2", "a"], ["a", "a", "a#2", "a"], [*rng.choice(["a", "a#2", "a#2#2", "a#3"], 12)]):
        proteins = [random_protein(rng, 3 + number) for number in range(len(ids))]
        (tmp_path / "in.fasta").write_text("".join(f">{name}\n{s}\n" for name, s in zip(ids, proteins)))
        output = tmp_path / f"{len(ids)}.npz"
        assert (
            main(["score", str(own), str(tmp_path / "in.fasta"), "--scorer", "contacts", "--output", str(output)]) == 0
        )
        with zipfile.ZipFile(output) as file:
            names = [name.removesuffix(".npy") for name in file.namelist()]
        assert len(set(names)) == len(names) == len(ids)
        assert all(name.startswith(id) for name, id in zip(names, ids))
        with np.load(output) as found:
            assert [len(found[name]) for name in names] == [len(s) for s in proteins]


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_records_that_cannot_be_used_are_skipped_and_named(
    suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One with an unknown symbol, and two that are longer than the model's positions."""
    own = save(build(("tokens",), position=Learned(max_positions=32)), tmp_path / "own")
    records = [("a", "MKT"), ("long", "M" * 31), ("b", "MK1"), ("c", "M" * 30), ("longer", "A" * 500)]
    (tmp_path / "in.fasta").write_text("".join(f">{name}\n{s}\n" for name, s in records))
    output = tmp_path / f"o{suffix}"
    arguments = ["score", str(own), str(tmp_path / "in.fasta"), "--output", str(output)]
    assert main([*arguments, "--on-error", "skip"]) == 0
    said = capsys.readouterr()
    assert "refused records: 3" in said.out
    for place in ("in.fasta:3: must be 30 tokens", "in.fasta:9: must be 30 tokens", "in.fasta:6: '1' is no residue"):
        assert place in said.err, said.err
    read = pa.csv.read_csv if suffix == ".csv" else pq.read_table
    assert read(output)["id"].to_pylist() == ["a", "c"]


def test_files_do_not_depend_on_the_token_budget(tmp_path: Path, rng: np.random.Generator) -> None:
    proteins = [random_protein(rng, int(n)) for n in rng.integers(1, 60, 20)]
    (tmp_path / "in.fasta").write_text("".join(f">p{row}\n{s}\n" for row, s in enumerate(proteins)))
    for heads, pattern in ((("tokens",), Full()), (("tokens",), Causal())):
        own = save(build(heads, attention=Attention(num_heads=4, pattern=pattern)), tmp_path / type(pattern).__name__)
        written = set()
        for budget in ("1", "64", "4096"):
            output = own / f"{budget}.csv"
            arguments = ["--output", str(output), "--tokens-per-batch", budget]
            assert main(["score", str(own), str(tmp_path / "in.fasta"), *arguments]) == 0
            written.add(output.read_bytes())
        assert len(written) == 1


def test_bf16_scores_are_near_those_in_fp32(proteins: list[str], fasta: Path, tmp_path: Path) -> None:
    own = save(build(("tokens",)), tmp_path / "own")
    found = []
    for precision in ("fp32", "bf16"):
        output = tmp_path / f"{precision}.parquet"
        assert main(["score", str(own), str(fasta), "--output", str(output), "--precision", precision]) == 0
        found.append(pq.read_table(output)["log_likelihood"].to_numpy())
    assert (found[0] != found[1]).any()
    np.testing.assert_allclose(*found, rtol=0.1)  # 8 bits, through two layers


@pytest.mark.parametrize("heads", [("contacts",), ()])
def test_contacts_in_bf16_are_near_those_in_fp32(heads: tuple[str, ...], fasta: Path, tmp_path: Path) -> None:
    own = save(build(heads), tmp_path / "own")
    found = []
    for precision in ("fp32", "bf16"):
        output = tmp_path / f"{precision}.npz"
        arguments = ["--scorer", "contacts", "--output", str(output), "--precision", precision]
        assert main(["score", str(own), str(fasta), *arguments]) == 0
        found.append(np.load(output)["file"])
    assert (found[0] != found[1]).any()
    np.testing.assert_allclose(*found, atol=0.1)


OTHER_DOMAIN = """
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import pyarrow as pa
from meristem.scoring.scorer import Scorer, option
from meristem_domains.protein import domain as protein

@dataclass(frozen=True, kw_only=True)
class Options:
    symbol: Literal["A", "C"] = option("A", "which is counted")
    weight_frac: float = option(1.0, "what one counts")
    is_signed: bool = option(True, "whether")

def score(running, column, options):
    wanted = running.tokenizer.vocab.index(options.symbol)
    for row in range(len(column)):
        ids = column.ids[column.offsets[row] : column.offsets[row + 1]]
        running.advance(len(ids))
        count = float((ids == wanted).sum()) * options.weight_frac
        yield {"count": -count if options.is_signed else count}

counts = Scorer(
    help="how often a symbol occurs",
    options=Options,
    describe=lambda running, options: f"count of {options.symbol}",
    schema=lambda running, options: pa.schema({"count": pa.float64()}),
    score=score,
)
domain = replace(protein, name="counted", scorers={"counts": counts})
"""


def test_a_domain_brings_a_scorer_with_options_of_its_own(
    proteins: list[str],
    fasta: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "counting_domain.py").write_text(OTHER_DOMAIN)
    monkeypatch.syspath_prepend(tmp_path)
    own = save(build(()), tmp_path / "own")
    arguments = ["score", str(own), str(fasta), "--domain", "counting_domain:domain", "--scorer", "counts"]
    output = ["--output", str(tmp_path / "o.csv")]
    assert main([*arguments, *output, "--symbol", "C", "--weight-frac", "0.5", "--no-is-signed"]) == 0
    assert "count of C" in capsys.readouterr().out
    found = pa.csv.read_csv(tmp_path / "o.csv").to_pydict()
    assert found["count"] == [s.count("C") / 2 for s in proteins]
    assert main([*arguments, *output, "--overwrite"]) == 0
    assert pa.csv.read_csv(tmp_path / "o.csv")["count"].to_pylist() == [-float(s.count("A")) for s in proteins]
    assert main([*arguments, *output, "--symbol", "D"]) == 2
    assert "invalid choice: 'D'" in capsys.readouterr().err
    assert main([*arguments, "--help"]) == 0
    said = capsys.readouterr().out
    assert "--weight-frac FLOAT" in said
    assert "how often a symbol occurs" in said
    assert main([*arguments, *output, "--plots", str(tmp_path / "p")]) == 2
    assert "--plots has no effect on the scorer counts" in capsys.readouterr().err


def test_one_name_for_two_scorers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    protein = load_domain("protein")
    other = replace(protein, scorers={"contacts": replace(protein.scorers["contacts"], help="others")})
    monkeypatch.setattr("meristem.inference.score.find_all", lambda group: {"protein": protein, "other": other})
    with pytest.raises(ConfigError, match="scorer 'contacts' is offered by protein and by other; say which"):
        find_scorers()
    assert find_scorers("protein")["contacts"] is protein.scorers["contacts"]


def test_the_contract_refuses_a_scorer_without_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoiled = OTHER_DOMAIN.replace('symbol: Literal["A", "C"] = option("A", "which is counted")', "symbol: str")
    assert spoiled != OTHER_DOMAIN
    (tmp_path / "spoiled_domain.py").write_text(spoiled)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(BrokenContract, match=r"scorers: .*missing 1 required keyword-only argument: 'symbol'"):
        list(run_contract("spoiled_domain:domain"))
