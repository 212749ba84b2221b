"""What `import meristem` offers."""

import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from Bio.Seq import Seq
from Bio.SeqRecord import SeqRecord

import meristem
from meristem.errors import CheckpointError, ConfigError, DataError
from meristem.model.config import Attention, Causal, Embedding, FeedForward, Learned, TokenHead, TransformerConfig
from meristem.model.heads import Readout
from meristem.model.model import SYMBOLS
from meristem.model_directory import ModelCard, save_model
from meristem.objectives.masked import MaskedTokens
from meristem.train.spec import Split
from meristem_domains.protein import domain
from model_runs import specs


@pytest.fixture
def model_directory(tmp_path: Path, rng: np.random.Generator) -> Path:
    config = TransformerConfig(
        width=32,
        num_layers=2,
        embedding=Embedding(vocab_size=33, mask_id=32, mask_dropout_frac=0.12),
        attention=Attention(num_heads=4),
        feedforward=FeedForward(width=64),
        position=Learned(max_positions=80),
        head=TokenHead(),
    )
    readouts = (Readout(name="place", classes=("in", "out")), Readout(name="ss", level="token", classes=tuple("HEC")))
    card = ModelCard(config, domain.tokenizer(), specs((SYMBOLS,), readouts), domain="protein")
    save_model(tmp_path / "model", card, card.build())
    return tmp_path / "model"


@pytest.fixture
def sequences(rng: np.random.Generator) -> list[str]:
    return ["".join(rng.choice(list("LAGVSERTIDPKQNFYMHWC"), int(n))) for n in rng.integers(1, 60, 30)]


def test_the_surface_is_small_and_pinned() -> None:
    classes = ["DataSpec", "Embeddings", "LoadedModel", "ModelSpec", "RunSpec", "TrainerSpec"]
    of_files = ["embed", "export", "fit", "generate", "import_model", "load", "predict", "probe", "read_embeddings"]
    assert meristem.__all__ == [*classes, *of_files, "score", "test", "validate"]
    assert all(hasattr(meristem, name) for name in meristem.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = meristem.nonsense


def test_importing_meristem_imports_no_torch() -> None:
    script = "import sys, meristem; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_sequences_in_memory_and_in_a_file_get_the_same_vectors(
    tmp_path: Path, model_directory: Path, sequences: list[str]
) -> None:
    source = tmp_path / "in.fa"
    source.write_text("".join(f">{i}\n{text}\n" for i, text in enumerate(sequences)))
    model = meristem.load(model_directory, device="cpu")
    manifest = meristem.embed(model_directory, source, tmp_path / "out", precision="fp32", pool="max")
    assert manifest["records"] == len(sequences)
    got = meristem.read_embeddings(tmp_path / "out").values
    assert np.array_equal(got, model.embed(iter(sequences), pool="max"))
    tokens = model.embed(sequences, pool="none", layer=1)
    assert [vectors.shape for vectors in tokens] == [(len(text), 32) for text in sequences]
    assert model.embed([]).shape == (0, 32)
    assert model.embed([], pool="none") == []


def test_predictions_have_the_names_of_their_labels(model_directory: Path, sequences: list[str]) -> None:
    found = meristem.load(model_directory).predict(sequences)
    assert set(found) == {"place", "ss"}
    assert found["place"].values.shape == (len(sequences), 2)
    assert set(found["place"].classes) <= {"in", "out"}
    assert [len(rows) for rows in found["ss"].split()] == [len(text) for text in sequences]
    # probabilities in single precision
    assert np.abs(found["ss"].values.sum(1) - 1).max() < 1e-6


def test_bf16_does_not_change_the_model(model_directory: Path, sequences: list[str]) -> None:
    model = meristem.load(model_directory, device="cpu")
    before = model.embed(sequences)
    rough = model.embed(sequences, precision="bf16")
    assert not np.array_equal(rough, before)
    assert np.array_equal(model.embed(sequences), before)


