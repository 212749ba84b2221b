"""Which likelihood a model has is known by what its tokens see; a model without one is refused."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from small_scored import KINDS, draw_model, draw_tokenizer, small_config

from meristem.errors import ConfigError
from meristem.model.config import Attention, BlockSparse, Causal, Embedding, LayerRule, TransformerConfig
from meristem.model.model import Model
from meristem.scoring.likelihood import kind_of
from meristem_domains.vision.patches import PatchTokenizer
from model_runs import specs


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("repeat", range(3))
def test_the_kind_is_that_of_what_tokens_see(kind: str, repeat: int, rng: np.random.Generator) -> None:
    """Also where the alphabet of a causal model has a mask symbol, as this one has."""
    tokenizer = draw_tokenizer(rng)
    assert kind_of(draw_model(kind, tokenizer, rng), tokenizer) == kind


TWO_SIDED = LayerRule(start=1, attention=Attention(num_heads=2))
SPARSE = Attention(num_heads=2, pattern=Causal() & BlockSparse(block=4))


@pytest.mark.parametrize(
    ("config", "heads", "changes", "message"),
    [
        (small_config(head=None), (), {}, "predicts symbols; this one has no such head"),
        (small_config(), ("tokens",), {"mask": ""}, "needs a mask symbol"),
        (small_config(num_decoder_layers=1, layers=(TWO_SIDED,)), ("tokens",), {}, "do not see those behind them"),
        (small_config(attention=SPARSE), ("tokens",), {}, "random blocks of BlockSparse"),
    ],
)
def test_a_model_without_a_likelihood_is_refused(
    config: TransformerConfig, heads: tuple[str, ...], changes: dict[str, Any], message: str, rng: np.random.Generator
) -> None:
    tokenizer = replace(draw_tokenizer(rng), **changes)
    with pytest.raises(ConfigError, match=message):
        kind_of(Model(config, specs(heads)), tokenizer)


def test_pictures_have_no_likelihood() -> None:
    tokenizer = PatchTokenizer(image_px=(8, 8), patch_px=4)
    config = small_config(embedding=Embedding(vocab_size=1, patch_features=48), head=None)
    with pytest.raises(ConfigError, match="reads patches"):
        kind_of(Model(config), tokenizer)
