"""A mixture of sources: each has its share of the tokens, and loses no record in its own epoch."""

import itertools
import pickle
from pathlib import Path

import numpy as np
import pytest
from lines import TOKENIZER, LinesReader, random_payloads

from meristem.data.loader import TrainLoader
from meristem.data.order import MixedStream, PackStream
from meristem.data.pack_maker import PackMaker
from meristem.data.records import ReadOptions, Source
from meristem.data.store import RecordStore
from meristem.errors import ConfigError
from meristem.types import INPUT, PackedBatch


def random_mixture(rng: np.random.Generator) -> dict:
    count = int(rng.integers(2, 5))
    sizes = rng.integers(3, 60, count)
    return {
        "lengths": rng.integers(1, 40, sizes.sum()),
        "source_of": rng.permutation(np.repeat(np.arange(count), sizes)),
        "weights": rng.uniform(0.05, 1, count).tolist(),
        "tokens_per_batch": int(rng.integers(40, 120)),
        "packs_per_step": int(rng.integers(1, 5)),
        "seed": int(rng.integers(2**32)),
    }


def packs_of(stream: MixedStream, steps: int) -> list[tuple[int, np.ndarray]]:
    return list(itertools.chain.from_iterable(stream.step(n) for n in range(steps)))


def slowly(mixture: dict, count: int) -> list[tuple[int, list[int]]]:
    """Pack after pack, every share counted anew."""
    sources = sorted(set(mixture["source_of"].tolist()))
    rows = {s: [i for i, own in enumerate(mixture["source_of"]) if own == s] for s in sources}
    shares = {s: mixture["weights"][s] / sum(mixture["weights"]) for s in sources}
    made: list[tuple[int, int, list[int]]] = []
    for _ in range(count):
        tokens = {s: sum(int(mixture["lengths"][r]) for o, _, pack in made if o == s for r in pack) for s in sources}
        total = sum(tokens.values()) + 1
        source = max(sources, key=lambda s: (shares[s] * total - tokens[s], -s))
        stream = PackStream(
            mixture["lengths"][rows[source]],
            tokens_per_batch=mixture["tokens_per_batch"],
            packs_per_step=1,
            seed=mixture["seed"] + source,
        )
        [(epoch, members)] = stream.step(sum(o == source for o, _, _ in made))
        made.append((source, epoch, [rows[source][m] for m in members]))
    return [(epoch, pack) for _, epoch, pack in made]


@pytest.mark.parametrize("trial", range(5))
def test_packs_are_those_of_counting_every_share_anew(rng, trial):
    mixture = random_mixture(rng)
    stream = MixedStream(**mixture)
    found = [(epoch, members.tolist()) for epoch, members in packs_of(stream, 12)]
    assert found == slowly(mixture, len(found))


@pytest.mark.parametrize("trial", range(5))
def test_a_pack_holds_one_source_and_no_record_comes_twice_in_an_epoch_of_its_source(rng, trial):
    mixture = random_mixture(rng)
    seen: dict[tuple[int, int], list[int]] = {}
    for epoch, members in packs_of(MixedStream(**mixture), 60):
        (source,) = set(mixture["source_of"][members].tolist())
        seen.setdefault((source, epoch), []).extend(members.tolist())
    for (source, epoch), members in seen.items():
        own = np.flatnonzero(mixture["source_of"] == source).tolist()
        assert len(members) == len(set(members))
        if (source, epoch + 1) in seen:  # the epoch is over
            assert sorted(members) == own


@pytest.mark.parametrize("trial", range(5))
def test_tokens_of_each_source_are_near_its_share_at_every_pack(rng, trial):
    mixture = random_mixture(rng)
    shares = np.array(mixture["weights"]) / sum(mixture["weights"])
    tokens = np.zeros(len(shares))
    for _, members in packs_of(MixedStream(**mixture), 80):
        tokens[mixture["source_of"][members[0]]] += mixture["lengths"][members].sum()
        off = np.abs(tokens - shares * tokens.sum())
        assert off.max() <= len(shares) * mixture["tokens_per_batch"]