@pytest.mark.parametrize(
    ("call", "error", "reason"),
    [
        (lambda model: model.embed(["MKT", "MK1"]), DataError, "sequence 1: '1'"),
        (lambda model: model.embed(["MKT", ""]), DataError, "sequence 1: empty"),
        (lambda model: model.predict(["MKT", None]), DataError, "sequence 1: must be a text, .*; got NoneType"),
        (lambda model: model.logits([3]), DataError, "sequence 0: must be a text, .*; got int"),
        (lambda model: model.score([["M", "K"]]), DataError, "sequence 0: must be a text, .*; got list"),
        (lambda model: model.embed(x for x in ("MKT", 1.5)), DataError, "sequence 1: must be a text, .*; got float"),
        (lambda model: model.embed([np.zeros(3)]), DataError, "sequence 0: must be a text, .*; got ndarray"),
        (lambda model: model.embed("MKT"), ConfigError, "got a single one: put it in a list"),
        (lambda model: model.logits(b"MKT"), ConfigError, "got a single one: put it in a list"),
        (lambda model: model.embed(Path("a.fa")), ConfigError, "got a single one: put it in a list"),
        (lambda model: model.score(SeqRecord(Seq("MKT"))), ConfigError, "got a single one: put it in a list"),
        (lambda model: model.predict(None), ConfigError, "a list, or a mapping of ids to sequences; got NoneType"),
        (lambda model: model.embed(["MKT"], layer=[0, 9]), ConfigError, "layer must be in"),
        (
            lambda model: model.score(["MKT"], scorer="contact"),
            ConfigError,
            "likelihood, contacts; got 'contact'",
        ),
        (lambda model: model.score(["MKT"], onepass=True), ConfigError, "options of the scorer are .*; got 'onepass'"),
        (lambda model: model.generate(["MK"], top_n=3), ConfigError, "options of generate are .*; got 'top_n'"),
        (lambda model: model.generate(["MK"], top_k="3"), ConfigError, "options of generate: .*'str' and 'int'"),
        (lambda model: model.embed(["MKT"], pool="median"), ConfigError, "pool must be one of"),
        (lambda model: model.embed(["MKT"], layer=9), ConfigError, "layer must be in"),
        (lambda model: model.embed(["MKT"], precision="fp8"), ConfigError, "precision must be one of"),
    ],
)
def test_what_cannot_work_says_so(
    model_directory: Path, call: Callable[[meristem.LoadedModel], object], error: type[Exception], reason: str
) -> None:
    with pytest.raises(error, match=reason):
        call(meristem.load(model_directory))


def test_what_other_libraries_call_a_sequence_is_one(model_directory: Path, sequences: list[str]) -> None:
    """The mutant that takes the keys of a mapping gives other vectors, or refuses them."""
    model = meristem.load(model_directory, device="cpu")
    wanted = model.embed(sequences)
    named = {f"MKT{i}": text for i, text in enumerate(sequences)}
    assert np.array_equal(model.embed(named), wanted)
    assert not np.array_equal(model.embed(["MKT"] * len(sequences)), wanted)
    for kind in (SeqRecord, Seq, str.encode, np.str_):
        given = [SeqRecord(Seq(text)) if kind is SeqRecord else kind(text) for text in sequences]
        assert np.array_equal(model.embed(given), wanted)
    assert model.score(named)[3] == model.score(sequences[3:4])[0]


def test_several_layers_are_those_asked_for_one_by_one(model_directory: Path, sequences: list[str]) -> None:
    model = meristem.load(model_directory, device="cpu")
    for pool in ("mean", "none"):
        for layer, got in zip((2, 0, -1), model.embed(sequences, pool, [2, 0, -1]), strict=True):
            alone = model.embed(sequences, pool, layer)
            assert all(np.array_equal(a, b) for a, b in zip(got, alone, strict=True))
    assert [one.shape for one in model.embed([], layer=[0, 1])] == [(0, 32)] * 2


def test_logits_are_what_likelihoods_are_made_of(model_directory: Path, sequences: list[str]) -> None:
    """Of one pass; the sum over the tokens' own symbols. And they do not depend on what is beside them, to the bit."""
    model = meristem.load(model_directory, device="cpu")
    logits = model.logits(sequences)
    vocab = model.card.tokenizer.vocab
    scores = model.score(sequences, one_pass=True)
    for text, values, row in zip(sequences, logits, scores, strict=True):
        assert values.shape == (len(text), len(vocab))
        chances = torch.tensor(values).double().log_softmax(-1).numpy()
        total = sum(chances[place, vocab.index(symbol)] for place, symbol in enumerate(text))
        assert total == pytest.approx(row["log_likelihood"], rel=1e-9)
    again = model.logits(sequences[::-1], tokens_per_batch=64)[::-1]
    assert all(np.array_equal(a, b) for a, b in zip(logits, again, strict=True))
    for call in (model.logits, model.score):
        with pytest.raises(DataError, match=r"sequence 2: must be 78 tokens or fewer, .*; got 90"):
            call(["MKT", "MKV", "M" * 90])


