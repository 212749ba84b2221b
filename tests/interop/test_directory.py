"""Foreign directories are read strictly, in every form they come in, and refused in one line that says why."""

import json
import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import esm_reference
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from meristem.cli.main import main
from meristem.data.tokenizer import AlphabetTokenizer
from meristem.errors import CheckpointError, ConfigError
from meristem.interop.directory import read_directory, write_directory
from meristem.interop.families.esm import ESM
from meristem.interop.runners import compare, load_transformers
from meristem.model.config import FeedForward, LayerRule, Learned, RMSNorm
from meristem.model.heads import Readout
from meristem.model.model import Model
from meristem.model_directory import ModelCard, hash_weights, import_model, load_any, load_model, save_model
from meristem_domains.protein.alphabet import tokenizer as protein_tokenizer
from model_runs import specs
from parity_checks import refuse_distance

Tensors = dict[str, torch.Tensor]


@pytest.fixture
def model(rng: np.random.Generator) -> torch.nn.Module:
    return esm_reference.redrawn(esm_reference.esm2(2, 32, 4), rng)


@pytest.fixture
def folder(model: torch.nn.Module, tmp_path: Path) -> Path:
    return esm_reference.save(model, tmp_path / "hf")


def plain_names(tensors: Tensors) -> Tensors:
    """Names as the published checkpoints spell them."""
    renamed = {k.replace("LayerNorm.gamma", "LayerNorm.weight"): v for k, v in tensors.items()}
    renamed = {k.replace("LayerNorm.beta", "LayerNorm.bias"): v for k, v in renamed.items()}
    return {k: v for k, v in renamed.items() if not k.endswith("inv_freq")}


def rewrite(folder: Path, change: Callable[[Tensors], Tensors]) -> None:
    tensors = change(load_file(folder / "model.safetensors"))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")


def rewrite_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def same_weights(a: Model, b: Model) -> bool:
    theirs = b.state_dict()
    return a.state_dict().keys() == theirs.keys() and all(torch.equal(v, theirs[k]) for k, v in a.state_dict().items())


