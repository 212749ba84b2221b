"""Models of other libraries at random weights, every parameter redrawn, saved as those libraries save them.

At initial values biases are 0 and norms 1, so a dropped bias or a swapped norm would pass, and attention is flat, so
that a wrong rotation would hardly show.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import nn

from meristem.data.tokenizer import Tokenizer
from meristem.types import TokenColumn, Tokens

SHARP = r"(^|[._])(query|key|q|k|q_proj|k_proj|qkv|qkv_proj|Wqkv|c_attn|layernorm_qkv)\.?\d*\.weight$"
"""Names of maps to queries and keys."""


def redraw(model: nn.Module, rng: np.random.Generator, sharp: float = 2.0, symbols: float = 4.0) -> Any:
    """Draw every parameter anew; the model comes back in evaluation mode.

    Args:
        sharp: factor of the maps to queries and keys, so that attention is far from flat. Where a family does not
            divide scores by sqrt(head width), it must be smaller by its fourth root.
        symbols: norm of a row of an embedding table: with a tied head, about the size of logits.
    """
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    done: set[int] = set()
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in done:
                continue
            done.add(id(parameter))
            draw = torch.from_numpy(rng.standard_normal(parameter.shape, dtype=np.float32))
            full = f"{prefix}.{name}"
            if id(parameter) in tables:
                draw *= symbols / parameter.shape[1] ** 0.5
            elif parameter.ndim == 1:
                draw = 0.3 * draw if "bias" in name else 1 + 0.3 * draw  # norms and layer scales
            elif parameter.ndim >= 2 and isinstance(module, (nn.Linear, nn.Conv2d)):
                draw /= parameter[0].numel() ** 0.5
            elif type(module).__name__ == "Conv1D":  # [in, out]
                draw /= parameter.shape[0] ** 0.5
            elif parameter.ndim == 3 and parameter.shape[0] == 1:  # class tokens, registers, tables of positions
                draw *= 0.5
            else:
                draw /= parameter.shape[-1] ** 0.5
            if re.search(SHARP, full):
                draw *= sharp
            parameter.data = draw.to(parameter.dtype)
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    return model.eval()


def save(model: Any, folder: Path, files: Mapping[str, str] | None = None, **options: Any) -> Path:
    """As `save_pretrained` writes it, with files of a tokenizer beside it."""
    model.save_pretrained(folder, **options)
    for name, text in (files or {}).items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


@dataclass(frozen=True)
class PlainIds(Tokenizer):
    """Stands in for a tokenizer where a test is about numbers alone: payloads are drawn as ids.

    Attributes:
        size: of the vocabulary.
        prefix: ids before every payload.
        suffix: ids behind it.
        reserved: further ids that a payload never holds, such as padding.
        mask_id: that hides a token.
    """

    size: int
    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()
    reserved: tuple[int, ...] = ()
    mask_id: int | None = None  # type: ignore[misc]
    kind = "plain ids"

    @property
    def vocab(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(f"<{i}>" for i in range(self.size))

    @property
    def num_special(self) -> tuple[int, int]:
        return len(self.prefix), len(self.suffix)

    @property
    def random_ids(self) -> np.ndarray:
        kept = {*self.prefix, *self.suffix, *self.reserved, self.mask_id}
        return np.array([i for i in range(self.size) if i not in kept])

    def encode(self, payload: Any) -> Tokens:
        assert not payload, "payloads of plain ids are drawn, not read"
        ids = np.array([*self.prefix, *self.suffix], np.int64)
        return Tokens(positions=np.arange(len(ids))[:, None], ids=ids, is_special=np.ones(len(ids), bool))

    def encode_column(self, payloads: pa.Array) -> TokenColumn:
        raise NotImplementedError

    def tokens_at(self, column: TokenColumn, row: int) -> Tokens:
        raise NotImplementedError

    def decode(self, tokens: Tokens) -> Any:
        raise NotImplementedError

    def to_json(self) -> dict[str, Any]:
        return {"size": self.size}
