"""Copies that run faster take over the project's own layers alone: a foreign layer in any place runs as it is."""

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from foreign import LINEAR, OTHERS, Adapter
from packs import config
from torch import nn

from meristem.framing import frame_of
from meristem.generation.few_rows import for_few_rows, min_rows_of
from meristem.generation.steps import Steps
from meristem.inference import engine, trunks
from meristem.inference.engine import Embedder, TrunkRunner
from meristem.inference.predict import Predictor
from meristem.inference.trunks import compiled_trunk, runnable_trunk, with_runnable_heads
from meristem.model import reordered
from meristem.model.config import (
    Attention,
    AttentionPool,
    Causal,
    Embedding,
    FeedForward,
    LayerRule,
    Learned,
    Mean,
    Prefix,
    RMSNorm,
    TokenHead,
    TransformerConfig,
)
from meristem.model.exact import MIN_REORDERED_ROWS
from meristem.model.heads import Readout
from meristem.model.model import Model
from meristem.model.reordered import ReorderedLinear, has_foreign
from meristem.types import MIN_ROWS, TokenColumn
from model_runs import specs

VOCAB = 33
READOUTS = (
    Readout(name="place", classes=("a", "b", "c"), hidden_width=12, pool=None),
    Readout(name="kind", classes=("x", "y"), is_standardised=True),
    Readout(name="site", level="token", classes=("h", "e")),
)
DECODER = config(
    num_layers=1,
    attention=Attention(num_heads=4, pattern=Causal()),
    embedding=Embedding(vocab_size=VOCAB),
    head=TokenHead(is_tied=False),
)
CONFIGS: dict[str, tuple[TransformerConfig, tuple[Readout, ...]]] = {
    "plain": (
        config(
            num_layers=1,
            embedding=Embedding(vocab_size=VOCAB, token_types=2, is_normed=True),
            position=Learned(max_positions=64),
            pool=AttentionPool(num_heads=4, feedforward_width=40),
        ),
        READOUTS,
    ),
    "gated": (
        config(
            num_layers=1,
            embedding=Embedding(vocab_size=VOCAB),
            norm=RMSNorm(),
            attention=Attention(num_heads=4, qk_norm="head"),
            feedforward=FeedForward(width=48, activation="silu", is_gated=True),
            pool=Prefix(is_dense=True),
        ),
        READOUTS,
    ),
    "mean": (config(num_layers=1, embedding=Embedding(vocab_size=VOCAB), pool=Mean(is_normed=True)), READOUTS[:1]),
    "decoder": (DECODER, ()),
    "encoder-decoder": (
        replace(
            DECODER,
            attention=Attention(num_heads=4),
            num_decoder_layers=1,
            layers=(LayerRule(start=1, attention=Attention(num_heads=4, pattern=Causal())),),
            head=TokenHead(),
        ),
        (),
    ),
}
READS_WEIGHTS = ("trunk.embedding.symbols", "heads.tokens.out")
"""Layers whose weights the project reads itself, so that most that is planted there cannot run."""

Results = dict[str, torch.Tensor]


def build(name: str) -> Model:
    """A model with every parameter redrawn."""
    architecture, readouts = CONFIGS[name]
    model = Model(architecture, specs(("tokens",), readouts)).requires_grad_(False)
    for parameter in model.parameters():
        draw = torch.randn_like(parameter)
        parameter.copy_(draw / parameter.shape[-1] ** 0.5 if parameter.ndim > 1 else 1 + 0.3 * draw)
    return model.eval()


def random_column(rng: np.random.Generator) -> TokenColumn:
    sequences = [rng.integers(0, VOCAB - 1, length).astype(np.int16) for length in rng.integers(3, 20, 4)]
    offsets = np.cumsum([0, *map(len, sequences)])
    return TokenColumn(np.concatenate(sequences), offsets, is_special=frame_of(offsets, (1, 1)))


