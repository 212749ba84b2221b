"""Nucleotide Transformer v2 and DNABERT-2 as plain slow models: the oracles of their parity tests.

No library that can be installed has them. Each is written from the published facts, one sequence and one head at a
time, on tensors under the published names.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from meristem.interop.runners import Results
from meristem.types import Tokens


@dataclass
class Plain:
    """A model: its config and its tensors."""

    config: Mapping[str, Any]
    w: dict[str, Tensor]

    def state_dict(self) -> dict[str, Tensor]:
        return self.w

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.w[f"{name}.weight"], self.w.get(f"{name}.bias"))

    def norm(self, name: str, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.pow(2).mean(-1, keepdim=True) + self.config["layer_norm_eps"]).sqrt()
        return scaled * self.w[f"{name}.weight"] + self.w[f"{name}.bias"]

    @property
    def heads(self) -> int:
        return self.config["num_attention_heads"]


def load(folder: Path) -> Plain:
    return Plain(json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors"))


def run_nucleotide(model: Plain, tokens: Tokens) -> dict[str, Tensor]:
    """ESM-2 with SiLU-gated feed-forward layers without biases, and an untied head."""
    x = model.w["esm.embeddings.word_embeddings.weight"][torch.from_numpy(tokens.ids)]
    found = {"layer 0": x}
    for i in range(model.config["num_hidden_layers"]):
        layer = f"esm.encoder.layer.{i}"
        h = model.norm(f"{layer}.attention.LayerNorm", x)
        q, k, v = (model.linear(f"{layer}.attention.self.{name}", h) for name in ("query", "key", "value"))
        rows = []
        for qe, ke, ve in zip(*(t.chunk(model.heads, dim=1) for t in (q, k, v)), strict=True):
            scores = turn(qe) @ turn(ke).T / math.sqrt(qe.shape[1])
            rows.append(scores.softmax(-1) @ ve)
        x = x + model.linear(f"{layer}.attention.output.dense", torch.cat(rows, dim=1))
        gate, value = model.linear(f"{layer}.intermediate.dense", model.norm(f"{layer}.LayerNorm", x)).chunk(2, dim=1)
        x = x + model.linear(f"{layer}.output.dense", gate * gate.sigmoid() * value)
        found[f"layer {i + 1}"] = x
    x = model.norm("esm.encoder.emb_layer_norm_after", x)
    found[f"layer {model.config['num_hidden_layers']}"] = x
    h = model.norm("lm_head.layer_norm", F.gelu(model.linear("lm_head.dense", x)))
    found["logits"] = h @ model.w["lm_head.decoder.weight"].T + model.w["lm_head.bias"]
    return found


def turn(x: Tensor) -> Tensor:
    """Rotate pairs (feature j, feature j + half) of the row at place p by p / 10000^(2 j / width)."""
    half = x.shape[1] // 2
    out = x.clone()
    for place in range(len(x)):
        for j in range(half):
            angle = place / 10000 ** (2 * j / x.shape[1])
            a, b = x[place, j], x[place, j + half]
            out[place, j] = a * math.cos(angle) - b * math.sin(angle)
            out[place, j + half] = b * math.cos(angle) + a * math.sin(angle)
    return out


def run_dnabert2(model: Plain, tokens: Tokens) -> dict[str, Tensor]:
    """BERT without positions, with slopes of distance, and feed-forward layers gated by GELU."""
    ids = torch.from_numpy(tokens.ids)
    types = torch.zeros_like(ids) if tokens.token_types is None else torch.from_numpy(tokens.token_types)
    x = model.w["bert.embeddings.word_embeddings.weight"][ids]
    x = model.norm("bert.embeddings.LayerNorm", x + model.w["bert.embeddings.token_type_embeddings.weight"][types])
    found = {"layer 0": x}
    places = torch.arange(len(ids))
    distance = (places[:, None] - places[None]).abs()
    for i in range(model.config["num_hidden_layers"]):
        layer = f"bert.encoder.layer.{i}"
        q, k, v = model.linear(f"{layer}.attention.self.Wqkv", x).chunk(3, dim=1)
        rows = []
        for head, (qe, ke, ve) in enumerate(zip(*(t.chunk(model.heads, dim=1) for t in (q, k, v)), strict=True)):
            scores = qe @ ke.T / math.sqrt(qe.shape[1]) - slopes(model.heads)[head] * distance
            rows.append(scores.softmax(-1) @ ve)
        out = model.linear(f"{layer}.attention.output.dense", torch.cat(rows, dim=1))
        x = model.norm(f"{layer}.attention.output.LayerNorm", x + out)
        gate, value = model.linear(f"{layer}.mlp.gated_layers", x).chunk(2, dim=1)
        x = model.norm(f"{layer}.mlp.layernorm", x + model.linear(f"{layer}.mlp.wo", F.gelu(gate) * value))
        found[f"layer {i + 1}"] = x
    h = F.gelu(model.linear("cls.predictions.transform.dense", x))
    h = model.norm("cls.predictions.transform.LayerNorm", h)
    table, bias = model.w["bert.embeddings.word_embeddings.weight"], model.w["cls.predictions.decoder.bias"]
    found["logits"] = h @ table.T + bias
    return found


def slopes(heads: int) -> list[float]:
    """2^(-8 k / n) for a power of two; otherwise those of the power below, then every second one of the next."""
    if heads & (heads - 1) == 0:
        return [2 ** (-8 * (k + 1) / heads) for k in range(heads)]
    below = 2 ** int(math.log2(heads))
    return slopes(below) + slopes(2 * below)[0::2][: heads - below]


def theirs(run: Any) -> Any:
    """A runner's function: each sequence by itself."""

    def all_of(reference: Plain, sequences: Sequence[Tokens]) -> Results:
        each = [run(reference, tokens) for tokens in sequences]
        return {name: [found[name] for found in each] for name in each[0]}

    return all_of


