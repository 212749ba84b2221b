"""`meristem import` and `export` carry a model with its labels, its pool and its tokenizer, there and back."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertForPreTraining, BertTokenizer

from meristem.cli.main import main
from meristem.interop.families.bert import NEXT_SENTENCE
from meristem.model_directory import load_any, load_model
from references import redraw, save

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cell", "wall", "grow", "##s", "##ing", "leaf", ".", ","]


@pytest.fixture
def folder(tmp_path: Path, rng: np.random.Generator) -> Path:
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=64,
    )
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    folder = save(redraw(BertForPreTraining(config), rng), tmp_path / "hf")
    BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(folder)
    return folder


def test_import_and_export_of_a_bert_with_its_label(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own, back = tmp_path / "own", tmp_path / "back"
    assert main(["import", str(folder), str(own)]) == 0
    said = capsys.readouterr().out
    assert "heads: tokens, next_sentence" in said
    lines = dict(line.split() for line in said.splitlines() if line.startswith(("  logits", "  next_sentence")))
    assert set(lines) == {"logits", "next_sentence"}
    assert all(float(value) < 1e-4 for value in lines.values())
    assert "  layer 2" in said

    card, model = load_model(own)
    assert card.domain == "text"
    assert card.readouts == (NEXT_SENTENCE,)
    theirs = AutoTokenizer.from_pretrained(folder)
    text = "The cell walls grows, growing leaf."
    assert card.tokenizer.encode(text).ids.tolist() == theirs(text)["input_ids"]

    assert main(["export", str(own), str(back)]) == 0
    said = capsys.readouterr().out
    assert f"transformers.BertForPreTraining.from_pretrained({str(back)!r})" in said
    again = load_any(back)[1].state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items())
    assert AutoTokenizer.from_pretrained(back)(text)["input_ids"] == theirs(text)["input_ids"]


def test_a_library_that_has_no_such_model_is_refused_in_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(folder), str(tmp_path / "back"), "--to", "timm"]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert "must be of a supported family to be exported; vision transformers of timm" in error
    assert not (tmp_path / "back").exists()
