"""Architectures of vision transformers, by name.

ViT: Dosovitskiy 2021 (arXiv 2010.11929), tiny and small as in Touvron 2021 (arXiv 2012.12877), for pictures of 224
pixels in patches of 16. The others are for small pictures, can be trained on a CPU, and use the mean of the patches as
the vector of a picture. For pictures of another size, the table of positions is resized to their grid.
"""

from meristem.model import config as arch


def vit(
    width: int,
    num_layers: int,
    num_heads: int,
    image_px: int = 224,
    patch_px: int = 16,
    num_channels: int = 3,
    pool: arch.Pool | None = None,
) -> arch.TransformerConfig:
    """A ViT of any size: pre-norm, a class token, a learned table of positions, exact GELU, biases everywhere.

    Args:
        pool: how the vector of a picture is computed; None for the class token.
    """
    side = image_px // patch_px
    return arch.TransformerConfig(
        width=width,
        num_layers=num_layers,
        embedding=arch.Embedding(vocab_size=1, patch_features=num_channels * patch_px**2),
        position=arch.Learned(max_positions=side**2, grid=(side, side)),
        attention=arch.Attention(num_heads=num_heads),
        feedforward=arch.FeedForward(width=4 * width),
        norm=arch.LayerNorm(eps=1e-6),
        pool=pool or arch.Prefix(),
    )


PRESETS = {
    "vit_tiny": vit(192, 12, 3),
    "vit_small": vit(384, 12, 6),
    "vit_base": vit(768, 12, 12),
    "vit_digits": vit(96, 4, 4, image_px=8, patch_px=2, num_channels=1, pool=arch.Mean()),
    "vit_mnist": vit(96, 6, 4, image_px=28, patch_px=4, num_channels=1, pool=arch.Mean()),
    "vit_cifar": vit(192, 6, 3, image_px=32, patch_px=4, pool=arch.Mean()),
}