def as_bin(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def as_shards(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    parts = {"model-1-of-2.safetensors": names[::2], "model-2-of-2.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()


def add_shard(folder: Path) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["more"] = "model-3-of-2.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def as_bin_shards(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    files = {name: f"pytorch_model-{i % 3}.bin" for i, name in enumerate(tensors)}
    for file in set(files.values()):
        torch.save({name: tensors[name] for name in tensors if files[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files}))
    (folder / "model.safetensors").unlink()


def as_published(folder: Path) -> None:
    """With the buffers that old checkpoints carry, and the tied weight written out."""

    def change(tensors: Tensors) -> Tensors:
        frequencies = next(value for name, value in tensors.items() if name.endswith("inv_freq"))
        tensors = plain_names(tensors)
        for layer in range(2):
            name = f"esm.encoder.layer.{layer}.attention.self.rotary_embeddings.inv_freq"
            tensors[name] = frequencies.clone()
        tensors["esm.embeddings.position_ids"] = torch.arange(1026)[None]
        tensors["lm_head.decoder.weight"] = tensors["esm.embeddings.word_embeddings.weight"].clone()
        return tensors

    rewrite(folder, change)


@pytest.mark.parametrize("form", [as_bin, as_shards, as_bin_shards, as_published])
def test_every_form_of_a_checkpoint_gives_the_same_model(form: Callable[[Path], None], folder: Path) -> None:
    wanted = read_directory(folder)
    form(folder)
    got = read_directory(folder)
    assert same_weights(got.model, wanted.model)
    assert got.model.config == wanted.model.config
    assert got.notes == wanted.notes == ()


def test_half_precision_is_read_as_fp32(model: torch.nn.Module, tmp_path: Path) -> None:
    folder = esm_reference.save(model.half(), tmp_path / "hf")
    imported = read_directory(folder)
    assert all(parameter.dtype == torch.float32 for parameter in imported.model.parameters())
    assert imported.model.config.position.rounding == "fp16"


def test_a_trunk_saved_alone_comes_without_a_symbol_head(
    model: torch.nn.Module, tmp_path: Path, rng: np.random.Generator
) -> None:
    from transformers import EsmModel

    trunk = EsmModel(model.config)
    trunk.load_state_dict(model.esm.state_dict(), strict=False)
    folder = esm_reference.save(trunk.eval(), tmp_path / "hf")
    imported = read_directory(folder)
    assert list(imported.model.heads) == ["contacts"]
    assert imported.model.config.head is None
    assert imported.notes == ("the pooler is left out: it was never trained",)
    parity = compare(imported.model, imported.tokenizer, load_transformers(folder), rng, ESM.runner)
    assert "logits" not in parity
    refuse_distance(parity)
    # and back
    write_directory(tmp_path / "back", imported.model.config, imported.tokenizer, imported.model)
    assert json.loads((tmp_path / "back/config.json").read_text())["architectures"] == ["EsmModel"]
    assert same_weights(read_directory(tmp_path / "back").model, imported.model)


def test_a_table_of_positions_beside_rotary_ones_is_left_out_and_said(folder: Path) -> None:
    rewrite(folder, lambda t: {**t, "esm.embeddings.position_embeddings.weight": torch.randn(1026, 32)})
    assert read_directory(folder).notes == ("a table of positions beside rotary ones is unused",)


def test_the_tokenizer_is_the_domain_s_own(folder: Path) -> None:
    """The same fingerprint, so that a model trained here and one imported read alike."""
    assert read_directory(folder).tokenizer.fingerprint == protein_tokenizer().fingerprint
    (folder / "vocab.txt").unlink()
    imported = read_directory(folder)
    assert imported.tokenizer == protein_tokenizer()
    assert imported.notes == ("no vocab.txt: the 33 symbols of all published ESM models are taken",)
    ids = {symbol: i for i, symbol in enumerate(esm_reference.SYMBOLS)}
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": ids}}))
    assert read_directory(folder).tokenizer == protein_tokenizer()


def change_tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    return lambda folder: rewrite(folder, lambda tensors: {**tensors, name: change(tensors[name])})


QUERY = "esm.encoder.layer.1.attention.self.query.weight"
BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing tensor": (
        lambda f: rewrite(f, lambda t: {k: v for k, v in t.items() if k != QUERY}),
        rf"model\.safetensors: tensors must be those of the architecture; missing: {QUERY}$",
    ),
    "extra tensor": (
        lambda f: rewrite(f, lambda t: {**t, "classifier.dense.weight": torch.zeros(2, 2)}),
        r"extra: classifier\.dense\.weight$",
    ),
    "tensor of another layer": (
        lambda f: rewrite(f, lambda t: {**t, QUERY.replace(".1.", ".2."): t[QUERY].clone()}),
        rf"extra: {QUERY.replace('.1.', '.2.')}$",
    ),
    "mis-shaped tensor": (
        change_tensor("lm_head.dense.weight", lambda t: t[:-1]),
        r"of another shape: lm_head\.dense\.weight \[31, 32\] for \[32, 32\]$",
    ),
    "mis-shaped part": (
        change_tensor(QUERY, lambda t: t[:-1]),
        r"query.* \+ .*key.* \+ .*value.* \[95, 32\] for \[96, 32\]",
    ),
    "untied weight": (
        lambda f: rewrite(f, lambda t: {**t, "lm_head.decoder.weight": torch.zeros(33, 32)}),
        r"lm_head\.decoder\.weight must equal esm\.embeddings\.word_embeddings\.weight.*they differ",
    ),
    "two spellings": (
        lambda f: rewrite(f, lambda t: {**t, "esm.encoder.layer.0.LayerNorm.weight": torch.zeros(32)}),
        r"must be there once; got esm\.encoder\.layer\.0\.LayerNorm\.weight under two names",
    ),
    "other frequencies": (
        change_tensor("esm.encoder.layer.*.attention.self.rotary_embeddings.inv_freq", lambda t: t * 1.01),
        r"inv_freq must be those of rope_theta=10000, rounded or not; got others",
    ),
    "truncated file": (
        lambda f: os.truncate(f / "model.safetensors", (f / "model.safetensors").stat().st_size - 9),
        r"model\.safetensors must be a safetensors file",
    ),
    "no weights": (
        lambda f: (f / "model.safetensors").unlink(),
        r"must hold one of model\.safetensors, .*it holds none",
    ),
    "missing shard": (
        lambda f: (as_shards(f), (f / "model-2-of-2.safetensors").unlink()),
        r"index\.json names model-2-of-2\.safetensors, which is missing",
    ),
    "tensor in two shards": (
        lambda f: (as_shards(f), save_file({QUERY: torch.zeros(32, 32)}, f / "model-3-of-2.safetensors"), add_shard(f)),
        r"a tensor must be there once; got esm.* in two files",
    ),
    "shard elsewhere": (
        lambda f: (as_shards(f), (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../a.bin"}}')),
        r"must name files beside it; got '\.\./a\.bin'",
    ),
    "no config": (
        lambda f: (f / "config.json").unlink(),
        r"of a run, a model or another library \(hf, timm\)",
    ),
    "config no JSON": (lambda f: (f / "config.json").write_text("{"), r"config\.json must be JSON"),
    "another family": (lambda f: rewrite_config(f, model_type="xlnet"), r"model_type must be .*; got 'xlnet'"),
    "a decoder": (lambda f: rewrite_config(f, is_decoder=True), r"is_decoder must be False in an ESM config; got True"),
    "folding": (lambda f: rewrite_config(f, is_folding_model=True), r"is_folding_model must be False"),
    "other positions": (
        lambda f: rewrite_config(f, position_embedding_type="relative_key"),
        r"must be rotary or absol",
    ),
    "width of text": (lambda f: rewrite_config(f, intermediate_size="many"), r"config\.json: .*"),
    "no width": (lambda f: rewrite_config(f, hidden_size=None), r"config\.json: .*"),
    "heads do not divide": (
        lambda f: rewrite_config(f, num_attention_heads=5),
        r"width must be divisible by num_heads",
    ),
    "another mask": (lambda f: rewrite_config(f, mask_token_id=31), r"mask_token_id must be 32, .*; got 31 in config"),
    "k-mers": (
        lambda f: (f / "vocab.txt").write_text("\n".join(["AAA", *esm_reference.SYMBOLS[1:], "<cls>"])),
        r"a symbol of the vocabulary must be one residue; got 'AAA'",
    ),
    "no mask symbol": (
        lambda f: (f / "vocab.txt").write_text("\n".join(esm_reference.SYMBOLS[:-1])),
        r"must hold every special symbol; it lacks '<mask>'",
    ),
    "long vocabulary": (
        lambda f: (f / "vocab.txt").write_text("\n".join([*esm_reference.SYMBOLS, "J"])),
        r"vocab_size must be 34 or more; got 33",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_not_exactly_right_is_refused_and_leaves_nothing(
    name: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    breaks, message = BROKEN[name]
    breaks(folder)
    with pytest.raises(CheckpointError, match=message) as error:
        load_any(folder)
    assert "\n" not in str(error.value)
    assert main(["import", str(folder), str(tmp_path / "own"), "--skip-parity"]) == 2
    assert not (tmp_path / "own").exists()
    assert len(capsys.readouterr().err.splitlines()) == 1


class Runs:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("ran",))


def test_a_bin_that_would_run_something_is_refused_and_not_run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"esm": Runs()}, protocol=2))
    with pytest.raises(CheckpointError, match="must be a file of tensors, and of nothing that runs"):
        read_directory(folder)
    torch.save({"esm": Runs()}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="must be a file of tensors, and of nothing that runs"):
        read_directory(folder)
    assert not (tmp_path / "ran").exists()


def test_import_and_export_report_parity_and_end_with_the_next_command(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own, back = tmp_path / "own", tmp_path / "back"
    assert main(["import", str(folder), str(own)]) == 0
    said = capsys.readouterr().out
    assert "heads: tokens, contacts" in said
    assert "parity with transformers" in said
    assert f"meristem embed {own} INPUT" in said
    card, model = load_model(own)
    assert card.domain == "protein"
    assert same_weights(model, read_directory(folder).model)
    assert same_weights(load_any(folder)[1], model)
    assert main(["export", str(own), str(back), "--to", "hf"]) == 0
    assert "parity with transformers" in capsys.readouterr().out
    assert same_weights(load_any(back)[1], model)
    # what is there already is not written over
    assert main(["import", str(folder), str(own)]) == 2
    assert main(["export", str(own), str(back)]) == 2
    assert main(["import", str(own), str(tmp_path / "again")]) == 2
    said = capsys.readouterr().err
    assert "is a model directory already; SOURCE must be a foreign one" in said


def test_a_run_directory_is_opened_by_its_model(folder: Path, tmp_path: Path) -> None:
    card, model, _ = import_model(folder)
    save_model(tmp_path / "run" / "model", card, model)
    assert same_weights(load_any(tmp_path / "run")[1], model)
    assert hash_weights(tmp_path / "run") == hash_weights(tmp_path / "run" / "model")


def test_the_hash_changes_with_a_weight_of_a_foreign_directory(folder: Path) -> None:
    before = hash_weights(folder)
    assert before == hash_weights(folder)
    rewrite(folder, lambda t: {**t, "lm_head.bias": t["lm_head.bias"] + 1e-3})
    assert hash_weights(folder) != before


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"norm": RMSNorm()}, r"norm\.kind='RMSNorm'"),
        ({"feedforward": FeedForward(width=128, is_gated=True)}, r"feedforward\.is_gated=True"),
        ({"feedforward": FeedForward(width=128, activation="relu")}, "hidden_act must be gelu"),
        ({"position": Learned(max_positions=70, offset=0)}, r"position\.offset=0"),
        ({"final_norm": False}, "final_norm=False"),
        ({"layers": (LayerRule(start=1, feedforward=FeedForward(width=8)),)}, r"feedforward\.width=8"),
    ],
)
def test_a_model_that_no_family_can_say_is_not_exported(
    change: dict[str, Any], named: str, folder: Path, tmp_path: Path
) -> None:
    imported = read_directory(folder)
    architecture = replace(imported.model.config, **change)
    with pytest.raises(ConfigError, match=named):
        write_directory(tmp_path / "back", architecture, imported.tokenizer, Model(architecture, specs(("tokens",))))
    assert not (tmp_path / "back").exists()
    assert not (tmp_path / "back.part").exists()


