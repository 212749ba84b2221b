"""ESM-1b and ESM-2 give the numbers of `transformers`, and every mutant that could pass for them is caught."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import esm_reference
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from meristem.data.pack import pack
from meristem.interop import directory
from meristem.interop.directory import Imported, read_directory, write_directory
from meristem.interop.families.esm import ESM
from meristem.interop.runners import compare, load_transformers, random_tokens
from meristem.model.model import Model
from meristem.model.position import RotaryLayer
from model_runs import outputs_of
from parity_checks import Case

TOLERANCE = 1e-4
"""fp32 rounds at 1e-7; over 30 layers of sharp attention and a norm before the head this leaves about 4e-5."""

CONTACT_TOLERANCE = 1e-5
"""Probabilities: what is left of the rounding of the maps."""

FolderOf = Callable[[str], Path]
ModelOf = Callable[[str], nn.Module]


def refuse_distance(parity: dict[str, float]) -> None:
    """The check that every shape must pass and no mutant may."""
    print(", ".join(f"{name} {value:.1e}" for name, value in parity.items()))
    assert set(parity) >= {"layer 0", "layer 1", "logits", "contacts"}
    for name, distance in parity.items():
        assert distance <= (CONTACT_TOLERANCE if name == "contacts" else TOLERANCE), f"{name} differs by {distance:.1e}"


@pytest.mark.parametrize(
    "shape",
    [
        "8M",
        pytest.param("35M", marks=pytest.mark.slow),
        pytest.param("150M", marks=pytest.mark.slow),
        "reduced ESM-1b",
        "small",
    ],
)
def test_logits_layers_and_contacts_are_those_of_the_reference(
    shape: str, reference_folder: FolderOf, rng: np.random.Generator, parity_row: Callable[..., None]
) -> None:
    folder = reference_folder(shape)
    imported = read_directory(folder)
    parity = compare(imported.model, imported.tokenizer, load_transformers(folder), rng, ESM.runner)
    refuse_distance(parity)
    parity_row(ESM.name, shape, library="transformers", forward=parity["logits"])


@pytest.mark.parametrize("shape", ["small", "8M", "reduced ESM-1b"])
def test_exported_models_load_in_transformers_and_give_the_same(
    shape: str,
    reference_folder: FolderOf,
    rng: np.random.Generator,
    tmp_path: Path,
    parity_row: Callable[..., None],
) -> None:
    imported = read_directory(reference_folder(shape))
    notes = write_directory(tmp_path / "back", imported.model.config, imported.tokenizer, imported.model)
    assert notes == []
    from transformers import AutoModelForMaskedLM

    exported, info = AutoModelForMaskedLM.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(info.values()), info
    refuse_distance(compare(imported.model, imported.tokenizer, load_transformers(tmp_path / "back"), rng, ESM.runner))
    # the same tensors as those of the directory it came from, to the bit
    original = load_transformers(reference_folder(shape)).state_dict()
    assert set(exported.state_dict()) == set(original)
    for name, tensor in exported.state_dict().items():
        assert torch.equal(tensor, original[name]), name
    parity_row(ESM.name, shape, export=True)


def test_the_exported_tokenizer_gives_the_same_ids(reference_folder: FolderOf, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    imported = read_directory(reference_folder("small"))
    write_directory(tmp_path / "back", imported.model.config, imported.tokenizer, imported.model)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "back")
    sequence = "LAGVSERTIDPKQNFYMHWCXBUZO.-"
    assert theirs(sequence)["input_ids"] == imported.tokenizer.encode(sequence).ids.tolist()
    assert theirs.mask_token_id == imported.tokenizer.mask_id


def test_a_sequence_alone_gives_the_bits_it_gives_in_a_pack(
    reference_folder: FolderOf, rng: np.random.Generator
) -> None:
    imported = read_directory(reference_folder("small"))
    sequences = [random_tokens(imported.tokenizer, int(n), rng) for n in rng.integers(1, 40, 9)]
    packed = _logits(imported, pack(sequences, range(len(sequences))))
    for index, tokens in enumerate(sequences):
        assert torch.equal(_logits(imported, pack([tokens], [index]))[index], packed[index])


@pytest.mark.parametrize("shape", ["small", "reduced ESM-1b"])
def test_gradients_are_those_of_the_reference(
    shape: str,
    reference_folder: FolderOf,
    rng: np.random.Generator,
    tmp_path: Path,
    parity_row: Callable[..., None],
) -> None:
    case = Case.of(reference_folder(shape), ESM)
    parity_row(ESM.name, shape, gradients=case.check_gradients(rng, tmp_path))


def _logits(imported: Imported, batch: object) -> dict[int, torch.Tensor]:
    with torch.inference_mode():
        rows = outputs_of(imported.model, batch)
    parts = rows[: batch.layout.num_tokens].split(list(batch.layout.lengths))
    return dict(zip(batch.records, parts, strict=True))


def drop_query_bias(model: Model) -> None:
    model.trunk.blocks[0].attention.qkv.bias.data[:2] = 0


def drop_value_bias(model: Model) -> None:
    model.trunk.blocks[0].attention.qkv.bias.data[-2:] = 0


def drop_out_bias(model: Model) -> None:
    model.trunk.blocks[-1].attention.out.bias = None


def drop_up_bias(model: Model) -> None:
    model.trunk.blocks[1].feedforward.up.bias = None


def drop_symbol_bias(model: Model) -> None:
    model.heads["tokens"].bias = None


def swap_norms(model: Model) -> None:
    block = model.trunk.blocks[1]
    block.attention_norm, block.feedforward_norm = block.feedforward_norm, block.attention_norm


def swap_keys_and_values(model: Model) -> None:
    qkv = model.trunk.blocks[1].attention.qkv
    for tensor in (qkv.weight.data, qkv.bias.data):
        query, key, value = tensor.chunk(3)
        tensor.copy_(torch.cat([query, value, key]))


def take_tanh_gelu(model: Model) -> None:
    for block in model.trunk.blocks:
        block.feedforward.activation = lambda x: F.gelu(x, approximate="tanh")


def take_tanh_gelu_in_head(model: Model) -> None:
    model.heads["tokens"].activation = lambda x: F.gelu(x, approximate="tanh")


def take_foreign_epsilon(model: Model) -> None:
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-3


def drop_mask_scale(model: Model) -> None:
    embedding = model.trunk.embedding
    embedding.config = replace(embedding.config, mask_dropout_frac=0.0, mask_id=None)


def keep_mask_rows(model: Model) -> None:
    embedding = model.trunk.embedding
    embedding.config = replace(embedding.config, mask_id=31)


def drop_final_norm(model: Model) -> None:
    model.trunk.final_norm = nn.Identity()


def halve_scale(model: Model) -> None:
    attention = model.trunk.blocks[0].attention
    rows = attention.num_heads * attention.head_width
    attention.qkv.weight.data[:rows] *= 0.5
    attention.qkv.bias.data[:rows] *= 0.5


def change_contact_bias(model: Model) -> None:
    model.heads["contacts"].regression.bias.data += 0.01


def swap_contact_weights(model: Model) -> None:
    weight = model.heads["contacts"].regression.weight.data
    weight.copy_(weight.flip(1))


MUTANTS = [
    drop_query_bias,
    drop_value_bias,
    drop_out_bias,
    drop_up_bias,
    drop_symbol_bias,
    swap_norms,
    swap_keys_and_values,
    take_tanh_gelu,
    take_tanh_gelu_in_head,
    take_foreign_epsilon,
    drop_mask_scale,
    keep_mask_rows,
    drop_final_norm,
    halve_scale,
    change_contact_bias,
    swap_contact_weights,
]


@pytest.mark.parametrize(
    ("shape", "mutate"),
    [(shape, mutate) for shape in ("small", "reduced ESM-1b") for mutate in MUTANTS]
    + [("8M", mutate) for mutate in (drop_out_bias, swap_norms, take_tanh_gelu)],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_a_mutant_is_caught(
    shape: str,
    mutate: Callable[[Model], None],
    reference_folder: FolderOf,
    reference_model: ModelOf,
    rng: np.random.Generator,
) -> None:
    check_mutant(shape, mutate, reference_folder, reference_model, rng)


class KeysOneAhead(RotaryLayer):
    """Turns half of the heads as if they stood one place further on."""

    def turn(self, x: torch.Tensor, tables: tuple[torch.Tensor, ...]) -> torch.Tensor:
        ahead = tuple(table.roll(-1, dims=0) for table in tables)
        queries_and_half, keys = x.split([x.shape[1] * 3 // 4, x.shape[1] - x.shape[1] * 3 // 4], dim=1)
        return torch.cat([super().turn(queries_and_half, tables), super().turn(keys, ahead)], dim=1)


class Interleaved(RotaryLayer):
    """Pairs neighbours, not halves."""

    def turn(self, x: torch.Tensor, tables: tuple[torch.Tensor, ...]) -> torch.Tensor:
        width = x.shape[-1]
        order = torch.arange(width).view(2, width // 2).t().flatten()
        return super().turn(x[..., order.argsort()], tables)[..., order]


def turn_keys_one_ahead(model: Model) -> None:
    model.trunk.positions[0] = KeysOneAhead(model.config.position, model.config.head_width)


def interleave_rotation(model: Model) -> None:
    model.trunk.positions[0] = Interleaved(model.config.position, model.config.head_width)


def round_frequencies(model: Model) -> None:
    config = replace(model.config.position, rounding="bf16")
    model.trunk.positions[0] = RotaryLayer(config, model.config.head_width)


@pytest.mark.parametrize("mutate", [turn_keys_one_ahead, interleave_rotation, round_frequencies])
def test_a_mutant_of_the_rotation_is_caught(
    mutate: Callable[[Model], None], reference_folder: FolderOf, reference_model: ModelOf, rng: np.random.Generator
) -> None:
    check_mutant("small", mutate, reference_folder, reference_model, rng)


def shift_positions(model: Model) -> None:
    position = model.trunk.embedding.position
    position.config = replace(position.config, offset=position.config.offset + 1)


def drop_embedding_norm(model: Model) -> None:
    model.trunk.embedding.norm = nn.Identity()


@pytest.mark.parametrize("mutate", [shift_positions, drop_embedding_norm])
def test_a_mutant_of_learned_positions_is_caught(
    mutate: Callable[[Model], None], reference_folder: FolderOf, reference_model: ModelOf, rng: np.random.Generator
) -> None:
    check_mutant("reduced ESM-1b", mutate, reference_folder, reference_model, rng)


def check_mutant(
    shape: str,
    mutate: Callable[[Model], None],
    folder_of: FolderOf,
    model_of: ModelOf,
    rng: np.random.Generator,
) -> None:
    imported = read_directory(folder_of(shape))
    mutate(imported.model)
    parity = compare(imported.model, imported.tokenizer, model_of(shape), rng, ESM.runner)
    with pytest.raises(AssertionError, match="differ"):
        refuse_distance(parity)


@pytest.mark.parametrize("rounding", ["fp16", "bf16"])
def test_rounded_frequencies_of_a_checkpoint_are_kept(rounding: str, rng: np.random.Generator, tmp_path: Path) -> None:
    model = esm_reference.redrawn(esm_reference.SHAPES["small"], rng)
    frequencies = model.esm.rotary_embeddings.inv_freq
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[rounding]
    frequencies.copy_(frequencies.to(dtype).float())
    folder = esm_reference.save(model, tmp_path / "hf")
    imported = read_directory(folder)
    assert imported.model.config.position.rounding == rounding
    refuse_distance(compare(imported.model, imported.tokenizer, load_transformers(folder), rng, ESM.runner))


def test_an_untied_head_is_kept(rng: np.random.Generator, tmp_path: Path) -> None:
    folder = esm_reference.save(
        esm_reference.redrawn(esm_reference.esm2(2, 32, 4, tie_word_embeddings=False), rng), tmp_path / "hf"
    )
    imported = read_directory(folder)
    assert not imported.model.config.head.is_tied
    refuse_distance(compare(imported.model, imported.tokenizer, load_transformers(folder), rng, ESM.runner))


def test_a_head_whose_kind_is_not_installed_is_left_out_and_named(
    reference_folder: FolderOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = reference_folder("small")
    whole = read_directory(folder)
    assert set(whole.model.heads) == {"tokens", "contacts"}
    kinds = {name: point for name, point in directory.installed("meristem.heads").items() if name != "contacts"}
    monkeypatch.setattr(directory, "installed", lambda group: kinds)
    without = read_directory(folder)
    assert set(without.model.heads) == {"tokens"}
    assert without.notes == (
        *whole.notes,
        "head contacts left out: no installed package offers the kind of head 'contacts'",
    )
    for name, tensor in without.model.state_dict().items():
        assert torch.equal(tensor, whole.model.state_dict()[name])
