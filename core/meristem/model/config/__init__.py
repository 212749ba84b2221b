"""`TransformerConfig` and its parts: a family of models is a value of it, not a class.

Variation is a part, not a flag. Parts that come in kinds (a position, a norm, a pattern) are subclasses of
one base; every other part is one dataclass. All are frozen and keyword-only, and check themselves when made.
"""

from meristem.model.config.heads import AttentionPool, Max, Mean, Pool, Prefix, TokenHead
from meristem.model.config.layer import (
    Activation,
    Attention,
    Experts,
    FeedForward,
    LayerNorm,
    LayerRule,
    NoNorm,
    Norm,
    Residual,
    RMSNorm,
)
from meristem.model.config.pattern import (
    BlockSparse,
    Both,
    Causal,
    Dilated,
    Either,
    Full,
    GlobalTokens,
    InPrefix,
    Pattern,
    Window,
    sees_the_future,
)
from meristem.model.config.position import (
    BandScaling,
    BucketBias,
    Learned,
    LinearBias,
    LinearScaling,
    NoPosition,
    NoScaling,
    Position,
    Rotary,
    Rounding,
    Scaling,
    SinCos2D,
    Sinusoidal,
)
from meristem.model.config.transformer import Embedding, Init, LayerParts, TransformerConfig