def test_what_stays_behind_at_export_is_said(folder: Path, tmp_path: Path) -> None:
    imported = read_directory(folder)
    embedding = replace(imported.model.config.embedding, dropout=0.1)
    architecture = replace(imported.model.config, embedding=embedding)
    model = Model(architecture, specs(("tokens",), (Readout(name="place", classes=("in", "out")),)))
    notes = write_directory(tmp_path / "back", architecture, imported.tokenizer, model)
    assert notes == [
        "the other library has no embedding.dropout",
        "heads of labels stay behind, the other library has no place for them: place",
        "the other library starts at random the heads that this model lacks: contacts",
    ]
    assert list(read_directory(tmp_path / "back").model.heads) == ["tokens"]


def test_a_tokenizer_without_the_special_symbols_is_not_exported(folder: Path, tmp_path: Path) -> None:
    imported = read_directory(folder)
    with pytest.raises(ConfigError, match="must have <cls>, <pad>"):
        write_directory(
            tmp_path / "back", imported.model.config, AlphabetTokenizer(vocab=tuple("ACGU")), imported.model
        )


def test_a_card_of_an_import_names_what_it_came_from(folder: Path) -> None:
    card: ModelCard = import_model(folder, domain="my_lab.rna")[0]
    assert card.domain == "my_lab.rna"
    assert "Hugging Face" in card.facts["imported_from"]
