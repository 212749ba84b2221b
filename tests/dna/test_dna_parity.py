"""Nucleotide Transformer v2 and DNABERT-2 give the numbers of plain slow models in the published layouts."""

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import plain_dna
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from meristem.errors import CheckpointError
from meristem.interop.directory import read_directory, read_model
from meristem.interop.family import find_family
from meristem.interop.runners import Runner, draw_sequences
from meristem.model.model import Model
from meristem.model.position import LinearBiasLayer, ScoreBias, linear_slopes
from meristem_domains.dna.dnabert2 import DNABERT2
from meristem_domains.dna.nucleotide import NUCLEOTIDE_V1, NUCLEOTIDE_V2
from parity_checks import Case
from references import PlainIds

TOLERANCE = 1e-4
"""Sums in another order, in fp32: the oracle adds up a norm and each head by itself."""


def words(k: int) -> str:
    """A vocabulary as v2 has it, of words of k bases."""
    named = ["<unk>", "<pad>", "<mask>", "<cls>", "<eos>", "<bos>"]
    return "\n".join([*named, *("".join(word) for word in product("ATCG", repeat=k)), *"ATCGN"])


COMMON = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.02}

# as published, but for sizes: no model_type, and no hidden_act
NUCLEOTIDE = {
    **COMMON,
    "add_bias_fnn": False,
    "architectures": ["EsmForMaskedLM"],
    "auto_map": {"AutoConfig": "esm_config.EsmConfig", "AutoModelForMaskedLM": "modeling_esm.EsmForMaskedLM"},
    "emb_layer_norm_before": False,
    "esmfold_config": None,
    "is_folding_model": False,
    "layer_norm_eps": 1e-12,
    "mask_token_id": 2,
    "max_position_embeddings": 2050,
    "pad_token_id": 1,
    "position_embedding_type": "rotary",
    "tie_word_embeddings": False,
    "token_dropout": False,
    "use_cache": False,
    "vocab_list": None,
}
NUCLEOTIDE_SHAPES: dict[str, dict[str, Any]] = {
    "3 layers of 48, 4 heads, 4,107 words": {
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "vocab_size": 4107,
    },
    "2 layers of 50, 5 heads, biases, 29 rows for 27 words": {
        "hidden_size": 50,
        "num_hidden_layers": 2,
        "num_attention_heads": 5,
        "intermediate_size": 37,
        "vocab_size": 29,
        "add_bias_fnn": True,
        "layer_norm_eps": 1e-5,
    },
}

DNABERT = {
    **COMMON,
    "alibi_starting_size": 512,
    "architectures": ["BertForMaskedLM"],
    "auto_map": {"AutoModelForMaskedLM": "bert_layers.BertForMaskedLM"},
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512,
    "model_type": "bert",
    "position_embedding_type": "absolute",
    "type_vocab_size": 2,
    "vocab_size": 64,
}
DNABERT_SHAPES: dict[str, dict[str, Any]] = {
    "3 layers of 48, 12 heads": {
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 12,
        "intermediate_size": 60,
    },
    "2 layers of 50, 5 heads, 61 symbols": {
        "hidden_size": 50,
        "num_hidden_layers": 2,
        "num_attention_heads": 5,
        "intermediate_size": 33,
        "vocab_size": 61,
        "layer_norm_eps": 1e-5,
    },
}


def nucleotide(shape: str, folder: Path, rng: np.random.Generator) -> Case:
    config = {**NUCLEOTIDE, **NUCLEOTIDE_SHAPES[shape]}
    plain_dna.write(folder / "hf", config, plain_dna.nucleotide_shapes(config), rng)
    (folder / "hf/vocab.txt").write_text(words(6 if config["vocab_size"] > 4096 else 2))
    runner = Runner("torch", plain_dna.load, draw_sequences, plain_dna.theirs(plain_dna.run_nucleotide))
    return Case.of(folder / "hf", replace(NUCLEOTIDE_V2, runner=runner))


def dnabert2(shape: str, folder: Path, rng: np.random.Generator) -> Case:
    config = {**DNABERT, **DNABERT_SHAPES[shape]}
    plain_dna.write(folder / "hf", config, plain_dna.dnabert2_shapes(config), rng)
    runner = Runner("torch", plain_dna.load, draw_sequences, plain_dna.theirs(plain_dna.run_dnabert2))
    tokenizer = PlainIds(config["vocab_size"], prefix=(1,), suffix=(2,), reserved=(0, 3), mask_id=4)
    return Case.of(folder / "hf", replace(DNABERT2, runner=runner), tokenizer)


CASES = [(nucleotide, shape) for shape in NUCLEOTIDE_SHAPES] + [(dnabert2, shape) for shape in DNABERT_SHAPES]


