"""What the names of timm's vision transformers stand for, where neither a config nor the shape of a tensor says it.

Facts of timm 1.0.31; a test compares every one of them with the models that timm builds.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from meristem.model.config import Activation

Value = TypeVar("Value")


@dataclass(frozen=True)
class Named:
    """What a name alone says.

    Attributes:
        num_heads: of attention, in the trunk and in an attention pool.
        activation: of feed-forward layers.
        eps: of every norm.
        is_gated: feed-forward layers are gated, by the first half of their packed map.
        is_distilled: there is a distillation token, and a classifier on it.
    """

    num_heads: int
    activation: Activation
    eps: float
    is_gated: bool
    is_distilled: bool


BY_HEADS = {
    2: """
        test_vit test_vit2
    """,
    3: """
        deit_tiny_distilled_patch16_224 deit_tiny_patch16_224 vit_tiny_patch16_224 vit_tiny_patch16_384
    """,
    4: """
        vit_wee_patch16_reg1_gap_256 vit_xsmall_patch16_clip_224
    """,
    5: """
        vit_little_patch16_reg1_gap_256 vit_little_patch16_reg4_gap_256
    """,
    6: """
        deit3_small_patch16_224 deit3_small_patch16_384 deit_small_distilled_patch16_224
        deit_small_patch16_224 flexivit_small vit_small_patch14_dinov2 vit_small_patch14_reg4_dinov2
        vit_small_patch16_224 vit_small_patch16_36x1_224 vit_small_patch16_384 vit_small_patch32_224
        vit_small_patch32_384 vit_small_patch8_224
    """,
    8: """
        deit3_medium_patch16_224 vit_medium_patch16_clip_224 vit_medium_patch16_gap_240
        vit_medium_patch16_gap_256 vit_medium_patch16_gap_384 vit_medium_patch16_reg1_gap_256
        vit_medium_patch16_reg4_gap_256 vit_medium_patch32_clip_224 vit_mediumd_patch16_reg4_gap_256
        vit_mediumd_patch16_reg4_gap_384
    """,
    10: """
        vit_betwixt_patch16_gap_256 vit_betwixt_patch16_reg1_gap_256 vit_betwixt_patch16_reg4_gap_256
        vit_betwixt_patch16_reg4_gap_384 vit_betwixt_patch32_clip_224
    """,
    12: """
        deit3_base_patch16_224 deit3_base_patch16_384 deit_base_distilled_patch16_224
        deit_base_distilled_patch16_384 deit_base_patch16_224 deit_base_patch16_384 flexivit_base
        vit_base_patch14_dinov2 vit_base_patch14_reg1_tipsv2 vit_base_patch14_reg4_dinov2 vit_base_patch16_224
        vit_base_patch16_224_miil vit_base_patch16_384 vit_base_patch16_clip_224 vit_base_patch16_clip_384
        vit_base_patch16_clip_quickgelu_224 vit_base_patch16_radio_v3 vit_base_patch16_reg4_gap_256
        vit_base_patch16_siglip_224 vit_base_patch16_siglip_256 vit_base_patch16_siglip_384
        vit_base_patch16_siglip_512 vit_base_patch16_siglip_gap_224 vit_base_patch16_siglip_gap_256
        vit_base_patch16_siglip_gap_384 vit_base_patch16_siglip_gap_512 vit_base_patch32_224
        vit_base_patch32_384 vit_base_patch32_clip_224 vit_base_patch32_clip_256 vit_base_patch32_clip_384
        vit_base_patch32_clip_448 vit_base_patch32_clip_quickgelu_224 vit_base_patch32_siglip_256
        vit_base_patch32_siglip_gap_256 vit_base_patch8_224
    """,
    13: """
        vit_so150m2_patch16_reg1_gap_256 vit_so150m2_patch16_reg1_gap_384 vit_so150m2_patch16_reg1_gap_448
    """,
    14: """
        vit_base_patch16_plus_240 vit_base_patch16_plus_clip_240 vit_base_patch32_plus_256
        vit_so150m_patch16_reg4_gap_256 vit_so150m_patch16_reg4_gap_384 vit_so150m_patch16_reg4_map_256
    """,
    16: """
        deit3_huge_patch14_224 deit3_large_patch16_224 deit3_large_patch16_384 eva_large_patch14_196
        eva_large_patch14_336 flexivit_large vit_base_patch16_gap_224 vit_giant_patch14_224
        vit_giant_patch14_clip_224 vit_giant_patch16_gap_224 vit_giantopt_patch16_siglip_256
        vit_giantopt_patch16_siglip_384 vit_giantopt_patch16_siglip_gap_256
        vit_giantopt_patch16_siglip_gap_384 vit_gigantic_patch14_224 vit_gigantic_patch14_clip_224
        vit_gigantic_patch14_clip_378 vit_gigantic_patch14_clip_quickgelu_224 vit_huge_patch14_224
        vit_huge_patch14_clip_224 vit_huge_patch14_clip_336 vit_huge_patch14_clip_378
        vit_huge_patch14_clip_quickgelu_224 vit_huge_patch14_clip_quickgelu_378 vit_huge_patch14_gap_224
        vit_huge_patch16_gap_448 vit_huge_patch16_radio_v3 vit_huge_patch16_radio_v4
        vit_intern300m_patch14_448 vit_large_patch14_224 vit_large_patch14_clip_224 vit_large_patch14_clip_336
        vit_large_patch14_clip_quickgelu_224 vit_large_patch14_clip_quickgelu_336 vit_large_patch14_dinov2
        vit_large_patch14_reg1_tipsv2 vit_large_patch14_reg4_dinov2 vit_large_patch16_224
        vit_large_patch16_384 vit_large_patch16_radio_v3 vit_large_patch16_siglip_256
        vit_large_patch16_siglip_384 vit_large_patch16_siglip_512 vit_large_patch16_siglip_gap_256
        vit_large_patch16_siglip_gap_384 vit_large_patch16_siglip_gap_512 vit_large_patch32_224
        vit_large_patch32_384 vit_so400m_patch14_reg1_tipsv2 vit_so400m_patch14_siglip_224
        vit_so400m_patch14_siglip_378 vit_so400m_patch14_siglip_384 vit_so400m_patch14_siglip_gap_224
        vit_so400m_patch14_siglip_gap_378 vit_so400m_patch14_siglip_gap_384 vit_so400m_patch14_siglip_gap_448
        vit_so400m_patch14_siglip_gap_896 vit_so400m_patch16_radio_v4 vit_so400m_patch16_siglip_256
        vit_so400m_patch16_siglip_384 vit_so400m_patch16_siglip_512 vit_so400m_patch16_siglip_gap_256
        vit_so400m_patch16_siglip_gap_384 vit_so400m_patch16_siglip_gap_512
    """,
    24: """
        vit_giant_patch14_dinov2 vit_giant_patch14_reg1_tipsv2 vit_giant_patch14_reg4_dinov2
        vit_giant_patch16_radio_v3
    """,
}
"""Architectures by their number of heads: plain pre-norm blocks with LayerNorm, all that are supported."""

BY_ACTIVATION: Mapping[Activation, str] = {
    "gelu_tanh": """
        vit_base_patch32_siglip_256 vit_base_patch32_siglip_gap_256 vit_giantopt_patch16_siglip_256
        vit_giantopt_patch16_siglip_384 vit_giantopt_patch16_siglip_gap_256
        vit_giantopt_patch16_siglip_gap_384 vit_large_patch16_siglip_512 vit_large_patch16_siglip_gap_512
        vit_so400m_patch16_siglip_256 vit_so400m_patch16_siglip_384 vit_so400m_patch16_siglip_512
        vit_so400m_patch16_siglip_gap_256 vit_so400m_patch16_siglip_gap_384 vit_so400m_patch16_siglip_gap_512
    """,
    "quick_gelu": """
        vit_base_patch16_clip_quickgelu_224 vit_base_patch32_clip_quickgelu_224
        vit_gigantic_patch14_clip_quickgelu_224 vit_huge_patch14_clip_quickgelu_224
        vit_huge_patch14_clip_quickgelu_378 vit_large_patch14_clip_quickgelu_224
        vit_large_patch14_clip_quickgelu_336
    """,
    "silu": """
        vit_giant_patch14_dinov2 vit_giant_patch14_reg1_tipsv2 vit_giant_patch14_reg4_dinov2
    """,
}
"""Those whose activation is not GELU."""

GATED = BY_ACTIVATION["silu"].split()
DISTILLED = (
    "deit_base_distilled_patch16_224",
    "deit_base_distilled_patch16_384",
    "deit_small_distilled_patch16_224",
    "deit_tiny_distilled_patch16_224",
)

BY_EPS = {
    1e-5: """
        vit_base_patch16_clip_224 vit_base_patch16_clip_384 vit_base_patch16_clip_quickgelu_224
        vit_base_patch16_plus_clip_240 vit_base_patch32_clip_224 vit_base_patch32_clip_256
        vit_base_patch32_clip_384 vit_base_patch32_clip_448 vit_base_patch32_clip_quickgelu_224
        vit_betwixt_patch32_clip_224 vit_giant_patch14_clip_224 vit_gigantic_patch14_clip_224
        vit_gigantic_patch14_clip_378 vit_gigantic_patch14_clip_quickgelu_224 vit_huge_patch14_clip_224
        vit_huge_patch14_clip_336 vit_huge_patch14_clip_378 vit_huge_patch14_clip_quickgelu_224
        vit_huge_patch14_clip_quickgelu_378 vit_large_patch14_clip_224 vit_large_patch14_clip_336
        vit_large_patch14_clip_quickgelu_224 vit_large_patch14_clip_quickgelu_336 vit_medium_patch16_clip_224
        vit_medium_patch32_clip_224 vit_xsmall_patch16_clip_224
    """,
}
"""Those whose norms do not have an eps of 1e-6."""


def _spread(groups: Mapping[Value, str]) -> dict[str, Value]:
    """Value by name, of names by value."""
    return {name: value for value, names in groups.items() for name in names.split()}


_ACTIVATION_OF, _EPS_OF = _spread(BY_ACTIVATION), _spread(BY_EPS)

ARCHITECTURES: Mapping[str, Named] = {
    name: Named(
        num_heads=heads,
        activation=_ACTIVATION_OF.get(name, "gelu"),
        eps=_EPS_OF.get(name, 1e-6),
        is_gated=name in GATED,
        is_distilled=name in DISTILLED,
    )
    for name, heads in _spread(BY_HEADS).items()
}
"""What each name stands for."""