def write(
    folder: Path, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], rng: np.random.Generator
) -> Path:
    """A directory with tensors of these shapes, all drawn: norms about 1, queries and keys large."""
    tensors = {}
    for name, shape in shapes.items():
        draw = torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))
        if name.endswith("inv_freq"):
            tensors[name] = torch.tensor([10000 ** (-j / shape[0]) for j in range(shape[0])])
        elif len(shape) == 1:
            is_norm = name.endswith("weight")
            tensors[name] = 1 + 0.3 * draw if is_norm else 0.3 * draw
        else:
            # queries and keys are large, so that attention is sharp
            gain = 2.0 if any(part in name for part in ("query", "key", "Wqkv", "embeddings")) else 1.0
            tensors[name] = gain * draw / shape[1] ** 0.5
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _maps(names: Mapping[str, tuple[int, int]], has_bias: bool = True) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    for name, shape in names.items():
        found[f"{name}.weight"] = shape
        if has_bias:
            found[f"{name}.bias"] = shape[:1]
    return found


def _norms(width: int, *names: str) -> dict[str, tuple[int, ...]]:
    return {f"{name}.{kind}": (width,) for name in names for kind in ("weight", "bias")}


def nucleotide_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes of the published tensors by name."""
    width, hidden, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    shapes: dict[str, tuple[int, ...]] = {"esm.embeddings.word_embeddings.weight": (vocab, width)}
    for i in range(config["num_hidden_layers"]):
        layer = f"esm.encoder.layer.{i}"
        names = [f"{layer}.attention.self.{name}" for name in ("query", "key", "value")]
        shapes |= _maps(dict.fromkeys([*names, f"{layer}.attention.output.dense"], (width, width)))
        half = width // config["num_attention_heads"] // 2
        shapes[f"{layer}.attention.self.rotary_embeddings.inv_freq"] = (half,)
        shapes |= _norms(width, f"{layer}.attention.LayerNorm", f"{layer}.LayerNorm")
        feedforward = {f"{layer}.intermediate.dense": (2 * hidden, width), f"{layer}.output.dense": (width, hidden)}
        shapes |= _maps(feedforward, config["add_bias_fnn"])
    shapes |= _norms(width, "esm.encoder.emb_layer_norm_after", "lm_head.layer_norm")
    shapes |= _maps({"lm_head.dense": (width, width)})
    channels = config["num_hidden_layers"] * config["num_attention_heads"]
    shapes |= _maps({"esm.contact_head.regression": (1, channels)})
    return {**shapes, "lm_head.decoder.weight": (vocab, width), "lm_head.bias": (vocab,)}


def dnabert2_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes of the published tensors by name."""
    width, hidden, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "bert.embeddings.word_embeddings.weight": (vocab, width),
        "bert.embeddings.token_type_embeddings.weight": (config["type_vocab_size"], width),
    }
    shapes |= _norms(width, "bert.embeddings.LayerNorm", "cls.predictions.transform.LayerNorm")
    for i in range(config["num_hidden_layers"]):
        layer = f"bert.encoder.layer.{i}"
        shapes |= _maps({f"{layer}.attention.self.Wqkv": (3 * width, width)})
        shapes |= _maps({f"{layer}.attention.output.dense": (width, width), f"{layer}.mlp.wo": (width, hidden)})
        shapes |= _maps({f"{layer}.mlp.gated_layers": (2 * hidden, width)}, has_bias=False)
        shapes |= _norms(width, f"{layer}.attention.output.LayerNorm", f"{layer}.mlp.layernorm")
    return {**shapes, **_maps({"cls.predictions.transform.dense": (width, width)}),
            "cls.predictions.decoder.bias": (vocab,)}  # fmt: skip
