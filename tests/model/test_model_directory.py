"""Heads and changes travel in a model directory as plain values, and directories of format 2 still open."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from packs import VOCAB, config, random_pack

from installing import write_package
from meristem.data.tokenizer import AlphabetTokenizer
from meristem.errors import CheckpointError, ConfigError
from meristem.model.config import Embedding, Max, Prefix, TokenHead
from meristem.model.heads import HeadSpec, Readout, Symbols
from meristem.model.plain import from_json, to_json
from meristem.model_directory import InputCard, ModelCard, hash_weights, load_card, load_model, save_model
from meristem.registry import find
from model_runs import outputs_of, specs

TOKENIZER = AlphabetTokenizer(tuple(chr(65 + symbol) for symbol in range(VOCAB)))
LABELS = (
    Readout(name="place", classes=("in", "out"), pool=Max(), hidden_width=4, is_standardised=True),
    Readout(name="ss", level="token", classes=tuple("HEC")),
    Readout(name="fitness", task="regression", mean=(0.5, 1.0), std=(2.0, 3.0), pool=None),
)


def _card() -> ModelCard:
    made = config(embedding=Embedding(vocab_size=VOCAB), head=TokenHead(), pool=Prefix(is_dense=True))
    return ModelCard(made, TOKENIZER, specs(("tokens", "contacts"), LABELS), domain="protein", facts={"steps": 3})


def _saved(path: Path) -> ModelCard:
    card = _card()
    model = card.build()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    save_model(path, card, model)
    return card


def _config(path: Path) -> dict[str, Any]:
    return json.loads((path / "config.json").read_text())


def _rewrite(path: Path, **changes: Any) -> None:
    values = _config(path)
    for key, value in changes.items():
        values.pop(key) if value is None else values.update({key: value})
    (path / "config.json").write_text(json.dumps(values))


def test_heads_come_back_as_they_were_saved(tmp_path: Path, rng: np.random.Generator) -> None:
    card = _saved(tmp_path / "model")
    again, model = load_model(tmp_path / "model")
    assert again == card
    assert list(model.heads) == ["tokens", "contacts", "place", "ss", "fitness"]
    assert model.readouts == again.readouts == LABELS
    values = _config(tmp_path / "model")
    assert values["format_version"] == 3
    assert values["changes"] == []
    assert values["heads"]["tokens"] == {"kind": "symbols"}
    assert values["heads"]["contacts"] == {"kind": "contacts"}
    assert values["heads"]["place"]["kind"] == "labels"
    assert values["heads"]["place"]["pool"] == {"kind": "Max"}


def test_a_directory_of_format_2_opens_as_the_same_model(tmp_path: Path, rng: np.random.Generator) -> None:
    card = _saved(tmp_path / "model")
    batch = random_pack(rng, [3, 20, 7])
    before = [outputs_of(load_model(tmp_path / "model")[1], batch, name) for name in ("tokens", "place", "ss")]
    # written by hand, as format 2 was: heads by name, and labels beside them without a kind
    labels = [{key: value for key, value in to_json(label).items() if key != "kind"} for label in LABELS]
    _rewrite(
        tmp_path / "model", format_version=2, heads=["tokens", "contacts"], readouts=labels, changes=None, inputs=None
    )
    assert "kind" not in _config(tmp_path / "model")["readouts"][0]
    again, model = load_model(tmp_path / "model")
    assert again == card
    for name, wanted in zip(("tokens", "place", "ss"), before):
        assert torch.equal(outputs_of(model, batch, name), wanted)
    save_model(tmp_path / "model", again, model)
    assert _config(tmp_path / "model")["format_version"] == 3
    assert load_card(tmp_path / "model") == card


def test_inputs_keep_the_tokenizers_that_are_their_own(tmp_path: Path) -> None:
    other = AlphabetTokenizer(("<", "x", "y"), prefix=("<",))
    inputs = {"query": InputCard(), "code": InputCard("codes", other), "more": InputCard()}
    card = replace(_card(), inputs=inputs)
    save_model(tmp_path / "one", _card(), card.build())
    save_model(tmp_path / "model", card, card.build())
    save_model(tmp_path / "model", card, card.build())  # in the place of one that has a folder
    assert [file.name for file in (tmp_path / "model" / "tokenizers").iterdir()] == ["code.json"]
    assert not (tmp_path / "one" / "tokenizers").exists()
    again = load_card(tmp_path / "model")
    assert again == card
    assert list(again.inputs) == ["query", "code", "more"]
    assert [again.tokenizer_of(name) for name in inputs] == [TOKENIZER, other, TOKENIZER]
    assert [again.inputs[name].domain or again.domain for name in inputs] == ["protein", "codes", "protein"]
    before, file = hash_weights(tmp_path / "model"), tmp_path / "model" / "tokenizers" / "code.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps({**values, "vocab": ["<", "y", "x"]}))
    assert hash_weights(tmp_path / "model") != before
    with pytest.raises(CheckpointError, match=r"code\.json: fingerprint must be .* as in config\.json"):
        load_card(tmp_path / "model")
    file.unlink()
    with pytest.raises(CheckpointError, match=r"code\.json: no such file"):
        load_card(tmp_path / "model")
    # one of format 3 that was written when records had one input
    _rewrite(tmp_path / "one", inputs=None)
    assert load_card(tmp_path / "one") == _card()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 4}, "format_version must be 2 or 3; got 4"),
        ({"format_version": None}, "format_version must be 2 or 3; got none"),
        (
            {"heads": {"x": {"kind": "spans"}}},
            r"offers the kind of head 'spans'; .*meristem.heads",
        ),
        ({"heads": {"x": {}}}, "no installed package offers the kind of head 'None'"),
        ({"heads": {"x": {"kind": "symbols", "width": 3}}}, r"heads.x takes .*; got width"),
        ({"heads": {"x": {"kind": "labels", "name": "x", "classes": ["a"]}}}, "must have two classes"),
        ({"heads": {"x": {"kind": "labels"}}}, "heads.x needs name"),
        ({"heads": ["tokens"]}, r"heads must be specs by name; got \['tokens'\]"),
        ({"heads": None}, "lacks 'heads'"),
        ({"changes": [{"kind": "lora"}]}, r"no installed package offers the kind of change 'lora'; .*meristem.changes"),
        ({"changes": None}, "lacks 'changes'"),
        ({"format_version": 2, "heads": ["spans"], "readouts": []}, "kind of head 'spans'"),
        ({"format_version": 2, "heads": ["tokens"], "readouts": [{"task": "classification"}]}, "lacks 'name'"),
    ],
)
def test_what_is_not_known_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    _saved(tmp_path / "model")
    _rewrite(tmp_path / "model", **changes)
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path / "model")


def test_a_head_whose_weights_are_missing_is_refused(tmp_path: Path) -> None:
    _saved(tmp_path / "model")
    values = _config(tmp_path / "model")["heads"]
    _rewrite(tmp_path / "model", heads={**values, "more": to_json(replace(LABELS[1], name="more"))})
    with pytest.raises(CheckpointError, match=r"missing: heads.more.out"):
        load_model(tmp_path / "model")


def test_a_head_of_symbols_needs_its_description() -> None:
    with pytest.raises(ConfigError, match=r"must be described \(architecture.head\)"):
        ModelCard(config(head=None), TOKENIZER, {"tokens": Symbols()}).build()


HEAD = """
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from meristem.model.changes import ChangeSpec
from meristem.model.heads import Head, HeadSpec


