"""Rows of key tables for parts that nearly every model has: blocks and the symbol head."""

from meristem.interop.table import HEADS, Rename, Row, joined

BLOCK = "trunk.blocks.{}"

PARTS = {
    "attention_norm": "attention_norm",
    "qkv": "attention.qkv",
    "q_norm": "attention.q_norm",
    "k_norm": "attention.k_norm",
    "out": "attention.out",
    "attention_scale": "attention_scale",
    "feedforward_norm": "feedforward_norm",
    "up": "feedforward.up",
    "down": "feedforward.down",
    "feedforward_scale": "feedforward_scale",
}
"""Parts of a block of ours, by their short names."""


def block_rows(layer: str, own: str = BLOCK, **modules: str | tuple[str, ...]) -> tuple[Row, ...]:
    """Rows for the parts of a block: `block_rows("h.{}", attention_norm="ln_1", up="mlp.fc")`.

    Args:
        layer: foreign name of a layer, `{}` for its number.
        own: our name of a block.
        modules: foreign modules within the layer, by the short names of `PARTS`. Several lie one after the other in
            one of ours: queries, keys and values in `qkv`, gate and value in `up`.
    """
    rows = []
    for part, names in modules.items():
        name = f"{own}.{PARTS[part]}"
        if isinstance(names, str):
            rows.append(Rename(name, f"{layer}.{names}"))
        else:
            via = HEADS if part == "qkv" else joined(len(names))
            rows.append(Row(name, tuple(f"{layer}.{module}" for module in names), via))
    return tuple(rows)


def head_rows(**modules: str) -> tuple[Row, ...]:
    """Rows for the symbol head: `head_rows(dense="lm_head.dense", out="lm_head.decoder", bias="lm_head.bias")`."""
    return tuple(Rename(f"heads.tokens.{part}", module) for part, module in modules.items())


def lm_head_rows(bias: str) -> tuple[Row, ...]:
    """Rows for a symbol head whose modules are named as those of RoBERTa.

    Args:
        bias: name of the tensor that holds one bias for each symbol.
    """
    return head_rows(dense="lm_head.dense", norm="lm_head.layer_norm", out="lm_head.decoder", bias=bias)
