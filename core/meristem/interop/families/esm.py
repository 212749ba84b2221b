"""ESM-1b, ESM-1v and ESM-2 (Rives 2021, doi 10.1073/pnas.2016239118; Lin 2023, doi 10.1126/science.ade2574).

As Hugging Face keeps them (`EsmModel`, `EsmForMaskedLM`): pre-norm, biases everywhere, exact GELU, token dropout also
at inference; rotary positions (ESM-2) or a learned table whose first row is that of the padding symbol plus one.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from string import ascii_uppercase
from typing import Any, get_args

import torch

from meristem.data.tokenizer import AlphabetTokenizer, Tokenizer
from meristem.errors import CheckpointError, ConfigError, require
from meristem.interop.family import TENSORFLOW_SPELLINGS, ForeignConfig, Tensors, heads_by_prefix, sequence_family
from meristem.interop.runners import SEQUENCES, Results, padded
from meristem.interop.settings import IS_TIED, SHAPE, Field, Settings, write_fields
from meristem.interop.table import Ignored, KeyTable, Rename, Tied, block_rows, lm_head_rows
from meristem.interop.vocabulary import SPECIAL_MAP, json_text, symbol_of
from meristem.interop.vocabulary_files import DEFINITION, SETTINGS, WORDS, read_object
from meristem.model.config import Embedding, Learned, Position, Rotary, Rounding, TransformerConfig
from meristem.model.position import rotary_frequencies
from meristem.shapes import Tensor
from meristem.types import Tokens

MASK_DROPOUT_FRAC = 0.15 * 0.8
"""Share of masks in pre-training; a constant of the reference, not of its config."""

RESIDUES = "LAGVSERTIDPKQNFYMHWC"
"""The 20 amino acids of the genetic code, in the order of the vocabulary."""

SYMBOLS = ("<cls>", "<pad>", "<eos>", "<unk>", *RESIDUES, *"XBUZO.-", "<null_1>", "<mask>")
"""The vocabulary of all published models."""

SPECIAL = {"cls": "<cls>", "pad": "<pad>", "eos": "<eos>", "unk": "<unk>", "mask": "<mask>"}
KIND_OF_POSITION = "position_embedding_type"
FREQUENCIES = "rotary_embeddings.inv_freq"
LAYER = "esm.encoder.layer.{}"
FIELDS = (
    *SHAPE,
    Field("emb_layer_norm_before", "embedding.is_normed", False),
    Field("hidden_dropout_prob", "residual.dropout", 0.0),
    Field("attention_probs_dropout_prob", "attention.dropout", 0.0),
    Field("layer_norm_eps", "norm.eps", 1e-12),
    IS_TIED,
)

TABLE = KeyTable(
    rows=(
        Rename("trunk.embedding.symbols", "esm.embeddings.word_embeddings"),
        Rename("trunk.embedding.position.table", "esm.embeddings.position_embeddings"),
        Rename("trunk.embedding.norm", "esm.embeddings.layer_norm"),
        *block_rows(
            LAYER,
            attention_norm="attention.LayerNorm",
            qkv=("attention.self.query", "attention.self.key", "attention.self.value"),
            out="attention.output.dense",
        ),
        *block_rows(LAYER, feedforward_norm="LayerNorm", up="intermediate.dense", down="output.dense"),
        Rename("trunk.final_norm", "esm.encoder.emb_layer_norm_after"),
        *lm_head_rows(bias="lm_head.bias"),
        Rename("heads.contacts.regression", "esm.contact_head.regression"),
    ),
    tied=(Tied("lm_head.decoder.weight", "esm.embeddings.word_embeddings.weight"),),
    ignored=(
        # computed from the config, and compared with it by read_config
        Ignored(r"esm\.(encoder\.layer\.(\d+|\*)\.attention\.self\.)?rotary_embeddings\.inv_freq"),
        Ignored(r"esm\.embeddings\.position_ids"),
        Ignored(r"esm\.embeddings\.position_embeddings\.weight", "a table of positions beside rotary ones is unused"),
        Ignored(r"esm\.pooler\.dense\.(weight|bias)", "the pooler is left out: it was never trained"),
    ),
)


def read_config(config: ForeignConfig, tensors: Tensors) -> TransformerConfig:
    # null stands for a default, but of positions it is a kind that we do not have
    given = {name: value for name, value in config.items() if value is not None or name == KIND_OF_POSITION}
    found = Settings("an ESM", given, FIELDS, {"token_dropout": False, KIND_OF_POSITION: "absolute"})
    found.require(is_folding_model=False, is_decoder=False, add_cross_attention=False, hidden_act="gelu")
    masks = (
        {"mask_id": found["mask_token_id"], "mask_dropout_frac": MASK_DROPOUT_FRAC} if found["token_dropout"] else {}
    )
    architecture = found.build(embedding=partial(Embedding, **masks), position=_read_position(found))
    return _with_rounding(architecture, tensors)


def _read_position(found: Settings) -> Position:
    kind = found[KIND_OF_POSITION]
    if kind == "absolute":
        return Learned(max_positions=found["max_position_embeddings"], offset=found["pad_token_id"] + 1)
    require(kind == "rotary", f"{KIND_OF_POSITION} must be rotary or absolute in an ESM config", repr(kind))
    return Rotary(base=float(found.get("rope_theta") or 10000.0))


def _with_rounding(architecture: TransformerConfig, tensors: Tensors) -> TransformerConfig:
    """With rotary frequencies rounded as those of the checkpoint, which was trained to them."""
    position = architecture.position
    stored = [tensor for name, tensor in tensors.items() if name.endswith(FREQUENCIES)]
    if not isinstance(position, Rotary) or not stored:
        return architecture
    for rounding in get_args(Rounding):
        rounded = replace(position, rounding=rounding)
        expected = rotary_frequencies(rounded, architecture.head_width)
        if all(t.shape == expected.shape and torch.allclose(t, expected, rtol=1e-6, atol=0) for t in stored):
            return replace(architecture, position=rounded)
    raise CheckpointError(f"{FREQUENCIES} must be those of rope_theta={position.base:g}, rounded or not; got others")


def write_config(architecture: TransformerConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    position, mask_id = architecture.position, architecture.embedding.mask_id
    return {
        "model_type": "esm",
        **write_fields(architecture, FIELDS),
        **ids_of_special(tokenizer),
        # one that is zeroed goes before the tokenizer's
        **({} if mask_id is None else {"mask_token_id": mask_id}),
        "hidden_act": architecture.feedforward.activation,
        KIND_OF_POSITION: "rotary" if isinstance(position, Rotary) else "absolute",
        "rope_theta": position.base if isinstance(position, Rotary) else 10000.0,
        "max_position_embeddings": position.max_positions if isinstance(position, Learned) else 1026,
        "token_dropout": architecture.embedding.mask_dropout_frac > 0,
        "initializer_range": architecture.init.std,
        "is_folding_model": False,
    }


def derived(architecture: TransformerConfig) -> dict[str, Tensor]:
    """The buffer of rotary frequencies, which the reference keeps among its weights."""
    if not isinstance(architecture.position, Rotary):
        return {}
    return {f"esm.{FREQUENCIES}": rotary_frequencies(architecture.position, architecture.head_width)}


def read_residues(
    folder: Path, config: ForeignConfig, published: Sequence[str], num_rows: int, kind: str
) -> tuple[Tokenizer, list[str]]:
    """Read a tokenizer with one token for each residue; ids are those of the directory's vocabulary.

    Letters and `*` without a symbol are read as X, and counted; the reference merges a run of them into one token.

    Args:
        published: vocabulary to use for a directory that holds none.
        num_rows: rows of the embedding of published models; a directory without a vocabulary must have as many.
        kind: name of the published models in notes.

    Raises:
        CheckpointError: a vocabulary that is damaged, or whose ids are not those of the config.
    """
    vocab, notes = _read_vocab(folder, config, published, num_rows, kind)
    stated = {**read_object(folder / SETTINGS), **read_object(folder / SPECIAL_MAP)}
    names = {role: stated.get(f"{role}_token") or symbol for role, symbol in SPECIAL.items()}
    special = {role: symbol_of(folder, name)["content"] for role, name in names.items()}
    if unknown := [symbol for symbol in special.values() if symbol not in vocab]:
        raise CheckpointError(f"{folder}: the vocabulary must hold every special symbol; it lacks {unknown[0]!r}")
    if long := [s for s in vocab if len(s) != 1 and not (s.startswith("<") and s.endswith(">"))]:
        raise CheckpointError(f"{folder}: a symbol of the vocabulary must be one residue; got {long[0]!r}")
    for name in ("mask", "pad"):
        if config.get(f"{name}_token_id", vocab.index(special[name])) not in (vocab.index(special[name]), None):
            raise CheckpointError(
                f"{folder}: {name}_token_id must be {vocab.index(special[name])}, the id of {special[name]} in the "
                f"vocabulary; got {config[f'{name}_token_id']} in config.json"
            )
    if len(vocab) > config["vocab_size"]:
        raise CheckpointError(f"{folder}: vocab_size must be {len(vocab)} or more; got {config['vocab_size']}")
    lacking = [letter for letter in (*ascii_uppercase, "*") if letter not in vocab]
    tokenizer = AlphabetTokenizer(
        vocab=tuple(vocab),
        prefix=(special["cls"],),
        suffix=(special["eos"],),
        mask=special["mask"],
        replace=dict.fromkeys(lacking, "X") if "X" in vocab else {},
        random="".join(residue for residue in RESIDUES if residue in vocab),
    )
    return tokenizer, notes


def _read_vocab(
    folder: Path, config: ForeignConfig, published: Sequence[str], num_rows: int, kind: str
) -> tuple[list[str], list[str]]:
    if (folder / WORDS).is_file():
        return (folder / WORDS).read_text(encoding="utf-8").split(), []
    if definition := read_object(folder / DEFINITION):
        try:
            ids = definition["model"]["vocab"]
            vocab = sorted(ids, key=ids.__getitem__)
            assert [ids[symbol] for symbol in vocab] == list(range(len(vocab))), "ids must count from 0"
        except (KeyError, TypeError, AttributeError, AssertionError) as error:
            raise CheckpointError(f"{folder / DEFINITION} must have model.vocab: {error}") from error
        return vocab, []
    if config["vocab_size"] != num_rows:
        raise CheckpointError(f"{folder} must hold vocab.txt or tokenizer.json; it holds neither")
    return list(published), [f"no vocab.txt: the {len(published)} symbols of all published {kind} models are taken"]


def write_tokenizer(tokenizer: Tokenizer) -> dict[str, str]:
    """Texts of the files of an `EsmTokenizer`, by file name.

    Raises:
        ConfigError: a tokenizer of another kind, or one that lacks a special symbol.
    """
    if not isinstance(tokenizer, AlphabetTokenizer) or not set(SPECIAL.values()) <= set(tokenizer.vocab):
        raise ConfigError(f"a tokenizer of ESM must have {', '.join(SPECIAL.values())}, and one token a residue")
    names = {f"{role}_token": symbol for role, symbol in SPECIAL.items()}
    settings = {**names, "tokenizer_class": "EsmTokenizer", "clean_up_tokenization_spaces": False}
    return {WORDS: "\n".join(tokenizer.vocab), SETTINGS: json_text(settings), SPECIAL_MAP: json_text(names)}


def ids_of_special(tokenizer: Tokenizer) -> dict[str, int | None]:
    """Ids of special symbols by name of the setting; None for a symbol that the tokenizer lacks."""
    symbols, vocab = {**SPECIAL, **getattr(tokenizer, "special", {})}, tokenizer.vocab
    roles = {"mask_token_id": "mask", "pad_token_id": "pad", "bos_token_id": "cls", "eos_token_id": "eos"}
    return {name: vocab.index(symbols[role]) if symbols[role] in vocab else None for name, role in roles.items()}


def _run_reference(reference: Any, sequences: Sequence[Tokens]) -> Results:
    """Results of `transformers`, contacts among them."""
    found = dict(SEQUENCES.theirs(reference, sequences))
    if hasattr(reference, "predict_contacts"):
        ids, mask = padded(sequences, reference.config.pad_token_id)
        # the reference drops the first row and the last one of the padding, so that inner places come first
        inner = [len(tokens) - 2 for tokens in sequences]
        contacts = reference.predict_contacts(ids, mask)
        found["contacts"] = [row[:length, :length] for row, length in zip(contacts, inner)]
    return found


ESM = replace(
    sequence_family(
        "ESM-1b and ESM-2", "protein", "esm", "Esm", TABLE, read_config, write_config, "esm.", "ForMaskedLM"
    ),
    read_heads=heads_by_prefix(tokens="lm_head.", contacts="esm.contact_head."),
    read_tokenizer=partial(read_residues, published=SYMBOLS, num_rows=len(SYMBOLS), kind="ESM"),
    write_tokenizer=write_tokenizer,
    # transformers 5 writes the names of long ago, and the star of a pattern, when it saves; it reads both
    spellings=TENSORFLOW_SPELLINGS,
    derived=derived,
    implied_heads=("contacts",),
    runner=replace(SEQUENCES, theirs=_run_reference),
)
