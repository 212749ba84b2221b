"""The decoder that benchmarks of training and of generation share, with its peers."""

from meristem.model.config import (
    Attention,
    Causal,
    Embedding,
    FeedForward,
    Init,
    LayerNorm,
    Learned,
    TokenHead,
    TransformerConfig,
)


def gpt2(
    width: int,
    layers: int,
    heads: int,
    vocab_size: int,
    context: int,
    init: Init = Init(),  # noqa: B008 (frozen)
) -> TransformerConfig:
    """As GPT-2 has it, without dropout.

    Args:
        context: tokens that positions are learned for.
        init: first weights, where none are copied in.
    """
    return TransformerConfig(
        width=width,
        num_layers=layers,
        embedding=Embedding(vocab_size=vocab_size),
        position=Learned(max_positions=context),
        attention=Attention(num_heads=heads, pattern=Causal()),
        feedforward=FeedForward(width=4 * width, activation="gelu_tanh"),
        norm=LayerNorm(eps=1e-5),
        head=TokenHead(activation=None, bias=False),
        init=init,
    )