@dataclass(frozen=True, kw_only=True)
class Sums(HeadSpec):
    kind: ClassVar[str] = "sums"
    factor: float = 1.0

    def build(self, config):
        return SumHead(self.factor)


class SumHead(Head):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor
        self.shift = nn.Parameter(torch.zeros(()))

    def forward(self, hidden, batch, request):
        return hidden.final.sum(1) * self.factor + self.shift + self.shared[0].symbols.weight[0, 0]

    def tie(self, embedding, pool):
        self.shared = (embedding,)


@dataclass(frozen=True, kw_only=True)
class Widened(ChangeSpec):
    kind: ClassVar[str] = "widened"
    count: int

    def apply(self, model):
        model.register_parameter("more", nn.Parameter(torch.zeros(self.count)))
"""

POINTS = {"meristem.heads": {"sums": "lab_sums:Sums"}, "meristem.changes": {"widened": "lab_sums:Widened"}}


def test_a_head_and_a_change_of_an_installed_package_travel(tmp_path, monkeypatch, rng) -> None:
    site = write_package(tmp_path / "site", "lab-sums", POINTS, {"lab_sums": HEAD})
    monkeypatch.syspath_prepend(str(site))
    try:
        sums, widened = find("meristem.heads", "sums"), find("meristem.changes", "widened")
        card = replace(_card(), heads={"total": sums(factor=2.0)}, changes=(widened(count=2), widened(count=5)))
        model = card.build()
        assert model.more.shape == (5,), "changes are applied in order"
        torch.nn.init.constant_(model.heads["total"].shift, 3.0)
        save_model(tmp_path / "model", card, model)
        again, loaded = load_model(tmp_path / "model")
        assert again == card
        batch = random_pack(rng, [4, 9])
        assert torch.equal(outputs_of(loaded, batch, "total"), outputs_of(model.eval(), batch, "total"))
        assert _config(tmp_path / "model")["heads"] == {"total": {"kind": "sums", "factor": 2.0}}
    finally:
        sys.modules.pop("lab_sums", None)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=r"kind of head 'sums'; .*meristem.heads"):
        load_model(tmp_path / "model")
    _rewrite(tmp_path / "model", heads={})
    with pytest.raises(CheckpointError, match=r"kind of change 'widened'; .*meristem.changes"):
        load_model(tmp_path / "model")


def test_a_spec_is_read_back_as_its_own_kind_only() -> None:
    values = to_json(LABELS[0])
    assert from_json(HeadSpec, values, "head") == from_json(Readout, values, "head") == LABELS[0]
    with pytest.raises(ConfigError, match=r"head must be a Symbols; got the kind 'labels'"):
        from_json(Symbols, values, "head")
