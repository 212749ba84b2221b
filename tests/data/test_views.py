"""Views take the place of records, payloads and labels: drawn anew in training, the same each time in evaluation."""

from dataclasses import replace

import numpy as np
import pytest
from lines import TOKENIZER, random_payloads

from meristem.data.loader import EvalLoader, TrainLoader
from meristem.data.pack_maker import PackMaker
from meristem.data.parts import Part
from meristem.data.views import Views
from meristem.types import INPUT, PackedBatch, Record


class Keeps:
    """An objective that gives tokens as they are, with the label of the view."""

    inputs, payload_inputs = (INPUT,), ()

    def prepare(self, record, encode, rng):
        turned = np.array(int(record.labels.get("turned", "0")))
        return (replace(encode(INPUT), labels={"turned": turned}),)

    def counts(self, batch):
        return {}

    def lengths(self, lengths):
        return lengths


class Turned(Views):
    """Turns a sequence round and says so in a label: by chance in training, always in evaluation."""

    def __init__(self, num_views: int = 1, is_training_only: bool = False):
        self.num_views, self.is_training_only = num_views, is_training_only

    def views(self, record: Record, rng: np.random.Generator | None) -> tuple[Record, ...]:
        are_turned = [True] if rng is None else (rng.random(self.num_views) < 0.5).tolist()
        return tuple(
            replace(
                record.with_payload(record.payload[::-1] if is_turned else record.payload),
                labels={"turned": "01"[is_turned]},
            )
            for is_turned in are_turned
        )


class Ignored(Turned):
    """The mutant: views that leave the labels as they were."""

    def views(self, record, rng):
        return tuple(replace(view, labels=record.labels) for view in super().views(record, rng))


@pytest.fixture
def payloads(rng) -> list[str]:
    return random_payloads(rng, 40)


@pytest.fixture
def part(payloads, make_store) -> Part:
    store = make_store(payloads)
    return Part(store, np.arange(len(store)))


def seen(batch: PackedBatch) -> list[tuple[int, str, int]]:
    """Row, payload and label of each sequence of a pack."""
    ids = batch.ids[: batch.layout.num_tokens].split(list(batch.layout.lengths))
    texts = ["".join(TOKENIZER.vocab[i] for i in one[1:-1]) for one in ids]
    return list(zip(batch.records, texts, batch.labels["turned"].tolist()))


def agree(payloads: list[str], batch: PackedBatch) -> bool:
    return all(text == (payloads[row][::-1] if turned else payloads[row]) for row, text, turned in seen(batch))


@pytest.mark.parametrize("num_views", [1, 3])
def test_training_sees_drawn_views_with_their_labels(part, payloads, num_views):
    maker = PackMaker(part.store, part.rows, TOKENIZER, Keeps(), 0, views=Turned(num_views))
    assert maker.lengths().tolist() == [(len(payload) + 2) * num_views for payload in payloads]
    packs = [maker.make(epoch, np.arange(len(part))) for epoch in range(2)]
    for batch in packs:
        assert [batch.records.count(row) for row in range(len(part))] == [num_views] * len(part)
        assert agree(payloads, batch)
    assert 0 < sum(turned for _, _, turned in seen(packs[0])) < len(part) * num_views
    assert sorted(seen(packs[0])) != sorted(seen(packs[1]))
    assert seen(packs[0]) == seen(maker.make(0, np.arange(len(part))))


def test_views_whose_labels_are_not_seen_would_be_caught(part, payloads):
    maker = PackMaker(part.store, part.rows, TOKENIZER, Keeps(), 0, views=Ignored())
    assert not agree(payloads, maker.make(0, np.arange(len(part))))


def test_evaluation_sees_one_view_of_each_record_the_same_each_time(part, payloads):
    maker = PackMaker(part.store, part.rows, TOKENIZER, Keeps(), 3, views=Turned(num_views=3), is_training=False)
    loader = EvalLoader(maker, tokens_per_batch=200)
    found = [one for batch in loader for one in seen(batch)]
    assert sorted(found) == [(row, payload[::-1], 1) for row, payload in enumerate(payloads)]
    assert found == [one for batch in loader for one in seen(batch)]


def test_evaluation_sees_records_as_they_are_where_views_are_for_training_only(part, payloads):
    views = Turned(is_training_only=True)
    maker = PackMaker(part.store, part.rows, TOKENIZER, Keeps(), 3, views=views, is_training=False)
    loader = EvalLoader(maker, tokens_per_batch=200)
    assert sorted(one for batch in loader for one in seen(batch)) == [(i, one, 0) for i, one in enumerate(payloads)]


def test_long_views_are_cropped_as_records_are(part):
    for views in (Turned(), Turned(num_views=2), None):
        maker = PackMaker(part.store, part.rows, TOKENIZER, Keeps(), 0, max_tokens_per_record=12, views=views)
        batch = maker.make(0, np.arange(len(part)))
        assert max(batch.layout.lengths) <= 12
        assert sum(batch.layout.lengths) == int(maker.lengths().sum())


def test_packs_of_views_are_as_large_as_planned(part):
    maker = PackMaker(part.store, part.rows, TOKENIZER, Keeps(), 0, views=Turned(num_views=2))
    loader = TrainLoader(maker, tokens_per_batch=300, packs_per_step=1)
    for batch, _ in zip(loader, range(8)):
        assert batch.layout.num_tokens <= 300 or len(set(batch.records)) == 1
