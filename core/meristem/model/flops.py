"""How much arithmetic a forward pass takes."""

from meristem.model.config import Causal, TransformerConfig


def flops_per_token(config: TransformerConfig, length: int) -> int:
    """Floating-point operations of a forward pass for one token: trunk and symbol head.

    A product of matrices counts two operations an element; norms, activations and biases are left out. A backward
    pass takes twice as many.

    Args:
        length: tokens of the sequence that the token stands in.
    """
    width, attention = config.width, config.attention
    query_width, key_width = attention.num_heads * config.head_width, config.num_kv_heads * config.head_width
    num_seen = (length + 1) / 2 if isinstance(attention.pattern, Causal) else length
    maps_in = 2 if config.feedforward.is_gated else 1
    products = (
        width * (query_width + 2 * key_width)
        + query_width * width
        + 2 * query_width * num_seen
        + (maps_in + 1) * width * config.feedforward.width
    ) * config.num_layers
    products += config.embedding.patch_features * width
    if config.head is not None:
        products += width * width + width * config.embedding.vocab_size
    return round(2 * products)
