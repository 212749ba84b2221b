"""Verbs on records of two inputs, and on domains whose records are read in several views."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
import torch
from small_models import READOUTS, RESIDUES, random_protein, redraw, tiny_config, write_fasta

import meristem
from meristem import loaded
from meristem.cli.main import main
from meristem.data.pack import pack
from meristem.data.tokenizer import RefusedSymbol
from meristem.data.views import Views
from meristem.errors import ConfigError, DataError
from meristem.inference import run
from meristem.inference.dedupe import Seen
from meristem.inference.embed import Embed
from meristem.inference.encoding import Reading
from meristem.inference.formats import read_embeddings
from meristem.inference.predict import Predict
from meristem.inference.run import run_job
from meristem.inference.score import Score
from meristem.model.config import Embedding, Learned, Prefix
from meristem.model.heads import Readout
from meristem.model.outputs import Wanted
from meristem.model_directory import InputCard, ModelCard, load_card, load_model, save_model
from meristem.types import Record, TokenColumn, Tokens
from meristem_domains.protein import domain
from model_runs import specs

MakeModel = Callable[..., Path]

TOKENIZER = domain.tokenizer()


@pytest.fixture
def pairs(tmp_path: Path, rng: np.random.Generator) -> list[tuple[str, str]]:
    """Pairs of sequences, some of them repeated, in a table `pairs.csv` with the columns a and b."""
    some = [(random_protein(rng), random_protein(rng)) for _ in range(25)]
    found = [some[rng.integers(len(some))] for _ in range(40)]
    found[:3] = [(found[0][0], found[0][1]), (found[0][0], found[3][1]), (found[0][1], found[0][0])]
    rows = "".join(f"r{row},{first},{second}\n" for row, (first, second) in enumerate(found))
    (tmp_path / "pairs.csv").write_text(f"id,a,b\n{rows}")
    return found


@pytest.fixture
def next_sentence(tmp_path: Path, rng: np.random.Generator) -> Path:
    """A model that tells whether one sequence follows another, as training would leave it."""
    torch.manual_seed(int(rng.integers(2**31)))
    config = tiny_config(
        embedding=Embedding(vocab_size=33, token_types=2),
        pool=Prefix(is_dense=True),
        position=Learned(max_positions=70),
    )
    card = ModelCard(
        config,
        TOKENIZER,
        specs(("tokens",), (Readout(name="next_sentence", classes=("next", "random"), pool=None),)),
        domain=domain.name,
        inputs={"first": InputCard(), "second": InputCard()},
        joined_by="NextSentence",
    )
    save_model(tmp_path / "next", card, redraw(card.build()))
    assert load_card(tmp_path / "next") == card
    return tmp_path / "next"


def one_by_one(folder: Path, pairs: list[tuple[str, str]]) -> np.ndarray:
    """`[N, 2]` probabilities of a next-sentence model, by the definition of BERT's pairs."""
    _, model = load_model(folder)
    found = []
    for first, second in pairs:
        one, two = TOKENIZER.encode(first).ids.tolist(), TOKENIZER.encode(second).ids.tolist()[1:]
        while len(one) + len(two) > 70:  # the longer one loses its end
            longer = one if len(one) > 35 and len(one) >= len(two) + (len(two) <= 35) else two
            longer.pop(-2)
        ids = np.array([*one, *two])
        tokens = Tokens(np.arange(len(ids))[:, None], ids, token_types=np.repeat([0, 1], [len(one), len(two)]))
        with torch.inference_mode():
            logits = model(pack([tokens], [0]), Wanted(("next_sentence",))).heads["next_sentence"]
        found.append(logits[0].softmax(-1).numpy())
    return np.stack(found)


