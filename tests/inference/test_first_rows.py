"""A vector or a prediction of the class row costs less and is the one that a whole pass gives."""

import numpy as np
import pytest
import torch
from small_models import column_of, random_ids, redraw, tiny_config

from meristem.data.pack import pack_column
from meristem.inference.engine import Embedder, TrunkRunner
from meristem.inference.predictor import Predictor
from meristem.model.block import Block
from meristem.model.config import Attention, Causal, LayerRule, Learned, Mean, Prefix
from meristem.model.heads import Readout
from meristem.model.model import Model
from meristem.model.outputs import Wanted
from meristem.model.pool import PoolLayer
from meristem.model.transformer import Encoder
from meristem.types import Hidden
from model_runs import specs

PLACE = Readout(name="place", classes=("a", "b", "c"), pool=Prefix())


def _model(**parts: object) -> Model:
    torch.manual_seed(0)
    return redraw(Model(tiny_config(**parts), specs((), [PLACE])))


def _made(model: Model, column) -> tuple[list[np.ndarray], list[int]]:
    """Vectors and probabilities, and how many rows left the last block."""
    made: list[int] = []
    runner = TrunkRunner(model, tokens_per_batch=500)
    hook = runner.runnable.trunk.final_norm.register_forward_hook(lambda _, __, rows: made.append(len(rows)))
    values = [Embedder(runner, "cls").embed(column), Predictor(runner).predict(column)["place"].values]
    hook.remove()
    return values, made


def test_only_class_rows_leave_the_last_block_and_their_vectors_are_the_same(rng, monkeypatch):
    column = column_of([random_ids(rng, length) for length in (3, 40, 40, 7, 200, 90)])
    model = _model()
    some, rows = _made(model, column)
    monkeypatch.setattr(Encoder, "may_leave_rows", False)
    whole, all_rows = _made(model, column)
    for own, other in zip(some, whole):
        np.testing.assert_allclose(own, other, atol=1e-5)  # products of other numbers of rows round otherwise
    assert set(rows) == {16}
    assert sum(all_rows) >= 2 * int(column.offsets[-1])


def test_windows_of_a_long_record_are_whole(rng):
    """A mean over windows reads every row, also where the pool that follows reads the first alone."""
    column = column_of([random_ids(rng, length) for length in (20, 300)])
    model = _model(position=Learned(max_positions=130))
    rows = {rows.records: rows for rows in TrunkRunner(model).run(column, Wanted(num_first=1))}
    assert rows[(1,)].layout.lengths == (302,)
    assert rows[(0,)].layout.lengths == (1,)


@pytest.mark.parametrize("pool", ["mean", "cls", "none"])
@pytest.mark.parametrize("layer", [0, 1, 2, 3, -1, -4])
def test_blocks_behind_the_layer_are_not_run_and_its_vectors_are_the_same(layer, pool, rng, monkeypatch):
    model = _model(num_layers=3, position=Learned(max_positions=130))
    column = column_of([random_ids(rng, length) for length in (3, 40, 40, 300)])  # the last one takes windows
    run, calls = Block.forward, []
    monkeypatch.setattr(Block, "forward", lambda self, *given: calls.append(self) or run(self, *given))
    runner = TrunkRunner(model, layer, tokens_per_batch=10_000)
    got = Embedder(runner, pool).embed(column)
    wanted_layer = model.trunk.resolve_layer(layer)
    assert len(calls) == 2 * wanted_layer, "one pack, and one of windows"
    if runner.is_cut:  # what all blocks give, layer by layer
        whole = TrunkRunner(model, tokens_per_batch=10_000)

        def kept(batch, wanted):
            if wanted.hidden is not None:
                return model(batch, wanted)
            hidden = Model.__call__(whole.runnable, batch, Wanted(layers=(wanted_layer,))).hidden
            return model(batch, wanted.but(hidden=Hidden(hidden.layers[wanted_layer], hidden.layout)))

        runner.runnable = kept
        np.testing.assert_array_equal(got, Embedder(runner, pool).embed(column))


def test_of_two_stacks_only_blocks_of_the_encoder_are_run(rng, monkeypatch):
    rule = LayerRule(start=3, attention=Attention(num_heads=4, pattern=Causal()))
    model = _model(num_layers=3, num_decoder_layers=2, layers=(rule,))
    column = column_of([random_ids(rng, length) for length in (3, 40)])
    run, calls = Block.forward, []
    monkeypatch.setattr(Block, "forward", lambda self, *given: calls.append(self) or run(self, *given))
    vectors = [Embedder(TrunkRunner(model, layer), "mean").embed(column) for layer in (1, 2, 3)]
    assert len(calls) == 1 + 2 + 3
    whole = TrunkRunner(model)
    batch = pack_column(column, np.arange(2), [0, 1])
    hidden = whole.runnable(batch, Wanted(layers=(1, 2, 3), is_source_only=True)).hidden
    for layer, values in zip((1, 2, 3), vectors):
        np.testing.assert_array_equal(whole_mean(hidden.layers[layer], batch.layout), values)


def whole_mean(rows, layout):
    """Means over the rows of each sequence that are not special."""
    return PoolLayer(Mean(), rows.shape[1])(rows, layout).detach().numpy()