@contextmanager
def as_it_is() -> Iterator[None]:
    """The engine without copies."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "runnable_trunk", lambda model, dtype: model.trunk)
        patch.setattr(engine, "with_runnable_heads", lambda model: model)
        yield


def run(model: Model, column: TokenColumn, few: Callable[[Model], Model] = for_few_rows) -> Results:
    """What every verb makes of a column."""
    runner = TrunkRunner(model)
    found: Results = {}
    for pool in ("none", *(["own"] if model.pool is not None else [])):
        found[f"embed {pool}"] = torch.from_numpy(Embedder(runner, pool).embed(column))
    if model.readouts:
        predicted = Predictor(runner).predict(column)
        found |= {f"predict {name}": torch.from_numpy(one.values) for name, one in predicted.items()}
    elif "decoder" in type(model.trunk).__name__.lower():
        ids = np.split(column.ids.astype(np.int64), column.offsets[1:-1])
        with torch.inference_mode():
            steps = Steps(few(model), ids, start_id=0)
            steps.advance([1, 2], [0, 2])
            found["generate"] = steps.logits
    return found


def direct(model: Model, column: TokenColumn) -> Results:
    with as_it_is():
        return run(model, column, few=lambda model: model)


def difference(one: Results, other: Results) -> float:
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def places(model: Model) -> list[tuple[str, str]]:
    """Every module of a model with every way to make it foreign."""
    found = []
    for name, layer in model.named_modules():
        is_linear = type(layer) is nn.Linear and name not in READS_WEIGHTS
        found += [(name, kind) for kind in (LINEAR if is_linear else OTHERS)]
    return found


@pytest.fixture(autouse=True)
def _can_reorder() -> None:
    if not reordered.can_reorder(Model(DECODER)):
        pytest.skip("torch has no products of reordered weights here")


@pytest.mark.parametrize("name", CONFIGS)
def test_own_layers_are_taken_over_and_change_nothing(name: str, rng: np.random.Generator) -> None:
    model, column = build(name), random_column(rng)
    assert not has_foreign(model)
    assert all(type(one) is not nn.Linear for one in runnable_trunk(model, torch.float32).modules())
    # sums of at most 64 products in fp32, in another order
    assert difference(run(model, column), direct(model, column)) < 1e-4


def tolerance_of(kind: str) -> float:
    """fp32 sums in another order, through one block; a quantized layer may round one of its inputs to another step."""
    return 0.1 if kind == "quantized" else 1e-3


def misses(name: str, rng: np.random.Generator) -> list[tuple[str, str]]:
    """Places of a model and what was planted there that the copies compute otherwise than the model does."""
    wrong = []
    for place, kind in places(build(name)):
        model, column = build(name), random_column(rng)
        LINEAR[kind](model, place)
        model.eval()
        try:
            is_right = difference(run(model, column), direct(model, column)) < tolerance_of(kind)
        except (RuntimeError, TypeError, AttributeError):
            is_right = False
        if not is_right:
            wrong.append((place, kind))
    return wrong


@pytest.mark.parametrize("name", CONFIGS)
def test_a_foreign_layer_in_any_place_runs_as_it_is(name: str, rng: np.random.Generator) -> None:
    assert misses(name, rng) == []


def test_what_is_planted_changes_results(rng: np.random.Generator) -> None:
    """Else the test above would see nothing."""
    for name in CONFIGS:
        for place in ("feedforward.up", "feedforward.down", "attention.qkv", "attention.out", "attention_norm"):
            model, column = build(name), random_column(rng)
            [full] = [one for one, _ in model.named_modules() if one.endswith(f"blocks.0.{place}")][-1:]
            before = direct(model, column)
            kinds = OTHERS if place.endswith("norm") else LINEAR
            LINEAR[str(rng.choice(list(kinds)))](model, full)
            assert difference(direct(model.eval(), column), before) > 1e-3, (name, full)


def by_device_alone(layer: nn.Module) -> bool:
    return True


def without_hooks(layer: nn.Module) -> bool:
    """The mutant that forgets hooks, and methods of the instance."""
    is_known = type(layer) in reordered.OWN_TORCH or type(layer).__module__.startswith("meristem.model.")
    return is_known and all(map(reordered.is_plain, layer.parameters(recurse=False)))


def by_class_alone(layer: nn.Module | None) -> bool:
    return isinstance(layer, nn.Linear)


def fused_blindly(layer: nn.Module) -> tuple[str, str] | None:
    """The mutant that takes a feed-forward layer over whatever stands in it."""
    is_plain = isinstance(layer, reordered.FeedForwardLayer) and not layer.is_gated
    return reordered.FUSED.get(layer.activation) if is_plain else None


@pytest.mark.parametrize(
    ("name", "mutant", "kinds"),
    [
        ("is_own", by_device_alone, {"hook", "hook before", "forward of its own", "tensor subclass"}),
        ("is_own", without_hooks, {"hook", "hook before", "forward of its own"}),
        ("is_own_linear", by_class_alone, {"hook", "subclass", "tensor subclass"}),
        ("_fused", fused_blindly, {"adapter", "hook", "quantized"}),
    ],
)
def test_mutants_are_seen(
    name: str, mutant: Callable, kinds: set[str], rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reordered, name, mutant)
    seen = {kind for _, kind in misses("decoder", rng)}
    assert kinds <= seen


@pytest.mark.parametrize("kind", LINEAR)
def test_a_layer_made_foreign_later_is_seen(kind: str, rng: np.random.Generator) -> None:
    model, column = build("decoder"), random_column(rng)
    before = run(model, column)
    LINEAR[kind](model, "trunk.blocks.0.feedforward.up")
    after = run(model.eval(), column)
    assert difference(after, before) > 1e-3
    assert difference(after, direct(model, column)) < tolerance_of(kind)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_setting_of_a_foreign_layer_is_followed(dtype: torch.dtype, rng: np.random.Generator) -> None:
    model, column = build("decoder"), random_column(rng)
    LINEAR["adapter"](model, "trunk.blocks.0.attention.out")

    def embedded() -> np.ndarray:
        return Embedder(TrunkRunner(model, dtype=dtype), "none").embed(column)

    before = embedded()
    adapter = model.get_submodule("trunk.blocks.0.attention.out")
    assert isinstance(adapter, Adapter)
    adapter.scale = 0.0
    after = embedded()
    assert np.abs(after - before).max() > 0.01
    with as_it_is():
        wanted = Embedder(TrunkRunner(model), "none").embed(column)
    # bf16 keeps 8 bits, through one block
    np.testing.assert_allclose(after, wanted, atol=1e-4 if dtype == torch.float32 else 0.2)


def test_weights_changed_behind_the_version_counter_are_seen(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    def is_followed() -> bool:
        model, column = build("decoder"), random_column(rng)
        run(model, column)
        model.trunk.blocks[0].feedforward.up.weight.data.mul_(-1.0)  # as adapters are merged
        return difference(run(model, column), direct(model, column)) < 1e-3

    assert is_followed()
    real = reordered._state_of
    monkeypatch.setattr(reordered, "_state_of", lambda module: real(module)[:2])  # versions alone
    assert not is_followed()


@pytest.mark.parametrize("place", ["trunk.blocks.0.attention.qkv", "heads.tokens.dense", "heads.tokens"])
def test_few_rows_are_as_many_as_a_foreign_layer_needs(place: str) -> None:
    """What is not reordered rounds a row by how many there are, where there are few."""
    model = build("decoder")
    assert min_rows_of(for_few_rows(model)) == MIN_REORDERED_ROWS
    model = build("decoder")
    LINEAR["hook"](model, place)
    fast = for_few_rows(model)
    assert min_rows_of(fast) == MIN_ROWS
    assert any(isinstance(layer, ReorderedLinear) for layer in fast.trunk.modules())  # the others are the faster


def test_a_model_is_left_as_it_was_and_foreign_layers_are_shared() -> None:
    model = build("plain")
    LINEAR["adapter"](model, "trunk.blocks.0.feedforward.down")
    before = {name: id(layer) for name, layer in model.named_modules()}
    trunk, heads = runnable_trunk(model, torch.float32), with_runnable_heads(model)
    assert {name: id(layer) for name, layer in model.named_modules()} == before
    assert trunk.blocks[0].feedforward.down is model.trunk.blocks[0].feedforward.down
    assert heads.trunk is model.trunk
    left = weakref.ref(trunk)
    del model, trunk, heads
    gc.collect()
    assert left() is None  # a copy lives no longer than the model


@pytest.mark.parametrize("kind", ["adapter", "hook", "forward of its own", "tensor subclass"])
def test_a_compiled_copy_runs_foreign_layers(
    kind: str, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trunks, "compile_blocks", lambda trunk, device: False)  # a compiler is tested elsewhere
    model, column = build("gated"), random_column(rng)
    LINEAR[kind](model, "trunk.blocks.0.feedforward.up")
    wanted = direct(model.eval(), column)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "runnable_trunk", compiled_trunk)
        assert difference(run(model, column), wanted) < 1e-3