def test_predict_of_a_pair_reads_both_of_its_inputs(
    tmp_path: Path, next_sentence: Path, pairs: list[tuple[str, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    source, output = str(tmp_path / "pairs.csv"), tmp_path / "out.csv"
    columns = ("--column", "first=a", "--column", "second=b")
    assert main(["predict", str(next_sentence), source, "--output", str(output), *columns]) == 0
    table = pa.csv.read_csv(output)
    assert table["id"].to_pylist() == [f"r{row}" for row in range(40)]
    got = np.stack([table[f"next_sentence:{name}"].to_numpy() for name in ("next", "random")], axis=1)
    np.testing.assert_allclose(got, one_by_one(next_sentence, pairs), rtol=1e-4)  # six digits are written
    turned = tmp_path / "turned.csv"
    assert (
        main(
            [
                "predict",
                str(next_sentence),
                source,
                "--output",
                str(turned),
                columns[0],
                "first=b",
                "--column",
                "second=a",
            ]
        )
        == 0
    )
    assert (pa.csv.read_csv(turned)["next_sentence:next"].to_numpy() != got[:, 0]).any()
    assert main(["predict", str(next_sentence), source, "--output", str(tmp_path / "no.csv"), "--column", "a"]) == 2
    assert "column must say which input it is of, one of first, second" in capsys.readouterr().err


def test_a_pair_is_a_mapping_in_python(next_sentence: Path, pairs: list[tuple[str, str]]) -> None:
    model = meristem.load(next_sentence, device="cpu")
    records = [{"second": second, "first": first} for first, second in pairs]
    found = model.predict(records)["next_sentence"].values
    np.testing.assert_allclose(found, one_by_one(next_sentence, pairs), rtol=1e-5)
    with pytest.raises(DataError, match="sequence 1: must be a mapping of first and second to payloads; got str"):
        model.embed([records[0], "MKT"])


@pytest.mark.slow
def test_processes_encode_pairs_as_one_does(tmp_path: Path, next_sentence: Path, pairs: list[tuple[str, str]]) -> None:
    table = tmp_path / "pairs.csv"
    table.write_text(table.read_text().replace("\nr7,", "\nr7,7", 1))
    done = []
    for workers in (0, 1):
        options = Predict(column={"first": "a", "second": "b"}, workers=workers, is_skipping=True)
        done.append(run_job(options, next_sentence, [str(table)], tmp_path / f"{workers}.csv"))
    assert (tmp_path / "0.csv").read_bytes() == (tmp_path / "1.csv").read_bytes()
    assert done[0]["refused"] == done[1]["refused"]
    [refused] = done[0]["refused"]["records"]
    assert (refused["id"], refused["line"]) == ("r7", 9)
    assert "'7'" in refused["reason"]
    # longer pairs are cut to what the model can place, three special rows among them
    assert done[0]["tokens"] == sum(min(len(a) + len(b), 67) for row, (a, b) in enumerate(pairs) if row != 7)


def test_a_pair_is_not_another_whose_symbols_are_the_same(rng: np.random.Generator) -> None:
    """The mutant: sides are hashed without saying where one ends."""

    def column(source: list[int], target: list[int]) -> TokenColumn:
        sides = [TokenColumn(np.array(ids, np.int16), np.array([0, len(ids)])) for ids in (source, target)]
        return replace(sides[1], source=sides[0])

    seen = Seen()
    assert len(seen.look_up(0, column([5, 6], [7])).new_rows) == 1
    assert len(seen.look_up(1, column([5], [6, 7])).new_rows) == 1
    assert len(seen.look_up(2, column([5, 6], [7])).new_rows) == 0


class BothWays(Views):
    """A record as it is and read backwards, in training and for verbs alike."""

    num_views = 2

    def __init__(self, tokenizer: Any):
        pass

    def views(self, record: Record, rng: np.random.Generator | None) -> tuple[Record, ...]:
        return record, record.with_payload(record.payload[::-1])


class Uneven(BothWays):
    def views(self, record: Record, rng: np.random.Generator | None) -> tuple[Record, ...]:
        return super().views(record, rng)[: 1 + (len(record.payload) > 9)]


class TrainingOnly(BothWays):
    is_training_only = True

    def __init__(self, tokenizer: Any):
        raise AssertionError("verbs make no views that are for training only")


@pytest.fixture
def viewed(monkeypatch: pytest.MonkeyPatch) -> Callable[[type[Views] | None], None]:
    """Gives the domain these views."""

    def give(views: type[Views] | None) -> None:
        for verbs in (run, loaded):
            monkeypatch.setattr(verbs, "domain_of_model", lambda asked, named: replace(domain, views=views))

    return give


def test_what_is_said_of_all_views_is_averaged(
    tmp_path: Path, make_model_directory: MakeModel, rng: np.random.Generator, viewed: Callable[..., None]
) -> None:
    model = make_model_directory(readouts=READOUTS)
    records = [(f"p{row}", RESIDUES[rng.integers(0, 20, rng.integers(3, 60))].tobytes().decode()) for row in range(40)]
    plain = str(write_fasta(tmp_path / "in.fa", records))
    turned = str(write_fasta(tmp_path / "turned.fa", [(name, text[::-1]) for name, text in records]))
    viewed(TrainingOnly)
    predicted, vectors, maps = [], {}, []
    for name, source in (("plain", plain), ("turned", turned), ("views", plain)):
        if name == "views":
            viewed(BothWays)
        for pool in ("mean", "none"):
            run_job(Embed(pool=pool), model, [source], tmp_path / f"{name}-{pool}")
            vectors[name, pool] = read_embeddings(tmp_path / f"{name}-{pool}").values
        run_job(Predict(), model, [source], tmp_path / f"{name}.parquet")
        predicted.append(pa.parquet.read_table(tmp_path / f"{name}.parquet"))
        run_job(Score(), model, [source], tmp_path / f"{name}.csv")
        run_job(Score(scorer="contacts"), model, [source], tmp_path / f"{name}.npz")
        with np.load(tmp_path / f"{name}.npz") as arrays:
            maps.append([arrays[one] for one in arrays.files])
    for pool in ("mean", "none"):
        wanted = (vectors["plain", pool] + vectors["turned", pool]) / 2
        np.testing.assert_allclose(vectors["views", pool], wanted, rtol=1e-6, atol=1e-7)
    for column in ("fitness", *(f"place:{name}" for name in READOUTS[2].classes)):
        values = [table[column].to_numpy() for table in predicted]
        np.testing.assert_allclose(values[2], (values[0] + values[1]) / 2, rtol=1e-5)
    likelihoods = [
        pa.csv.read_csv(tmp_path / f"{name}.csv")["log_likelihood"].to_numpy() for name in ("plain", "turned", "views")
    ]
    np.testing.assert_allclose(likelihoods[2], (likelihoods[0] + likelihoods[1]) / 2, rtol=1e-12)
    for one, other, both in zip(*maps):
        np.testing.assert_allclose(both, (one + other) / 2, rtol=1e-5, atol=1e-7)


def test_sequences_in_memory_are_seen_in_the_views_of_the_verbs(
    tmp_path: Path, make_model_directory: MakeModel, rng: np.random.Generator, viewed: Callable[..., None]
) -> None:
    place = make_model_directory(readouts=READOUTS)
    texts = [random_protein(rng) for _ in range(12)]
    source = str(write_fasta(tmp_path / "in.fa", [(f"p{row}", text) for row, text in enumerate(texts)]))
    viewed(BothWays)
    model = meristem.load(place, device="cpu")
    run_job(Embed(precision="fp32"), place, [source], tmp_path / "out")
    np.testing.assert_array_equal(model.embed(texts), read_embeddings(tmp_path / "out").values)
    run_job(Predict(), place, [source], tmp_path / "out.parquet")
    fitness = pa.parquet.read_table(tmp_path / "out.parquet")["fitness"].to_numpy()
    np.testing.assert_allclose(model.predict(texts)["fitness"].values[:, 0], fitness, rtol=1e-6)
    run_job(Score(), place, [source], tmp_path / "out.csv")
    likelihoods = pa.csv.read_csv(tmp_path / "out.csv")["log_likelihood"].to_numpy()
    scores = [one["log_likelihood"] for one in model.score(texts)]
    np.testing.assert_allclose(scores, likelihoods, rtol=1e-6)
    logits = model.logits(texts)
    with pytest.raises(DataError, match=r"sequence 1: must be a text, .*; got NoneType"):
        model.embed(["MKT", None])
    viewed(Uneven)
    with pytest.raises(ConfigError, match="equally many for every record; got 1 and, of sequence 1, 2"):
        model.embed(["MKT", "MKTAYIAKQR"])
    # the mutant: views that verbs do not see
    viewed(TrainingOnly)
    assert np.abs(model.embed(texts) - read_embeddings(tmp_path / "out").values).max() > 1e-3
    assert np.abs(np.array([one["log_likelihood"] for one in model.score(texts)]) - likelihoods).max() > 1e-3
    for one, other in zip(model.logits(texts), logits):  # of the sequence as it is
        np.testing.assert_array_equal(one, other)


def test_views_must_be_equally_many(
    tmp_path: Path, make_model_directory: MakeModel, viewed: Callable[..., None]
) -> None:
    viewed(Uneven)
    source = str(write_fasta(tmp_path / "in.fa", [("a", "MKT"), ("b", "MKTAYIAKQR")]))
    with pytest.raises(ConfigError, match=r"equally many for every record; got 1 and, of .*in\.fa:\d, 2"):
        run_job(Embed(), make_model_directory(), [source], tmp_path / "out")


def test_one_input_is_read_as_before() -> None:
    card = ModelCard(tiny_config(), TOKENIZER)
    assert Reading.of(card).tokenizers == {"input": TOKENIZER}
    pair = replace(card, inputs={"source": InputCard(), "target": InputCard()})
    assert list(Reading.of(pair).tokenizers) == ["source"]
    assert list(Reading.of_sides(pair).tokenizers) == ["source", "target"]
    table = pa.RecordBatch.from_pydict({"input:source": ["MK", "MKT"], "input:target": ["MK", "M1"]})
    with pytest.raises(RefusedSymbol, match="input 'target': '1' is not in the alphabet") as refused:
        Reading.of_sides(pair).column(table)
    assert refused.value.row == 1
    given = Reading.of_sides(pair).values([{"target": "MKT", "source": "GG"}, {"source": "A", "target": "C"}])
    assert (given.lengths.tolist(), given.source.lengths.tolist()) == ([5, 3], [4, 3])
    for wrong in ("MKT", {"source": "MK"}, {"source": "MK", "target": "MK", "other": ""}):
        with pytest.raises(RefusedSymbol, match="must be a mapping of source and target to payloads; got") as refused:
            Reading.of_sides(pair).values([{"source": "MK", "target": "MK"}, wrong])
        assert refused.value.row == 1
    with pytest.raises(ConfigError, match="no installed package offers the objective 'lab:Own'"):
        Reading.of(replace(pair, joined_by="lab:Own"))
