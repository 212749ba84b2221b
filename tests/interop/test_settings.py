"""Settings of foreign configs: one rule reads a field of ours and writes it back."""

from functools import partial
from typing import Any

import pytest

from meristem.errors import ConfigError
from meristem.interop.settings import IS_TIED, SHAPE, Field, Settings, activation, write_fields
from meristem.model.config import FeedForward, Learned, LinearBias, RMSNorm, TokenHead

FIELDS = (
    *SHAPE,
    Field("drop", ("residual.dropout", "feedforward.dropout"), 0.25),
    Field("longest", "position.max_positions", 99, absent=7),
    activation("act", "relu"),
    Field("eps", "norm.eps", 1e-3),
    IS_TIED,
)
CONFIG: dict[str, Any] = {
    "vocab_size": 31,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "act": "gelu_new",
    "longest": 17,
}


def test_a_setting_gives_every_field_that_it_names_and_is_written_back() -> None:
    found = Settings("a test", {**CONFIG, "drop": 0.5, "tie_word_embeddings": False}, FIELDS)
    built = found.build(position=Learned, norm=RMSNorm, feedforward=partial(FeedForward, is_gated=True))
    assert (built.width, built.num_layers, built.embedding.vocab_size, built.attention.num_heads) == (24, 3, 31, 4)
    assert (built.residual.dropout, built.feedforward.dropout, built.attention.dropout) == (0.5, 0.5, 0.0)
    assert (built.feedforward.width, built.feedforward.is_gated, built.feedforward.activation) == (
        40,
        True,
        "gelu_tanh",
    )
    assert (built.position, built.norm) == (Learned(max_positions=17), RMSNorm(eps=1e-3))
    assert built.head == TokenHead(is_tied=False)
    written = write_fields(built, FIELDS)
    assert written == {**CONFIG, "act": "gelu_pytorch_tanh", "drop": 0.5, "eps": 1e-3, "tie_word_embeddings": False}
    # the preferred of several spellings is written, and means the same
    again = Settings("a test", written, FIELDS)
    assert again.build(position=Learned, norm=RMSNorm, feedforward=partial(FeedForward, is_gated=True)) == built


def test_a_part_that_is_given_whole_takes_no_settings_and_is_written_as_absent() -> None:
    built = Settings("a test", CONFIG, FIELDS).build(position=LinearBias(), head=None)
    assert (built.position, built.head, built.residual.dropout) == (LinearBias(), None, 0.25)
    written = write_fields(built, FIELDS)
    assert (written["longest"], written["tie_word_embeddings"]) == (7, True)


def test_defaults_of_a_kind_go_before_those_of_a_field_and_aliases_before_both() -> None:
    found = Settings("a test", CONFIG, FIELDS, {"drop": 0.125, "eps": 0.5}, {"epsilon": "eps"})
    assert (found["drop"], found["eps"]) == (0.125, 0.5)
    found = Settings("a test", {**CONFIG, "epsilon": 0.0625}, FIELDS, {"eps": 0.5}, {"epsilon": "eps"})
    assert found["eps"] == 0.0625


@pytest.mark.parametrize(
    ("config", "match"),
    [
        (
            {name: value for name, value in CONFIG.items() if name != "hidden_size"},
            "a test config must have hidden_size",
        ),
        ({**CONFIG, "act": "sigmoid"}, "act must be one of gelu, .* in a test config; got 'sigmoid'"),
        ({**CONFIG, "act": ["relu"]}, "act must be one of"),
        ({**CONFIG, "drop": 1.5}, "dropout must be in"),
    ],
)
def test_a_setting_that_is_missing_or_wrong_is_named(config: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        Settings("a test", config, FIELDS).build(position=Learned)
