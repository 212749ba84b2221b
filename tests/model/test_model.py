"""One way to run a model: what is asked for comes back, and heads share what they share in every copy of it."""

import copy
from dataclasses import is_dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from packs import VOCAB, config, random_pack

from meristem.errors import ConfigError
from meristem.inference.trunks import runnable_trunk, with_runnable_heads
from meristem.model.config import AttentionPool, Embedding, Prefix, TokenHead, TransformerConfig
from meristem.model.heads import Readout
from meristem.model.heads.symbols import SymbolHead
from meristem.model.model import SYMBOLS, Model
from meristem.model.outputs import HeadRequest, Wanted
from meristem.model.reordered import reordered
from meristem.shapes import Tensor
from meristem.train.ema import MovingAverage
from meristem.types import PackedBatch
from model_runs import outputs_of, specs

OWN = Readout(name="own", classes=("a", "b"), pool=None)


def _config(**parts: object) -> TransformerConfig:
    pool = AttentionPool(num_heads=4, feedforward_width=16)
    return config(embedding=Embedding(vocab_size=VOCAB), head=TokenHead(), pool=pool, **parts)


def _model() -> Model:
    model = Model(_config(), specs((SYMBOLS,), (OWN,)))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def _said(model: Model, batch: PackedBatch) -> tuple[Tensor, Tensor]:
    return outputs_of(model, batch), outputs_of(model, batch, "own")


def _changed(model: Model) -> None:
    """Other values in the two modules that heads share with the rest of the model."""
    with torch.no_grad():
        model.trunk.embedding.symbols.weight.mul_(-1.5)
        model.pool.out.bias.add_(3.0)


COPIES = {
    "deepcopy": copy.deepcopy,
    "moving average": lambda model: MovingAverage(0.5, model, torch.nn.ModuleDict()).model,
    "other weights assigned": lambda model: _assigned(copy.deepcopy(model.state_dict())),
}


def _assigned(tensors: dict[str, Tensor]) -> Model:
    with torch.device("meta"):
        model = Model(_config(), specs((SYMBOLS,), (OWN,)))
    model.load_state_dict(tensors, strict=True, assign=True)
    return model.eval()


@pytest.mark.parametrize("make", COPIES.values(), ids=COPIES)
def test_heads_of_a_copy_share_with_the_copy_and_not_with_the_original(make, rng: np.random.Generator) -> None:
    model, batch = _model(), random_pack(rng, [3, 20, 7])
    before = _said(model, batch)
    other = make(model)
    for own, said in zip(_said(other, batch), before, strict=True):
        assert torch.equal(own, said)
    _changed(other)
    for own, said in zip(_said(model, batch), before, strict=True):
        assert torch.equal(own, said), "the original has changed with its copy"
    _changed(model)
    for own, said in zip(_said(other, batch), _said(model, batch), strict=True):
        assert torch.equal(own, said), "the copy does not follow its own modules"
    assert not any(torch.equal(now, said) for now, said in zip(_said(model, batch), before, strict=True))


def test_a_head_that_kept_the_parameter_itself_would_be_seen(rng: np.random.Generator) -> None:
    """The mutant: a tie to the parameter, which weights that are assigned leave behind."""
    right, stale, batch = _model(), _model(), random_pack(rng, [5, 9])
    head = stale.heads[SYMBOLS]
    assert isinstance(head, SymbolHead)
    head.shared = (SimpleNamespace(weight=head.weight),)
    for model in (right, stale):
        model.load_state_dict(_model().state_dict(), assign=True)
    stale.load_state_dict(right.state_dict(), assign=True)
    assert not torch.equal(outputs_of(right, batch), outputs_of(stale, batch))


def test_the_state_of_a_model_has_each_weight_once() -> None:
    keys = list(_model().state_dict())
    assert len(keys) == len(set(keys))
    assert not [key for key in keys if key.startswith("heads.own.") and "out" not in key]
    assert {key.split(".")[2] for key in keys if key.startswith(f"heads.{SYMBOLS}.")} == {"bias", "dense", "norm"}


