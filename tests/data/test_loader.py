"""The loaders: a pure function of seed and step, whatever the workers, the ranks and the place to begin."""

import itertools
import pickle
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from lines import RESIDUES, TOKENIZER, random_payloads

import meristem.data.pack_maker as maker_module
from meristem.data.corrupt import mask_tokens
from meristem.data.loader import EvalLoader, TrainLoader
from meristem.data.pack_maker import PackMaker
from meristem.errors import ConfigError, DataError
from meristem.types import IGNORE, INPUT, PackedBatch


class Hide:
    """A small masked objective that hands labels on as well."""

    inputs, payload_inputs = (INPUT,), ()

    def prepare(self, record, encode, rng):
        one = encode(INPUT)
        is_maskable = np.ones(len(one), bool)
        is_maskable[[0, -1]] = False
        ids, targets = mask_tokens(
            one.ids, is_maskable, rng, rate=0.2, mask_id=TOKENIZER.mask_id, random_ids=TOKENIZER.random_ids
        )
        site = np.int64(record.labels.get("site", IGNORE))
        return (replace(one, ids=ids, targets={"symbols": targets}, labels={"site": site}),)

    def counts(self, batch):
        counts = {name: int((value != IGNORE).sum()) for name, value in batch.targets.items()}
        return counts | {name: int((value != IGNORE).sum()) for name, value in batch.labels.items()}

    def lengths(self, lengths):
        return lengths


class Bare:
    """Tokens as they are."""

    inputs, payload_inputs = (INPUT,), ()

    def prepare(self, record, encode, rng):
        return (encode(INPUT),)

    def counts(self, batch):
        return {}

    def lengths(self, lengths):
        return lengths


@pytest.fixture
def payloads(rng) -> list[str]:
    return random_payloads(rng, 120)


@pytest.fixture
def store(rng, payloads, make_store):
    sites = [str(site) if site else "" for site in rng.integers(0, 5, len(payloads))]
    return make_store(payloads, sites, label_columns=("site",))


def train(store, objective=None, rows=None, seed=7, max_tokens_per_record=None, **options) -> TrainLoader:
    rows = np.arange(len(store)) if rows is None else rows
    maker = PackMaker(store, rows, TOKENIZER, objective or Hide(), seed, max_tokens_per_record)
    return TrainLoader(maker, **{"tokens_per_batch": 200, "packs_per_step": 4, **options})


def evaluation(store, objective=None, max_tokens_per_record=None, **options) -> EvalLoader:
    rows = np.arange(len(store))
    maker = PackMaker(store, rows, TOKENIZER, objective or Hide(), 7, max_tokens_per_record, is_training=False)
    return EvalLoader(maker, **{"tokens_per_batch": 200, **options})


def take(loader, count: int) -> list[PackedBatch]:
    return list(itertools.islice(iter(loader), count))


def bits(batch: PackedBatch) -> tuple:
    tensors = {"ids": batch.ids, "positions": batch.positions, **batch.targets, **batch.labels}
    return (
        batch.layout,
        batch.records,
        dict(batch.step_counts),
        {name: (value.dtype, value.tolist()) for name, value in tensors.items()},
    )


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(store, workers):
    expected = [bits(batch) for batch in take(train(store), 22)]
    assert [bits(batch) for batch in take(train(store, workers=workers), 22)] == expected
    expected = [bits(batch) for batch in evaluation(store)]
    loader = evaluation(store, workers=workers)
    for _ in range(2):
        assert [bits(batch) for batch in loader] == expected


