"""Run a model of ours and its reference implementation on the same random input, and measure how far they differ.

A family names its runner; a runner is a value of four functions, so that a comparison asks for no name of a family.
Results are tensors by name, one for each sequence: `layer 0` (the embedding), `layer 1` ..., `logits` of symbols,
`pooled`, and other heads by their names. Of an encoder-decoder the layers of the source side are `source layer 0` ...
"""

import importlib
import importlib.util
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from meristem.data.pack import pack
from meristem.data.tokenizer import Tokenizer
from meristem.framing import frame_of
from meristem.model.model import SYMBOLS, Model
from meristem.model.outputs import Wanted
from meristem.shapes import Tensor
from meristem.types import SOURCE, Hidden, Tokens

Results = Mapping[str, list[Tensor]]

LENGTHS = (1, 7, 7, 19, 30, 46)
"""Payload tokens of the sequences compared: ragged, one as short as can be, two alike."""

TARGET_LENGTHS = (5, 1, 12, 9, 23, 2)
"""The same of the decoder's side, in another order."""

MASKED_FRAC = 0.2


@dataclass(frozen=True)
class Runner:
    """Functions that run the models of a family and those of the reference library on the same inputs.

    Attributes:
        library: name of the package that holds the reference implementation.
        load: loads a directory with it, in evaluation mode and fp32, with explicit attention weights.
        draw: draws random inputs; what the reference takes in another form is kept in `Tokens.labels`.
        theirs: runs the reference on these inputs.
    """

    library: str
    load: Callable[[Path], Any]
    draw: Callable[[Model, Tokenizer, np.random.Generator], list[Tokens]]
    theirs: Callable[[Any, Sequence[Tokens]], Results]

    @property
    def is_installed(self) -> bool:
        return importlib.util.find_spec(self.library) is not None


def compare(
    model: Model, tokenizer: Tokenizer, reference: Any, rng: np.random.Generator, runner: Runner
) -> dict[str, float]:
    """Run both on random inputs, ours packed and the reference padded, in fp32 on the CPU.

    Returns:
        Largest absolute difference by name of the result: each hidden state in order (those of a source side first),
        then outputs of heads and pools that both libraries have. A hidden state that one of them lacks is infinitely
        far away.
    """
    sequences = runner.draw(model, tokenizer, rng)
    with torch.inference_mode():
        ours, theirs = run_ours(model, tokenizer, sequences), runner.theirs(reference, sequences)
    layers = sorted((name for name in {**ours, **theirs} if is_layer(name)), key=_order)
    outputs = [name for name in ours if not is_layer(name) and name in theirs]
    return {name: _distance(ours.get(name), theirs.get(name)) for name in (*layers, *outputs)}


def is_layer(name: str) -> bool:
    return name.removeprefix("source ").startswith("layer ")


def _order(name: str) -> tuple[bool, int]:
    return (not name.startswith("source "), int(name.rpartition(" ")[2]))


def _distance(ours: list[Tensor] | None, theirs: list[Tensor] | None) -> float:
    """The largest difference; infinite where tensors are missing, of another shape, or not numbers."""
    if ours is None or theirs is None or any(a.shape != b.shape for a, b in zip(ours, theirs, strict=True)):
        return math.inf
    worst = torch.stack([(a.double() - b.double()).abs().max() for a, b in zip(ours, theirs)]).max()
    return worst.nan_to_num(math.inf, math.inf).item()


