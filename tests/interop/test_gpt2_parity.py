"""GPT-2 and GPTBigCode give the numbers of `transformers`, and mutants of them are caught."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from decoder_cases import (
    CaseOf,
    cases,
    drop_down_bias,
    drop_final_norm,
    drop_out_bias,
    drop_qkv_bias,
    drop_up_bias,
    row_of,
    see_the_future,
    shift_positions,
    swap_keys_and_values,
    swap_norms,
    take_another_epsilon,
    take_exact_gelu,
    take_neighbouring_head,
    take_standard_scale,
    take_tanh_gelu,
)
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from meristem.data.pack import pack
from meristem.interop.directory import read_directory, write_directory
from meristem.interop.families.gpt2 import GPT2, GPT_BIGCODE
from meristem.model.model import Model
from model_runs import outputs_of
from parity_checks import refuse_distance
from references import redraw

SHAPE = {"vocab_size": 64, "n_positions": 60, "n_embd": 32, "n_layer": 3, "n_head": 4}
# a head of an odd width, an odd vocabulary, a table that ends where the longest input does
ODD = {"vocab_size": 61, "n_positions": 46, "n_embd": 33, "n_layer": 3, "n_head": 3, "n_inner": 50}

SHAPES = {
    "GPT-2": (GPT2, "GPT2LMHeadModel", SHAPE),
    "GPT-2 odd": (
        GPT2,
        "GPT2LMHeadModel",
        {
            **ODD,
            "scale_attn_by_inverse_layer_idx": True,
            "activation_function": "gelu",
            "tie_word_embeddings": False,
            "layer_norm_epsilon": 1e-6,
        },
    ),
    "GPTBigCode": (GPT_BIGCODE, "GPTBigCodeForCausalLM", SHAPE),
    "GPTBigCode odd": (
        GPT_BIGCODE,
        "GPTBigCodeForCausalLM",
        {**ODD, "multi_query": False, "scale_attn_weights": False},
    ),
}

every_shape = pytest.mark.parametrize("shape", list(SHAPES))


@pytest.fixture(scope="module")
def case_of(tmp_path_factory: pytest.TempPathFactory) -> CaseOf:
    return cases(SHAPES, tmp_path_factory)


@every_shape
def test_layers_and_logits_are_those_of_the_reference(
    shape: str, case_of: CaseOf, rng: np.random.Generator, parity_row: Callable[..., None]
) -> None:
    case = case_of(shape)
    parity_row(*row_of(case), library="transformers", forward=case.check_forward(rng))


@every_shape
def test_gradients_are_those_of_the_reference(
    shape: str, case_of: CaseOf, rng: np.random.Generator, tmp_path: Path, parity_row: Callable[..., None]
) -> None:
    case = case_of(shape)
    parity_row(*row_of(case), gradients=case.check_gradients(rng, tmp_path))


@every_shape
def test_an_exported_directory_gives_the_same_in_the_reference(
    shape: str, case_of: CaseOf, rng: np.random.Generator, tmp_path: Path, parity_row: Callable[..., None]
) -> None:
    case = case_of(shape)
    parity_row(*row_of(case), export=case.check_export(rng, tmp_path))


def read_as_rows_of_one_kind(model: Model) -> None:
    """As if queries of all heads came first; in this file each head has its own three."""
    attention = model.trunk.blocks[1].attention
    for tensor in attention.qkv.parameters():
        by_kind = tensor.data.unflatten(0, (3, attention.num_heads, attention.head_width))
        tensor.data = by_kind.transpose(0, 1).flatten(0, 2)


COMMON = [
    drop_qkv_bias,
    drop_out_bias,
    drop_up_bias,
    drop_down_bias,
    swap_norms,
    drop_final_norm,
    swap_keys_and_values,
    see_the_future,
    shift_positions,
    take_another_epsilon,
]
MUTANTS = [
    *(("GPT-2", mutant) for mutant in (*COMMON, take_exact_gelu, take_neighbouring_head)),
    *(("GPT-2 odd", mutant) for mutant in (take_tanh_gelu, take_standard_scale)),
    *(("GPTBigCode", mutant) for mutant in (*COMMON, take_exact_gelu)),
    *(("GPTBigCode odd", mutant) for mutant in (read_as_rows_of_one_kind, take_neighbouring_head)),
]


@pytest.mark.parametrize(("shape", "mutant"), MUTANTS, ids=lambda v: v if isinstance(v, str) else v.__name__)
def test_a_mutant_is_caught(
    shape: str, mutant: Callable[[Model], None], case_of: CaseOf, rng: np.random.Generator
) -> None:
    if mutant is shift_positions:
        assert SHAPES[shape][2]["n_positions"] > 46, "a shifted position must still be in the table"
    case_of(shape).check_mutant(rng, mutant)


def test_a_file_of_long_ago_is_read(case_of: CaseOf, tmp_path: Path) -> None:
    """As it was first published: names without a prefix, a mask in every layer, no head, no settings since."""
    case = case_of("GPT-2")
    tensors = load_file(case.folder / "model.safetensors")
    assert "lm_head.weight" not in tensors
    older = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    for layer in range(SHAPE["n_layer"]):
        older[f"h.{layer}.attn.bias"] = torch.ones(60, 60).tril()[None, None]
        older[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    (tmp_path / "old").mkdir()
    save_file(older, tmp_path / "old/model.safetensors")
    settings = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_ctx": 60, **SHAPE}
    (tmp_path / "old/config.json").write_text(json.dumps(settings))
    again = read_directory(tmp_path / "old", case.family)
    assert again.model.config == case.imported.model.config
    assert list(again.model.heads) == ["tokens"]
    for name, tensor in again.model.state_dict().items():
        assert torch.equal(tensor, case.imported.model.state_dict()[name]), name


@pytest.mark.parametrize("shape", ["GPT-2", "GPT-2 odd"])
def test_a_trunk_saved_alone_has_no_head(shape: str, case_of: CaseOf, rng: np.random.Generator, tmp_path: Path) -> None:
    case = case_of(shape)
    case.reference.transformer.save_pretrained(tmp_path / "trunk")
    imported = read_directory(tmp_path / "trunk", case.family)
    assert not imported.model.heads
    parity = case.compare(imported.model, case.family.runner.load(tmp_path / "trunk"), rng)
    assert "logits" not in parity
    refuse_distance(parity)


def test_a_directory_with_its_tokenizer_comes_and_goes_whole(
    case_of: CaseOf, rng: np.random.Generator, tmp_path: Path
) -> None:
    """Recognised, read, written: ids and logits of a text are those of the reference at each step."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=280, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    text = "def turn(x):\n    return x  # a name, \u00e9, \u4e2d"
    backend.train_from_iterator([text] * 3, trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>", bos_token="<|endoftext|>")
    folder = tmp_path / "hf"
    # more rows than symbols, as published tables have
    config = GPT2Config(**{**SHAPE, "vocab_size": 283, "bos_token_id": 0, "eos_token_id": 0})
    redraw(GPT2LMHeadModel(config), rng).save_pretrained(folder)
    wrapped.save_pretrained(folder)

    imported = read_directory(folder)
    assert imported.family is GPT2
    write_directory(tmp_path / "back", imported.model.config, imported.tokenizer, imported.model)
    tokens = imported.tokenizer.encode(text)
    with torch.inference_mode():
        ours = outputs_of(imported.model, pack([tokens], [0]))[: len(tokens)]
        for place in (folder, tmp_path / "back"):
            theirs = AutoTokenizer.from_pretrained(place)
            ids = theirs(text, return_tensors="pt")["input_ids"]
            assert ids[0].tolist() == tokens.ids.tolist()
            assert theirs.eos_token_id == 0
            model = AutoModelForCausalLM.from_pretrained(place).eval()
            assert model.config.eos_token_id == model.config.bos_token_id == 0
            # as in check_forward
            torch.testing.assert_close(ours, model(ids).logits[0], rtol=0, atol=1e-4)