def test_scorers_of_the_domain_are_those_of_the_command(tmp_path: Path, model_directory: Path) -> None:
    texts = {"a": "MKTAYIAKQR", "b": "GSHMLEDPVDAA"}
    (tmp_path / "in.fa").write_text("".join(f">{name}\n{text}\n" for name, text in texts.items()))
    meristem.score(model_directory, tmp_path / "in.fa", tmp_path / "maps.npz", "contacts", precision="fp32")
    written = np.load(tmp_path / "maps.npz")
    model = meristem.load(model_directory, device="cpu")
    for name, got in zip(texts, model.score(texts, scorer="contacts"), strict=True):
        assert np.array_equal(got, written[name], equal_nan=True)
    one_pass = {"one_pass": True}
    manifest = meristem.score(model_directory, tmp_path / "in.fa", tmp_path / "scores.csv", scorer_options=one_pass)
    assert manifest["records"] == 2
    assert "itself included" in manifest["summary"]
    with pytest.raises(ConfigError, match="options of the scorer are none; got 'one_pass'"):
        meristem.score(model_directory, tmp_path / "in.fa", tmp_path / "m.npz", "contacts", scorer_options=one_pass)


def test_every_verb_on_files_is_a_function(tmp_path: Path, model_directory: Path, rng: np.random.Generator) -> None:
    kinds = {"L": "in", "K": "out"}
    rows = [f"{letter * int(n)}A,{kinds[letter]}" for letter in "LK" for n in rng.permutation(np.arange(3, 43))]
    (tmp_path / "in.csv").write_text("\n".join(["sequence,kind", *rows, ""]))
    manifest = meristem.predict(model_directory, [tmp_path / "in.csv"], tmp_path / "out.csv", labels=("place",))
    assert manifest["records"] == 80
    assert (tmp_path / "out.csv").read_text().startswith("id,place")
    options = {"label": "kind", "method": "knn", "k": 3, "pool": "mean", "cache_dir": tmp_path / "cache"}
    found = meristem.probe(model_directory, tmp_path / "in.csv", tmp_path / "probe", **options)
    assert found["knn"]["accuracy"] > 0.8
    with pytest.raises(ConfigError, match="poool"):
        meristem.probe(model_directory, tmp_path / "in.csv", tmp_path / "probe", "kind", poool="mean")


def test_a_model_goes_out_and_comes_back(tmp_path: Path, sequences: list[str]) -> None:
    card = ModelCard(domain.presets["esm2_8m"], domain.tokenizer(), specs((SYMBOLS,), ()), domain="protein")
    save_model(tmp_path / "model", card, card.build())
    before = meristem.load(tmp_path / "model", device="cpu")
    meristem.export(tmp_path / "model", tmp_path / "out")
    seen: list[Path] = []
    back = meristem.import_model(tmp_path / "out", tmp_path / "back", inspect=lambda read, at, notes: seen.append(at))
    assert seen == [tmp_path / "out"]
    assert back.card.domain == "protein"
    back = meristem.load(tmp_path / "back", device="cpu")
    assert np.array_equal(before.embed(sequences[:3]), back.embed(sequences[:3]))
    for arguments, said in (({"seed": 1}, "--seed needs"), ({"random_weights": True}, "needs LIBRARY:MODEL")):
        with pytest.raises(ConfigError, match=said):
            meristem.import_model(tmp_path / "out", tmp_path / "new", **arguments)
    with pytest.raises(CheckpointError, match="must be new or an empty folder"):
        meristem.import_model(tmp_path / "out", tmp_path / "back")


def test_a_loaded_model_says_what_it_is(model_directory: Path) -> None:
    said = repr(meristem.load(model_directory, device="cpu"))
    for word in ("Encoder of 2 layers, width 32, 4 heads", "parameters", "domain protein", "on cpu)"):
        assert word in said
    assert "labels place (in, out), ss (H, E, C)" in said