def run_ours(model: Model, tokenizer: Tokenizer, sequences: Sequence[Tokens]) -> Results:
    """Run our model. Results are in the order of the sequences; those of pairs in the order of the targets."""
    num_records = sum(tokens.side != SOURCE for tokens in sequences)
    records = [*range(num_records)] * (len(sequences) // num_records)
    stripped = [replace(tokens, labels={}) for tokens in sequences]
    batch = pack(stripped, records)
    config = model.config
    depth = config.num_decoder_layers or config.num_layers
    wanted = Wanted(
        list(model.heads),
        layers=range(depth + 1),
        source_layers=range(config.num_layers + 1),  # the two sides may be of different depth
        is_pooled=model.pool is not None,
    )
    outputs = model(batch, wanted)
    hidden = outputs.hidden
    places = {record: place for place, record in enumerate(batch.records)}
    order = [places[record] for record in range(num_records)]

    found = _layers(hidden, order, "")
    if hidden.source is not None:
        found.update(_layers(hidden.source, order, "source "))
    for name, spec in model.specs.items():
        values = spec.by_sequence(outputs.heads[name], hidden.layout)
        found["logits" if name == SYMBOLS else name] = [values[place] for place in order]
    if outputs.pooled is not None:
        found["pooled"] = [outputs.pooled[place] for place in order]
    return found


def _layers(hidden: Hidden, order: Sequence[int], side: str) -> dict[str, list[Tensor]]:
    found = {}
    for k, rows in hidden.layers.items():
        parts = rows[: hidden.layout.num_tokens].split(list(hidden.layout.lengths))
        found[f"{side}layer {k}"] = [parts[place] for place in order]
    return found


def random_tokens(tokenizer: Tokenizer, length: int, rng: np.random.Generator, num_types: int = 0) -> Tokens:
    """Draw a random payload between special symbols; a share of it is masked if the tokenizer has a mask.

    Args:
        num_types: number of token types; a sequence begins with those of type 0 and goes on with 1.
    """
    framed = tokenizer.encode("")
    before, behind = tokenizer.num_special
    payload = rng.choice(tokenizer.random_ids, length)
    if tokenizer.mask_id is not None:
        payload[rng.random(length) < MASKED_FRAC] = tokenizer.mask_id
    ids = np.concatenate([framed.ids[:before], payload, framed.ids[len(framed.ids) - behind :]]).astype(np.int64)
    split = rng.integers(1, len(ids) + 1)
    types = np.minimum(np.arange(len(ids)) >= split, num_types - 1).astype(np.int64) if num_types > 1 else None
    is_special = frame_of(np.array([0, len(ids)]), (before, behind))
    return Tokens(positions=np.arange(len(ids))[:, None], ids=ids, token_types=types, is_special=is_special)


def draw_sequences(model: Model, tokenizer: Tokenizer, rng: np.random.Generator) -> list[Tokens]:
    """Draw sequences of different lengths; none is longer than the model's positions allow."""
    limit = (model.config.max_length or max(LENGTHS) + 8) - sum(tokenizer.num_special)
    return [random_tokens(tokenizer, min(n, limit), rng, model.config.embedding.token_types) for n in LENGTHS]


def draw_pairs(model: Model, tokenizer: Tokenizer, rng: np.random.Generator) -> list[Tokens]:
    """Draw sources, then as many targets. Each target begins with symbol 0, as T5's decoder expects."""
    sources = [replace(tokens, side=SOURCE) for tokens in draw_sequences(model, tokenizer, rng)]
    drawn = (np.concatenate([[0], rng.choice(tokenizer.random_ids, n)]).astype(np.int64) for n in TARGET_LENGTHS)
    return [*sources, *(Tokens(positions=np.arange(len(ids))[:, None], ids=ids) for ids in drawn)]


def load_transformers(folder: Path) -> Any:
    transformers = importlib.import_module("transformers")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    name = (config.get("architectures") or ["AutoModelForMaskedLM"])[0]
    with _quiet(transformers):
        loaded = getattr(transformers, name).from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", local_files_only=True, trust_remote_code=False
        )
    return loaded.eval()


def padded(sequences: Sequence[Tokens], pad: int) -> tuple[Tensor, Tensor]:
    """Pad sequences: ids `[S, n]`, and a mask that is 1 where there is no padding."""
    ids = pad_sequence([torch.from_numpy(tokens.ids) for tokens in sequences], batch_first=True, padding_value=pad)
    return ids, pad_sequence([torch.ones(len(tokens), dtype=torch.long) for tokens in sequences], batch_first=True)


def run_sequences(**outputs: str | tuple[str, ...]) -> Callable[[Any, Sequence[Tokens]], Results]:
    """A function that runs a model of `transformers` on padded sequences, or on padded pairs of source and target.

    Args:
        outputs: attributes of its output by our names of results, beside `logits`, or several of which the first that
            is there counts; those that are not there are not compared.
    """

    def theirs(reference: Any, sequences: Sequence[Tokens]) -> Results:
        sources = [tokens for tokens in sequences if tokens.side == SOURCE]
        targets = [tokens for tokens in sequences if tokens.side != SOURCE]
        pad = getattr(reference.config, "pad_token_id", None) or 0
        ids, mask = padded(sources or targets, pad)
        more = {}
        if sources:
            more["decoder_input_ids"], more["decoder_attention_mask"] = padded(targets, pad)
        types = [torch.from_numpy(tokens.token_types) for tokens in sequences if tokens.token_types is not None]
        if types:
            more["token_type_ids"] = pad_sequence(types, batch_first=True)
        out = reference(input_ids=ids, attention_mask=mask, output_hidden_states=True, **more)
        layers = out.decoder_hidden_states if sources else out.hidden_states
        found = {f"layer {k}": _unpad(layer, targets) for k, layer in enumerate(layers)}
        if sources:
            found |= {f"source layer {k}": _unpad(x, sources) for k, x in enumerate(out.encoder_hidden_states)}
        for ours, named in {"logits": "logits", **outputs}.items():
            values = [getattr(out, name, None) for name in ([named] if isinstance(named, str) else named)]
            value = next((value for value in values if value is not None), None)
            if value is not None:
                found[ours] = list(value) if value.ndim == 2 else _unpad(value, targets)
        return found

    return theirs


def _unpad(rows: Tensor, sequences: Sequence[Tokens]) -> list[Tensor]:
    return [row[: len(tokens)] for row, tokens in zip(rows, sequences)]


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


SEQUENCES = Runner("transformers", load_transformers, draw_sequences, run_sequences())
"""Encoders and decoders."""

PAIRS = Runner("transformers", load_transformers, draw_pairs, run_sequences())
"""Encoder-decoders."""