@pytest.mark.parametrize(("make", "shape"), CASES)
def test_outputs_and_export_are_those_of_the_oracle(
    make: Callable[..., Case], shape: str, tmp_path: Path, rng: np.random.Generator, parity_row: Callable[..., None]
) -> None:
    case = make(shape, tmp_path, rng)
    forward = case.check_forward(rng, TOLERANCE)
    export = case.check_export(rng, tmp_path, TOLERANCE)
    reference = "a plain slow model, in the published layout"
    parity_row(case.family.name, shape, reference=reference, forward=forward, export=export)


@pytest.mark.parametrize(("make", "shape"), CASES)
def test_the_family_is_known_from_the_directory(
    make: Callable[..., Case], shape: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    case = make(shape, tmp_path, rng)
    config = json.loads((case.folder / "config.json").read_text())
    assert find_family(case.folder, config).name == case.family.name
    assert case.family.domain == "dna"
    model, _ = read_model(case.folder)
    assert set(model.heads) == ({"tokens", "contacts"} if make is nucleotide else {"tokens"})


def test_v1_is_an_esm_with_words(tmp_path: Path, rng: np.random.Generator) -> None:
    assert NUCLEOTIDE_V1.recognises({"model_type": "esm", "vocab_size": 4105})
    assert not NUCLEOTIDE_V1.recognises({"model_type": "esm", "vocab_size": 33})


def test_sequences_are_cut_to_the_ids_of_the_published_vocabulary(tmp_path: Path, rng: np.random.Generator) -> None:
    """Words stand in the order A, T, C, G behind six special symbols."""
    folder = nucleotide(next(iter(NUCLEOTIDE_SHAPES)), tmp_path, rng).folder
    tokenizer = read_directory(folder).tokenizer
    assert tokenizer.encode("AAAAAAAAAAATANG").ids.tolist() == [3, 6, 7, 4102, 4106, 4105]


def test_buffers_of_published_checkpoints_need_no_place(tmp_path: Path, rng: np.random.Generator) -> None:
    case = dnabert2(next(iter(DNABERT_SHAPES)), tmp_path, rng)
    tensors = load_file(case.folder / "model.safetensors")
    table = tensors["bert.embeddings.word_embeddings.weight"].clone()
    more = {"bert.encoder.alibi": torch.zeros(1, 12, 512, 512), "cls.predictions.decoder.weight": table}
    save_file({**tensors, **more}, case.folder / "model.safetensors")
    again = read_model(case.folder)[0].state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in case.imported.model.state_dict().items())
    save_file({**tensors, "cls.predictions.decoder.weight": table + 1}, case.folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"decoder\.weight must equal .*word_embeddings\.weight"):
        read_model(case.folder)


def swap_gate_and_value(model: Model) -> None:
    up = model.trunk.blocks[1].feedforward.up.weight.data
    up.copy_(torch.cat(up.chunk(2)[::-1]))


def take_gelu(model: Model) -> None:
    for block in model.trunk.blocks:
        block.feedforward.activation = F.gelu


def take_silu(model: Model) -> None:
    for block in model.trunk.blocks:
        block.feedforward.activation = F.silu


def drop_attention_bias(model: Model) -> None:
    model.trunk.blocks[0].attention.qkv.bias = None


class Geometric(LinearBiasLayer):
    """Slopes in one series, also where the heads are no power of two."""

    def bias(self, device: torch.device) -> ScoreBias:
        slopes = torch.tensor([2 ** (-8 * (k + 1) / self.num_heads) for k in range(self.num_heads)])[:, None, None]
        return ScoreBias(lambda i, j: -slopes * (i - j).abs(), device)


def take_geometric_slopes(model: Model) -> None:
    model.trunk.positions[0] = Geometric(12)


def tie_head(model: Model) -> None:
    model.heads["tokens"].out.weight.data.copy_(model.trunk.embedding.symbols.weight.data)


def swap_norms(model: Model) -> None:
    block = model.trunk.blocks[1]
    block.attention_norm, block.feedforward_norm = block.feedforward_norm, block.attention_norm


@pytest.mark.parametrize(
    ("make", "mutate"),
    [(nucleotide, mutate) for mutate in (swap_gate_and_value, take_gelu, drop_attention_bias, tie_head, swap_norms)]
    + [(dnabert2, mutate) for mutate in (swap_gate_and_value, take_silu, take_geometric_slopes, swap_norms)],
)
def test_a_mutant_is_caught(
    make: Callable[..., Case], mutate: Callable[[Model], None], tmp_path: Path, rng: np.random.Generator
) -> None:
    shape = next(iter(NUCLEOTIDE_SHAPES if make is nucleotide else DNABERT_SHAPES))
    make(shape, tmp_path, rng).check_mutant(rng, mutate, TOLERANCE)


def test_slopes_are_those_of_the_oracle() -> None:
    for heads in (1, 2, 5, 8, 12, 20):
        assert linear_slopes(heads).tolist() == pytest.approx(plain_dna.slopes(heads), rel=1e-6)
