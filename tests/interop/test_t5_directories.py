"""Directories of T5 in and out: every setting of their configs, tied tensors, and tokenizers that come along."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, T5Config, T5EncoderModel, T5ForConditionalGeneration

from meristem.errors import CheckpointError, ConfigError
from meristem.interop.directory import read_directory, read_model, write_directory
from meristem.interop.families.t5 import DEFAULTS, FIELDS, T5, T5_ENCODER, read_config, write_config
from meristem.interop.family import find_family
from meristem.interop.settings import Settings
from meristem.model.config import TokenHead
from references import PlainIds, redraw, save

ODD = {
    "vocab_size": 53,
    "d_model": 30,
    "d_kv": 7,
    "d_ff": 23,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 3,
    "relative_attention_num_buckets": 12,
    "relative_attention_max_distance": 21,
}


def make(kind: Any, folder: Path, rng: np.random.Generator, **settings: object) -> Path:
    return save(redraw(kind(T5Config(**ODD, **settings)), rng), folder)


def test_a_config_that_leaves_settings_out_means_what_it_means_to_the_reference() -> None:
    theirs = T5Config()
    for name, value in Settings("a T5", {}, FIELDS, DEFAULTS).items():
        # depth of the decoder: that of the encoder
        assert value == getattr(theirs, name) or (name == "num_decoder_layers" and value is None), name
    least = {"vocab_size": 53, "d_model": 30, "d_ff": 23, "num_layers": 2, "num_heads": 3}
    assert read_config(least, {}) == read_config(T5Config(**least).to_dict(), {})


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("kind", ["T5ForConditionalGeneration", "T5EncoderModel"])
@pytest.mark.parametrize("feedforward", ["relu", "gated-gelu", "gated-silu", "gelu"])
def test_a_config_written_and_read_is_the_same(feedforward: str, kind: str, is_tied: bool) -> None:
    settings = {"feed_forward_proj": feedforward, "tie_word_embeddings": is_tied}
    architecture = read_config({**ODD, **settings, "architectures": [kind]}, {})
    assert architecture.layer(0).attention.head_width == 7
    written = write_config(architecture, PlainIds(53), 2 if architecture.num_decoder_layers else 1)
    assert read_config(written, {}) == architecture
    # what is written means to the reference what it means to us
    assert read_config(T5Config(**written).to_dict(), {}) == replace(architecture, head=_tied(architecture.head))


def _tied(head: TokenHead | None) -> TokenHead | None:
    """The reference ties whatever its config says, until it sees another tensor."""
    return None if head is None else replace(head, is_tied=True)


NO_NUMBERS = {
    # of the file, of training, of generation, of heads that are not read
    *("transformers_version", "architectures", "dtype", "output_hidden_states", "return_dict", "use_cache"),
    "_name_or_path",
    *("chunk_size_feed_forward", "id2label", "label2id", "problem_type", "initializer_factor", "classifier_dropout"),
    *("pad_token_id", "eos_token_id", "output_attentions", "model_type", "is_encoder_decoder", "num_decoder_layers"),
}


@pytest.mark.parametrize("name", sorted(set(T5Config().to_dict()) - NO_NUMBERS))
def test_every_setting_is_read_or_refused(name: str) -> None:
    changes: dict[type, Callable[[Any], Any]] = {
        bool: lambda value: not value,
        int: lambda value: 2 * value,
        float: lambda value: value / 2,
        str: lambda value: "gelu",
    }
    values = T5Config(**ODD).to_dict()
    changed = {**values, name: changes[type(values[name])](values[name])}
    if name == "feed_forward_proj":
        # the longer settings have the last word, so the short one is read where they are not there
        del changed["dense_act_fn"], changed["is_gated_act"]
    if name == "tie_word_embeddings":
        del changed["scale_decoder_outputs"]
    if name == "is_decoder":
        with pytest.raises(ConfigError, match=name):
            read_config(changed, {})
    else:
        assert read_config(changed, {}) != read_config(values, {})


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"is_decoder": True}, "is_decoder"),
        ({"feed_forward_proj": "plain-gelu", "dense_act_fn": "gelu"}, "feed_forward_proj"),
        ({"dense_act_fn": "gelu_10"}, "dense_act_fn"),
        ({"relative_attention_num_buckets": 7}, "num_buckets"),
    ],
)
def test_settings_that_no_part_can_say_are_refused(settings: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        read_config({**T5Config(**ODD).to_dict(), **settings}, {})


@pytest.mark.parametrize(
    ("settings", "scale"),
    [({}, 30**-0.5), ({"tie_word_embeddings": False}, 1.0), ({"scale_decoder_outputs": False}, 1.0)],
)
def test_rows_are_scaled_before_the_head_where_the_reference_does(settings: dict[str, Any], scale: float) -> None:
    theirs = T5Config(**ODD, **settings)
    ours = read_config({**ODD, **settings}, {}).head
    assert ours is not None
    assert ours.scale == (scale if theirs.scale_decoder_outputs == (scale != 1.0) else None)


def test_a_head_is_tied_where_its_tensor_is_not_another_one(rng: np.random.Generator, tmp_path: Path) -> None:
    folder = make(T5ForConditionalGeneration, tmp_path / "hf", rng)
    tensors = load_file(folder / "model.safetensors")
    tied = TokenHead(activation=None, is_tied=True, bias=False, scale=30**-0.5)
    assert read_model(folder)[0].config.head == tied
    # older files repeat the shared tensor, and one that no layer reads
    repeated = {name: tensors["shared.weight"].clone() for name in ("encoder.embed_tokens.weight", "lm_head.weight")}
    unread = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    save_file({**tensors, **repeated, unread: torch.ones(12, 3)}, folder / "model.safetensors")
    assert read_model(folder)[0].config.head == tied
    save_file({**tensors, "lm_head.weight": tensors["shared.weight"] + 1}, folder / "model.safetensors")
    assert read_model(folder)[0].config.head == replace(tied, is_tied=False)
    save_file({**tensors, "encoder.embed_tokens.weight": tensors["shared.weight"] + 1}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"encoder\.embed_tokens\.weight must equal shared\.weight"):
        read_model(folder)


def test_an_encoder_is_known_by_its_class_though_its_config_speaks_of_a_decoder(
    rng: np.random.Generator, tmp_path: Path
) -> None:
    folder = make(T5EncoderModel, tmp_path / "hf", rng)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "is_encoder_decoder": True, "num_decoder_layers": 2}))
    assert find_family(folder, json.loads((folder / "config.json").read_text())) is T5_ENCODER
    model, _ = read_model(folder)
    assert model.config.num_decoder_layers == 0
    # a file that lacks its decoder is no encoder
    (folder / "config.json").write_text(
        json.dumps({**config, "is_encoder_decoder": True, "architectures": ["T5ForConditionalGeneration"]})
    )
    with pytest.raises(CheckpointError, match="missing"):
        read_model(folder)


def write_tokenizer(folder: Path) -> None:
    """Unigrams as T5 has them: padding 0, the end 1, the unknown 2, and the end behind every text."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0), ("\u2581the", -2.5), ("ing", -3.0)]
    backend = Backend(models.Unigram([*pieces, *((letter, -4.0) for letter in ascii_lowercase)], unk_id=2))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens(["<pad>", "</s>", "<unk>"])
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    backend.save(str(folder / "tokenizer.json"))
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    settings = {**names, "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def test_a_directory_comes_and_goes_with_its_tokenizer(rng: np.random.Generator, tmp_path: Path) -> None:
    folder = make(T5ForConditionalGeneration, tmp_path / "hf", rng, decoder_start_token_id=0)
    write_tokenizer(folder)
    imported = read_directory(folder)
    assert imported.family is T5
    assert imported.notes == ()
    write_directory(tmp_path / "back", imported.model.config, imported.tokenizer, imported.model)
    for directory in (folder, tmp_path / "back"):
        theirs = AutoTokenizer.from_pretrained(directory)
        for text in ("the thing is here", "a q", "what?", ""):
            assert theirs(text)["input_ids"] == imported.tokenizer.encode(text).ids.tolist()
    generation = T5ForConditionalGeneration.from_pretrained(tmp_path / "back").generation_config
    found = (generation.decoder_start_token_id, generation.eos_token_id, generation.pad_token_id)
    assert found == (imported.tokenizer.pad_id, imported.tokenizer.eos_id, imported.tokenizer.pad_id) == (0, 1, 0)
    # what starts a decoder is part of what it was trained to
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "decoder_start_token_id": 7}))
    assert any("start from 7" in note for note in read_directory(folder).notes)
