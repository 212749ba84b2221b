"""Order: every record once an epoch, a pure function of (seed, n), the same wherever a run begins."""

import pickle
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meristem.data.order import PackStream, plan_epoch, plan_in_order, record_rng
from meristem.errors import ConfigError

LENGTHS = st.lists(st.integers(1, 300), min_size=1, max_size=200).map(np.array)
BUDGET = st.integers(1, 600)


def as_lists(packs) -> list:
    return [(epoch, records.tolist()) for epoch, records in packs]


@given(LENGTHS, BUDGET, st.integers(0, 2**64 - 1), st.integers(0, 99))
@settings(deadline=None)
def test_a_plan_holds_every_record_once_within_the_budget(lengths, budget, seed, epoch):
    for plan in (
        plan_epoch(lengths, tokens_per_batch=budget, seed=seed, epoch=epoch),
        plan_in_order(lengths, budget),
    ):
        packs = list(plan)
        assert len(packs) == len(plan)
        assert sorted(np.concatenate(packs)) == list(range(len(lengths)))
        assert all(lengths[pack].sum() <= budget or len(pack) == 1 for pack in packs)
        assert all(len(pack) for pack in packs)


def test_no_plan_of_nothing_has_a_pack():
    assert len(plan_in_order(np.zeros(0, int), 10)) == 0
    assert len(plan_epoch(np.zeros(0, int), tokens_per_batch=10, seed=0, epoch=0)) == 0


def test_packs_are_full_and_their_lengths_alike(rng):
    lengths = np.clip(rng.lognormal(5.6, 0.6, 20_000), 20, 1024).astype(int)  # as proteins are
    budget = 8192
    plan = plan_epoch(lengths, tokens_per_batch=budget, seed=1, epoch=0)
    fill = np.array([lengths[pack].sum() for pack in plan]) / budget
    assert fill.mean() > 0.95
    spread = np.mean([np.ptp(lengths[pack]) for pack in plan])
    assert spread < 60  # records drawn blindly: about 600


def test_order_of_records_and_packs_changes_with_seed_and_epoch(rng):
    lengths = rng.integers(50, 400, 10_000)

    def plan(seed: int, epoch: int) -> list[list[int]]:
        return [pack.tolist() for pack in plan_epoch(lengths, tokens_per_batch=4000, seed=seed, epoch=epoch)]

    first = plan(3, 0)
    assert first == plan(3, 0)
    for other in (plan(4, 0), plan(3, 1)):
        assert first != other
        # another composition, not the same packs in another order
        assert len({tuple(sorted(p)) for p in first} & {tuple(sorted(p)) for p in other}) == 0
    means = np.array([lengths[pack].mean() for pack in first])
    # lengths do not drift over the epoch: under 5 standard errors of a half's mean
    half = len(means) // 2
    assert abs(means[:half].mean() - means[half:].mean()) < 5 * means.std() * np.sqrt(2 / half)


@given(LENGTHS, BUDGET, st.integers(1, 7), st.integers(0, 20))
@settings(deadline=None, max_examples=50)
def test_starting_at_step_k_equals_going_through(lengths, budget, packs_per_step, k):
    options = {"tokens_per_batch": budget, "packs_per_step": packs_per_step, "seed": 5}
    through = PackStream(lengths, **options)
    steps = [as_lists(through.step(n)) for n in range(k + 3)]
    assert as_lists(PackStream(lengths, **options).step(k)) == steps[k]
    assert as_lists(through.step(0)) == steps[0]  # backwards as well
    assert as_lists(pickle.loads(pickle.dumps(through)).step(k)) == steps[k]


@given(LENGTHS, BUDGET, st.integers(1, 7))
@settings(deadline=None, max_examples=50)
def test_the_stream_is_the_epochs_end_to_end(lengths, budget, packs_per_step):
    stream = PackStream(lengths, tokens_per_batch=budget, packs_per_step=packs_per_step, seed=0)
    plans = [plan_epoch(lengths, tokens_per_batch=budget, seed=0, epoch=epoch) for epoch in range(3)]
    expected = [(epoch, pack.tolist()) for epoch, plan in enumerate(plans) for pack in plan]
    steps = len(expected) // packs_per_step
    got = [pack for n in range(steps) for pack in as_lists(stream.step(n))]
    assert got == expected[: len(got)]


def test_generators_are_keyed_by_seed_epoch_and_record(rng):
    seed, epoch, record = (int(v) for v in rng.integers(0, 2**40, 3))
    draw = record_rng(seed, epoch, record).integers(0, 2**63, 4).tolist()
    assert draw == record_rng(seed, epoch, record).integers(0, 2**63, 4).tolist()
    for other in [(seed + 1, epoch, record), (seed, epoch + 1, record), (seed, epoch, record + 1)]:
        assert not set(draw) & set(record_rng(*other).integers(0, 2**63, 4).tolist())
    # neighbours are independent: the mean of 2,000 first draws is within 5 standard errors of a half
    draws = [record_rng(seed, 0, i).random() for i in range(2_000)]
    assert abs(np.mean(draws) - 0.5) < 5 * np.sqrt(1 / 12 / 2_000)


def test_a_million_records_are_planned_in_seconds(rng):
    lengths = rng.integers(50, 600, 1_000_000)
    start = time.process_time()
    plan_epoch(lengths, tokens_per_batch=16_384, seed=0, epoch=0)
    assert time.process_time() - start < 5  # 0.4 s on one core of 2023


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"tokens_per_batch": 0}, "tokens_per_batch"),
        ({"packs_per_step": 0}, "packs_per_step"),
        ({"seed": -1}, "seed"),
    ],
)
def test_wrong_numbers_are_refused(change, match):
    options = {"tokens_per_batch": 10, "packs_per_step": 1, "seed": 0, **change}
    with pytest.raises(ConfigError, match=match):
        PackStream(np.array([1]), **options)
    with pytest.raises(ConfigError, match="none"):
        PackStream(np.zeros(0, int), tokens_per_batch=10, packs_per_step=1, seed=0)
