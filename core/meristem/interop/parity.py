"""The same input through both libraries, and how far the results lie apart."""

import importlib
import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from meristem.data.pack import pack
from meristem.data.tokenizer import Tokenizer
from meristem.interop.directory import read_config_file
from meristem.model.model import CONTACTS, SYMBOLS, Model
from meristem.shapes import Tensor
from meristem.types import Tokens

LENGTHS = (1, 7, 7, 19, 30, 46)
"""Payload tokens of the sequences compared: ragged, one as short as can be, two alike."""

MASKED_FRAC = 0.2


@dataclass(frozen=True)
class Parity:
    """Largest absolute differences, in fp32 on the CPU.

    Attributes:
        layers: of each hidden state: the embedding, then each block, the last after the final norm.
        logits: of the symbol head; None where either library has none.
        contacts: of the probabilities of contact; None where either has none.
    """

    layers: tuple[float, ...]
    logits: float | None
    contacts: float | None

    @property
    def largest(self) -> float:
        return max(*self.layers, self.logits or 0.0, self.contacts or 0.0)


def is_reference_installed() -> bool:
    """Whether `transformers` can be asked."""
    return importlib.util.find_spec("transformers") is not None


def load_reference(folder: Path) -> nn.Module:
    """The foreign directory as `transformers` loads it, in fp32, with explicit attention weights."""
    transformers = importlib.import_module("transformers")
    name = read_config_file(folder).get("architectures", ["AutoModelForMaskedLM"])[0]
    with _quiet(transformers):
        loaded = getattr(transformers, name).from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", local_files_only=True, trust_remote_code=False
        )
    model: nn.Module = loaded.eval()
    return model


def compare(
    model: Model,
    tokenizer: Tokenizer,
    reference: Any,
    rng: np.random.Generator,
    lengths: Sequence[int] = LENGTHS,
) -> Parity:
    """Run both on random payloads with masks, here packed, there padded with an attention mask."""
    sequences = [random_tokens(tokenizer, length, rng) for length in lengths]
    with torch.inference_mode():
        ours = _run_ours(model, tokenizer, sequences)
        theirs = _run_reference(reference, sequences, has_contacts=CONTACTS in model.heads)
    return Parity(
        layers=tuple(
            max(_distance(a, b) for a, b in zip(mine, its, strict=True))
            for mine, its in zip(ours["layers"], theirs["layers"], strict=True)
        ),
        logits=_largest(ours, theirs, "logits"),
        contacts=_largest(ours, theirs, "contacts"),
    )


def random_tokens(tokenizer: Tokenizer, length: int, rng: np.random.Generator) -> Tokens:
    """A random payload between its special symbols, a share of it masked."""
    before, behind = tokenizer.num_special
    framed = tokenizer.encode("".join(tokenizer.vocab[i] for i in rng.choice(tokenizer.random_ids, length)))
    ids = framed.ids.copy()
    is_masked = rng.random(length) < MASKED_FRAC
    if tokenizer.mask_id is not None:
        ids[before : len(ids) - behind][is_masked] = tokenizer.mask_id
    return Tokens(positions=framed.positions, ids=ids)


def _run_ours(model: Model, tokenizer: Tokenizer, sequences: list[Tokens]) -> dict[str, Any]:
    """Results by name, one a sequence in the order given; `layers` is a list of these."""
    batch = pack(sequences, range(len(sequences)))
    num_layers = model.config.num_layers
    has_contacts = CONTACTS in model.heads
    hidden = model.trunk(batch, layers=range(num_layers + 1), attentions=range(num_layers) if has_contacts else ())
    places = {record: place for place, record in enumerate(batch.records)}

    def split(rows: Tensor) -> list[Tensor]:
        parts = rows[: batch.layout.num_tokens].split(list(batch.layout.lengths))
        return [parts[places[record]] for record in range(len(sequences))]

    found: dict[str, Any] = {"layers": [split(hidden.layers[layer]) for layer in range(num_layers + 1)]}
    if SYMBOLS in model.heads:
        found["logits"] = split(model.symbol_logits(hidden))
    if has_contacts:
        logits = model.contact_logits(hidden, tokenizer.num_special)
        found["contacts"] = [logits[places[record]].sigmoid() for record in range(len(sequences))]
    return found


def _run_reference(reference: Any, sequences: list[Tokens], has_contacts: bool) -> dict[str, Any]:
    lengths = [len(tokens) for tokens in sequences]
    ids = torch.full((len(sequences), max(lengths)), reference.config.pad_token_id)
    for row, tokens in zip(ids, sequences):
        row[: len(tokens)] = torch.from_numpy(tokens.ids)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    out = reference(input_ids=ids, attention_mask=mask, output_hidden_states=True)

    def split(rows: Tensor) -> list[Tensor]:
        return [row[:length] for row, length in zip(rows, lengths)]

    found: dict[str, Any] = {"layers": [split(layer) for layer in out.hidden_states]}
    if getattr(out, "logits", None) is not None:
        found["logits"] = split(out.logits)
    if has_contacts and hasattr(reference, "predict_contacts"):
        # the reference drops the first row and the last one of the padding, so that inner places come first
        contacts = reference.predict_contacts(ids, mask)
        found["contacts"] = [row[: length - 2, : length - 2] for row, length in zip(contacts, lengths)]
    return found


def _distance(a: Tensor, b: Tensor) -> float:
    distance = (a.double() - b.double()).abs().max().item()
    return float("inf") if distance != distance else distance


def _largest(ours: dict[str, Any], theirs: dict[str, Any], name: str) -> float | None:
    if name not in ours or name not in theirs:
        return None
    return max(_distance(a, b) for a, b in zip(ours[name], theirs[name], strict=True))


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Without the library's bars and remarks, which would stand in the middle of ours."""
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)
        transformers.logging.enable_progress_bar()