def test_ranks_share_each_step_and_their_counts_add_up(store):
    packs_per_step, steps = 4, 6
    alone = take(train(store, packs_per_step=packs_per_step), packs_per_step * steps)
    ranks = [
        take(train(store, packs_per_step=packs_per_step, rank=rank, world_size=2), packs_per_step // 2 * steps)
        for rank in range(2)
    ]
    together = [batch for pair in zip(*ranks) for batch in pair]
    assert [bits(replace(b, step_counts={})) for b in together] == [bits(replace(b, step_counts={})) for b in alone]
    for i, batch in enumerate(alone):
        step = i // packs_per_step
        shares = [ranks[rank][step * packs_per_step // 2].step_counts for rank in range(2)]
        assert batch.step_counts == {name: shares[0][name] + shares[1][name] for name in batch.step_counts}


def test_step_counts_are_the_sums_over_the_packs_of_the_step(store):
    batches = take(train(store), 40)
    for start in range(0, 40, 4):
        step = batches[start : start + 4]
        expected = {
            "symbols": sum(int((batch.targets["symbols"] != IGNORE).sum()) for batch in step),
            "site": sum(int((batch.labels["site"] != IGNORE).sum()) for batch in step),
        }
        assert expected["symbols"] > 0
        assert all(batch.step_counts == expected for batch in step)


@pytest.mark.parametrize("workers", [0, 2])
def test_starting_at_step_k_equals_going_through(store, workers):
    through = [bits(batch) for batch in take(train(store), 4 * 12)]
    start = [5]
    loader = train(store, workers=workers, start_step=lambda: start[0])
    assert [bits(batch) for batch in take(loader, 4 * 7)] == through[4 * 5 :]
    start[0] = 9  # asked anew whenever iteration begins
    assert [bits(batch) for batch in take(loader, 4 * 3)] == through[4 * 9 :]


def test_the_test_of_resuming_catches_a_generator_that_is_only_continued(store, monkeypatch):
    shared = np.random.default_rng(0)
    monkeypatch.setattr(maker_module, "record_rng", lambda seed, epoch, record: shared)
    through = [bits(batch) for batch in take(train(store), 4 * 6)]
    assert [bits(batch) for batch in take(train(store, start_step=lambda: 5), 4)] != through[4 * 5 :]


def test_an_epoch_has_every_record_once_and_the_next_another_order_and_other_masks(store, payloads):
    rows = np.arange(0, 120, 2)
    loader = train(store, rows=rows, packs_per_step=1)
    batches = take(loader, 200)
    per_epoch = len(loader.stream._plan(0)), len(loader.stream._plan(1))
    first, second = batches[: per_epoch[0]], batches[per_epoch[0] : sum(per_epoch)]
    seen = {}
    for epoch in (first, second):
        records = [record for batch in epoch for record in batch.records]
        assert sorted(records) == rows.tolist()
        for batch in epoch:
            for i, record in enumerate(batch.records):
                start = batch.layout.starts[i]
                stop = start + batch.layout.lengths[i]
                ids, targets = batch.ids[start:stop], batch.targets["symbols"][start:stop]
                whole = torch.where(targets == IGNORE, ids, targets)
                assert whole.tolist() == TOKENIZER.encode(payloads[record]).ids.tolist()
                seen.setdefault(record, []).append(targets.tolist())
    assert [b.records for b in first] != [b.records for b in second]
    long = [record for record in seen if len(payloads[record]) > 20]
    assert sum(seen[record][0] == seen[record][1] for record in long) <= len(long) / 4
    assert bits(take(train(store, seed=8), 1)[0]) != bits(take(train(store), 1)[0])


def test_masks_of_an_evaluation_do_not_depend_on_packing_or_pass(store):
    def targets_of(loader) -> dict[int, list[int]]:
        found = {}
        for batch in loader:
            for i, record in enumerate(batch.records):
                start = batch.layout.starts[i]
                found[record] = batch.targets["symbols"][start : start + batch.layout.lengths[i]].tolist()
        return found

    one = evaluation(store)
    expected = targets_of(one)
    assert sorted(expected) == list(range(120))
    assert targets_of(one) == expected
    assert targets_of(evaluation(store, tokens_per_batch=77)) == expected
    shares = [evaluation(store, rank=rank, world_size=3) for rank in range(3)]
    assert {k: v for share in shares for k, v in targets_of(share).items()} == expected


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("limit", [1.0, 2, 0.3])
def test_shares_of_an_evaluation_are_equally_long_and_hold_each_pack_once(store, limit, workers):
    whole = [bits(batch) for batch in evaluation(store)]
    wanted = whole[: {1.0: len(whole), 2: 2, 0.3: int(0.3 * len(whole))}[limit]]
    assert wanted
    world_size = int(np.random.default_rng().integers(2, 6)) if limit != 2 else 5  # more processes than packs
    shares = [
        list(evaluation(store, rank=rank, world_size=world_size, limit=limit, workers=workers))
        for rank in range(world_size)
    ]
    lengths = {len(share) for share in shares}
    assert lengths == {-(-len(wanted) // world_size)} == {len(evaluation(store, world_size=world_size, limit=limit))}
    own = [[bits(batch) for batch in share if not batch.is_repeat] for share in shares]
    assert [own[i % world_size][i // world_size] for i in range(len(wanted))] == wanted
    assert sum(map(len, own)) == len(wanted)
    assert all(bits(batch) in wanted for share in shares for batch in share)


@pytest.mark.parametrize("limit", [-1, -0.5, 1.5, 0.001])
def test_a_limit_out_of_range_is_refused(store, limit):
    with pytest.raises(ConfigError, match=rf"trainer.limit_val_batches must be .*; got {limit} of \d+ packs"):
        evaluation(store, limit=limit)
    assert len(evaluation(store, limit=0)) == 0


def test_tokens_of_the_loader_equal_those_of_the_tokenizer(payloads):
    column = TOKENIZER.encode_column(pa.array(payloads, pa.large_string()))
    for i, payload in enumerate(payloads):
        tokens, encoded = TOKENIZER.tokens_at(column, i), TOKENIZER.encode(payload)
        for name in ("ids", "positions", "spans"):
            assert np.array_equal(getattr(tokens, name), getattr(encoded, name))
        texts = [payload[start:stop] for start, stop in encoded.spans]
        assert texts == ["", *payload, ""]


def test_long_records_are_cropped_to_a_window_of_their_own_each_epoch(rng, make_store):
    payloads = random_payloads(rng, 30, 5, 60)
    payloads[3] = "".join(rng.choice(list(RESIDUES), 1_000))
    store = make_store(payloads)
    loader = train(store, Bare(), max_tokens_per_record=32, packs_per_step=1)
    windows = set()
    for batch in take(loader, 60):
        assert batch.layout.num_tokens <= 200
        for i, record in enumerate(batch.records):
            start = batch.layout.starts[i]
            ids = batch.ids[start : start + batch.layout.lengths[i]].numpy()
            assert ids[0] == 0
            assert ids[-1] == 1
            text = "".join(TOKENIZER.vocab[symbol] for symbol in ids[1:-1])
            assert text in payloads[record]
            assert len(text) == min(30, len(payloads[record]))
            if record == 3:
                windows.add(text)
    assert len(windows) > 3
    fixed = evaluation(store, Bare(), max_tokens_per_record=32)
    assert [bits(batch) for batch in fixed] == [bits(batch) for batch in fixed]
    with pytest.raises(ConfigError, match="beside the 2 special ones; got 2"):
        train(store, max_tokens_per_record=2)


@pytest.mark.parametrize("workers", [0, 1])
def test_the_global_generators_are_left_alone(store, workers):
    torch.manual_seed(3)
    np.random.seed(3)  # noqa: NPY002
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()  # noqa: NPY002
    take(train(store, workers=workers), 5)
    list(evaluation(store, workers=workers))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]  # noqa: NPY002


class Refuses(Bare):
    def prepare(self, record, encode, rng):
        raise DataError(f"{record.source}: no good")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_data_error_of_a_worker_stays_one_line(store, workers):
    for loader in (train, evaluation):
        with pytest.raises(DataError, match=r"^.*\.txt:\d+: no good$") as caught:
            take(loader(store, Refuses(), workers=workers), 1)
        assert "\n" not in str(caught.value)


def test_settings_that_cannot_work_are_refused(store):
    with pytest.raises(ConfigError, match=r"multiple of the number of processes \(2\); got 3; nearest: 4"):
        train(store, packs_per_step=3, world_size=2)
    with pytest.raises(ConfigError, match="workers"):
        train(store, workers=-1)
    with pytest.raises(ConfigError, match="tokens_per_batch"):
        evaluation(store, tokens_per_batch=0)
    with pytest.raises(ConfigError, match="at least one record"):
        train(store, rows=np.zeros(0, int))


def test_what_goes_to_a_worker_travels(store):
    loader = train(store)
    maker = pickle.loads(pickle.dumps(loader.maker))
    members = np.array([5, 3, 8])
    assert bits(maker.make(2, members)) == bits(loader.maker.make(2, members))