def test_shares_that_are_ignored_would_be_noticed(rng, monkeypatch):
    mixture = random_mixture(rng) | {"weights": [0.9, 0.1]}
    mixture |= {"source_of": np.arange(len(mixture["lengths"])) % 2}
    monkeypatch.setattr(np, "argmax", lambda values: 1)
    with pytest.raises(AssertionError):
        assert [(e, m.tolist()) for e, m in packs_of(MixedStream(**mixture), 12)] == slowly(mixture, 12)


@pytest.mark.parametrize("trial", range(3))
def test_going_on_in_the_middle_gives_the_same_steps(rng, trial):
    mixture = random_mixture(rng)
    whole = MixedStream(**mixture)
    steps = [[(e, m.tolist()) for e, m in whole.step(n)] for n in range(30)]
    for n in rng.permutation(30)[:6].tolist():
        assert [(e, m.tolist()) for e, m in MixedStream(**mixture).step(n)] == steps[n]


@pytest.mark.parametrize("weights", [[1.0], [1.0, 0.0], [1.0, -1.0], [1.0, 1.0, 1.0]])
def test_weights_that_do_not_fit_are_refused(weights):
    lengths, source_of = np.full(6, 10), np.array([0, 0, 0, 1, 1, 1])
    with pytest.raises(ConfigError, match="one number above 0 for each source"):
        MixedStream(lengths, source_of, weights, tokens_per_batch=50, packs_per_step=1, seed=0)


class Bare:
    """Tokens as they are."""

    inputs, payload_inputs = (INPUT,), ()

    def prepare(self, record, encode, rng):
        return (encode(INPUT),)

    def counts(self, batch):
        return {}

    def lengths(self, lengths):
        return lengths


def mixed_store(rng: np.random.Generator, folder: Path, sizes: list[int]) -> tuple[RecordStore, list[int]]:
    """A store of as many files as there are sizes, with records that are refused, and the source of each record."""
    sources, expected = [], []
    for i, size in enumerate(sizes):
        path = folder / f"{i}.txt"
        rows = [f"{i}-{j}\t{payload}" for j, payload in enumerate(random_payloads(rng, size))]
        rows.insert(int(rng.integers(len(rows) + 1)), "no\t")
        path.write_text("\n".join(rows) + "\n")
        sources.append(Source(str(path)))
        expected += [i] * size
    options = ReadOptions(on_error=lambda refusal: None)
    store = RecordStore.build(LinesReader(), sources, options, name="lines", cache_dir=folder / "cache")
    return store, expected


@pytest.mark.parametrize("trial", range(3))
def test_a_store_knows_the_source_of_each_record(rng, tmp_path, trial):
    store, expected = mixed_store(rng, tmp_path, rng.integers(1, 12, 4).tolist())
    assert store.source_of(np.arange(len(store))).tolist() == expected
    assert all(store[row].id.startswith(f"{source}-") for row, source in enumerate(expected))
    rows = rng.permutation(len(store))
    assert pickle.loads(pickle.dumps(store)).source_of(rows).tolist() == [expected[row] for row in rows]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_goes_on_in_the_middle_and_gives_each_source_its_share(rng, tmp_path, workers):
    store, source_of = mixed_store(rng, tmp_path, [40, 12, 25])
    rows = np.sort(rng.permutation(len(store))[:60])

    def batches(start: int, count: int) -> list[PackedBatch]:
        maker = PackMaker(store, rows, TOKENIZER, Bare(), 5)
        options = {"tokens_per_batch": 150, "packs_per_step": 3, "weights": [2, 5, 3], "workers": workers}
        loader = TrainLoader(maker, **options, start_step=lambda: start)
        return list(itertools.islice(loader, count))

    whole = batches(0, 3 * 40)
    middle = batches(23, 3 * 5)
    assert [b.ids.tolist() for b in middle] == [b.ids.tolist() for b in whole[3 * 23 : 3 * 28]]
    tokens = np.zeros(3)
    for batch in whole:
        (source,) = {source_of[record] for record in batch.records}
        tokens[source] += batch.layout.num_tokens
    # never further from a share than two packs
    assert np.abs(tokens - tokens.sum() * np.array([0.2, 0.5, 0.3])).max() <= 300
    assert {record for batch in whole for record in batch.records} == set(rows.tolist())