def test_reordered_copies_say_the_same(rng: np.random.Generator) -> None:
    model, batch = _model(), random_pack(rng, [3, 20, 7])
    with torch.inference_mode():
        heads = with_runnable_heads(model)
        assert heads.heads["own"].shared == (heads.pool,)
        fast = heads.over(runnable_trunk(model, torch.float32))
        whole = reordered(model, must_round_alike=False) or model
        for other in (fast, whole):
            for own, said in zip(_said(other, batch), _said(model, batch), strict=True):
                torch.testing.assert_close(own, said, atol=1e-5, rtol=1e-5)  # products of other libraries
        half = model.over(runnable_trunk(model, torch.bfloat16))
        # heads stay in fp32 behind rows in bf16
        assert half(batch, Wanted(("own",))).heads["own"].dtype == torch.float32
        assert half.trunk.embedding.symbols.weight.dtype == torch.bfloat16
    assert model.trunk.embedding.symbols.weight.dtype == torch.float32


def test_what_is_asked_for_comes_back_and_nothing_else(rng: np.random.Generator) -> None:
    model, batch = _model(), random_pack(rng, [3, 20, 7])
    rows = torch.from_numpy(rng.permutation(30)[:5])
    targets = torch.from_numpy(rng.integers(0, VOCAB, 5))
    everything = model(batch, Wanted((SYMBOLS, "own"), layers=(0, -1), attentions=(1,), is_pooled=True))
    assert set(everything.heads) == {SYMBOLS, "own"}
    assert set(everything.hidden.layers) == {0, -1}
    assert list(everything.hidden.attentions) == [1]
    assert everything.pooled is not None
    assert everything.pooled.shape == (3, model.config.width)
    plain = model(batch, Wanted())
    assert not plain.heads
    assert plain.pooled is None
    assert not plain.hidden.layers
    some = model(batch, Wanted({SYMBOLS: HeadRequest(rows)})).heads[SYMBOLS]
    torch.testing.assert_close(some, everything.heads[SYMBOLS][rows], atol=1e-5, rtol=1e-5)
    asked = model(batch, Wanted({SYMBOLS: HeadRequest(rows, targets)}))
    assert set(asked.heads) == {SYMBOLS}
    loss = torch.nn.functional.cross_entropy(some, targets, reduction="sum")
    torch.testing.assert_close(asked.heads[SYMBOLS].total, loss)
    behind = model(batch, Wanted(("own",), is_pooled=True, hidden=plain.hidden))
    torch.testing.assert_close(behind.heads["own"], everything.heads["own"])
    torch.testing.assert_close(behind.pooled, everything.pooled)


def test_what_a_model_does_not_have_is_refused(rng: np.random.Generator) -> None:
    model, batch = _model(), random_pack(rng, [4])
    with pytest.raises(ConfigError, match=r"head must be one of tokens, own; got 'token'"):
        model(batch, Wanted(("token",)))
    bare = Model(replace(_config(), pool=None))
    with pytest.raises(ConfigError, match=r"head must be one of none: the model is a trunk alone; got 'own'"):
        bare(batch, Wanted(("own",)))
    with pytest.raises(ConfigError, match=r"must have a pool of its own .*\(architecture.pool\)"):
        bare(batch, Wanted(is_pooled=True))
    with pytest.raises(ConfigError, match=r"takes the model's own pool"):
        Model(bare.config, specs((), (OWN,)))
    with pytest.raises(ConfigError, match=r"layer must be in 0..2"):
        model(batch, Wanted(layers=(7,)))


def test_what_travels_into_a_model_is_no_dataclass() -> None:
    """FSDP2 copies dataclass arguments, and would lose what is added to a cache within."""
    assert not is_dataclass(Wanted)
    assert not is_dataclass(HeadRequest)


def test_predictions_of_a_record_do_not_depend_on_how_many_are_made(rng: np.random.Generator) -> None:
    value = Readout(name="value", task="regression", pool=Prefix())
    model = Model(_config(), specs((), (value,))).eval()
    batch = random_pack(rng, [int(n) for n in rng.integers(1, 30, 7)])
    lengths = batch.layout.lengths
    wanted = Wanted({"value": HeadRequest(rounds_alike=True)})
    together = model(batch, wanted).heads["value"]
    hidden = model(batch, Wanted()).hidden
    for count in range(1, 7):
        layout = replace(hidden.layout, lengths=lengths[:count], num_spare=0)
        some = replace(hidden, final=hidden.final[: layout.num_tokens], layout=layout)
        alone = model(batch, wanted.but(hidden=some)).heads["value"]
        assert torch.equal(alone, together[:count])
