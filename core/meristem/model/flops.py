"""How much arithmetic a forward pass takes."""

from meristem.model.config import LayerParts, TransformerConfig, sees_the_future
from meristem.model.config.pattern import Window


def flops_per_token(config: TransformerConfig, length: int) -> int:
    """Floating-point operations of a forward pass for one token: trunk and symbol head.

    A product of matrices counts two operations an element; norms, activations, biases and routers are left out. A
    backward pass takes twice as many. Experts count as many as a token is sent to.

    Args:
        length: tokens of the sequence that the token stands in; of an encoder-decoder, of both sides.
    """
    products = sum(_layer_products(config.layer(layer), length) for layer in range(config.total_layers))
    products += config.embedding.patch_features * config.width
    if config.head is not None:
        dense = config.width * config.width if config.head.activation is not None else 0
        products += dense + config.width * config.embedding.vocab_size
    return round(2 * products)


def _layer_products(parts: LayerParts, length: int) -> float:
    width, attention = parts.width, parts.attention
    query_width, key_width = attention.num_heads * parts.head_width, attention.kv_heads * parts.head_width
    maps = width * (query_width + 2 * key_width) + query_width * width
    pattern = attention.pattern
    # patterns beside windows and causal ones count as full
    num_seen: float = length if sees_the_future(pattern) else (length + 1) / 2
    if isinstance(pattern, Window):
        num_seen = min(length, pattern.left + 1 + pattern.right)
    products = maps + 2 * query_width * num_seen
    if parts.has_source:
        products += maps + 2 * query_width * length
    num_active = 1 if parts.experts is None else parts.experts.top_k + parts.experts.num_shared
    return products + num_active * (3 if parts.feedforward.is_gated else 2) * width * parts.feedforward.width


def num_idle_parameters(config: TransformerConfig) -> int:
    """Parameters of the experts that a token is not sent to."""
    num_idle = 0
    for parts in map(config.layer, range(config.total_layers)):
        if parts.experts is not None:
            part = parts.feedforward
            maps_in = 2 if part.is_gated else 1
            biases = maps_in * part.width * part.in_bias + parts.width * part.out_bias
            one = (maps_in + 1) * part.width * parts.width + biases
            num_idle += (parts.experts.count - parts.experts.top_k) * one
    return num_idle
