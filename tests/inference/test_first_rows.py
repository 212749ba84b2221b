"""A vector or a prediction of the class row costs less and is the one that a whole pass gives."""

import numpy as np
import torch
from small_models import column_of, random_ids, redraw, tiny_config

from meristem.inference.engine import Embedder, TrunkRunner
from meristem.inference.predictor import Predictor
from meristem.model.config import Learned, Prefix
from meristem.model.heads import Readout
from meristem.model.model import Model
from meristem.model.outputs import Wanted
from meristem.model.transformer import Encoder
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