@pytest.mark.parametrize("device", ["gpu", "mps", "cuda:99", "", 0])
def test_a_device_that_is_not_there_is_refused_with_those_that_are(model_directory: Path, device: str) -> None:
    with pytest.raises(ConfigError, match=rf"device must be one of cpu.* on this machine; got {device!r}"):
        meristem.load(model_directory, device=device)


PLACES = {name: getattr(meristem, name) for name in meristem.__all__}
METHODS = ("embed", "predict", "score", "logits", "generate", "export")


def examples() -> dict[str, str]:
    """The code of each example, by the name of what it shows."""
    public = {**PLACES, **{f"LoadedModel.{name}": getattr(meristem.LoadedModel, name) for name in METHODS}}
    lines = {name: re.findall(r"^ +(?:>>>|\.\.\.) (.*)$", one.__doc__ or "", re.M) for name, one in public.items()}
    return {name: "\n".join(code) for name, code in lines.items()}


def test_each_public_function_has_an_example() -> None:
    functions = {name for name, one in PLACES.items() if not isinstance(one, type)}
    assert all(code for name, code in examples().items() if name in functions or "." in name)
    assert len(examples()) == len(PLACES) + len(METHODS)


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The models and the table that the examples speak of."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MERISTEM_CACHE", str(tmp_path / "cache"))
    config = domain.presets["esm2_8m"]
    causal = replace(config, attention=replace(config.attention, pattern=Causal()))
    card = ModelCard(config, domain.tokenizer(), specs((SYMBOLS,), ()), domain="protein")
    labels = specs((), (Readout(name="location", classes=("in", "out")),))
    cards = {"sample": card, "decoder": replace(card, architecture=causal), "localization": replace(card, heads=labels)}
    for name, one in cards.items():
        save_model(tmp_path / "runs" / name, one, one.build())
    meristem.export("runs/sample", "path/to/esm2_t6_8M_UR50D")
    rows = [f"{letter * n}A,{letter}" for letter in "LK" for n in range(3, 18)]
    (tmp_path / "records.csv").write_text("\n".join(["sequence,kind", *rows, ""]))
    return tmp_path


ORDER = ("RunSpec", "fit", "validate", "embed", "read_embeddings")


@pytest.mark.parametrize(
    "name", [*ORDER[:1], *(name for name, code in examples().items() if code and name not in ORDER)]
)
def test_the_examples_run(name: str, runs: Path) -> None:
    """Those of `ORDER` need what the one before has made."""
    names: dict[str, object] = {"meristem": meristem, "MaskedTokens": MaskedTokens}
    names |= {one: getattr(meristem, one) for one in ("ModelSpec", "DataSpec", "TrainerSpec", "read_embeddings")}
    trainer = meristem.TrainerSpec(max_steps=1, accelerator="cpu", enable_progress_bar=False)
    data = meristem.DataSpec(domain="protein", sources="records.csv", split=Split(validation_frac=0.2, test_frac=0.2))
    model = meristem.ModelSpec(architecture={"preset": "esm2_8m"}, objective=MaskedTokens())
    names["spec"] = meristem.RunSpec(model=model, data=data, trainer=trainer, run_dir="runs/fitted")
    if name == "test":
        meristem.fit(names["spec"])
    for one in ORDER if name == ORDER[0] else (name,):
        exec(examples()[one], names)
        if one == "RunSpec":  # which names a domain that is not there
            names["spec"] = meristem.RunSpec(model=model, data=data, trainer=trainer, run_dir="runs/fitted")


def test_a_result_that_is_not_finite_names_its_sequence(model_directory: Path) -> None:
    model = meristem.load(model_directory)
    with torch.no_grad():
        model.model.trunk.embedding.symbols.weight[23] = torch.nan  # C
    assert np.isfinite(model.embed(["MKT"])).all()
    with pytest.raises(DataError, match="sequence 2: the result is not finite"):
        model.embed(["MKT", "MKV", "MCK"])


def test_an_unknown_option_of_embed_is_an_error(tmp_path: Path, model_directory: Path) -> None:
    with pytest.raises(ConfigError, match="pooling"):
        meristem.embed(model_directory, "in.fa", tmp_path / "out", pooling="mean")
    with pytest.raises(ConfigError, match="on_error"):
        meristem.embed(model_directory, "in.fa", tmp_path / "out", on_error="ignore")


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="must be the directory of a run"):
        meristem.load(tmp_path)
