"""Splits: every record in one part, like payloads together, by a pure function of the seed."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from lines import RESIDUES, random_payloads

import meristem.data.similarity as similarity
from meristem.data.similarity import Similarity, similarity_clusters
from meristem.data.split import split_by_column, split_by_hash, split_by_similarity
from meristem.data.store import RecordStore
from meristem.domain import load_domain
from meristem.errors import ConfigError, DataError
from meristem.objectives.masked import MaskedTokens
from meristem.train.datamodule import DataModule
from meristem.train.spec import DataSpec, Split

FRACTIONS = {"train": 0.7, "validation": 0.2, "test": 0.1}

SIMILARITY = Similarity(k=5)


def by_similarity(store: RecordStore, fractions: Mapping[str, float], seed: int) -> dict[str, np.ndarray]:
    return split_by_similarity(store, fractions, seed, SIMILARITY)


def mutated(payload: str, rate: float, rng: np.random.Generator) -> str:
    return "".join(rng.choice(list(RESIDUES)) if rng.random() < rate else letter for letter in payload)


def part_of(parts: dict[str, np.ndarray]) -> dict[int, str]:
    return {int(row): name for name, rows in parts.items() for row in rows}


def assert_is_partition(parts: dict[str, np.ndarray], count: int) -> None:
    assert sorted(np.concatenate(list(parts.values()))) == list(range(count))
    assert all((np.diff(rows) > 0).all() for rows in parts.values())


def test_hash_split_keeps_equal_payloads_together_and_near_the_fractions(rng, make_store):
    distinct = random_payloads(rng, 3_000, 20, 40)
    payloads = [*distinct, *distinct[:500], *(payload.lower() for payload in distinct[:200])]
    store = make_store(payloads)
    parts = split_by_hash(store, FRACTIONS, seed=3)
    assert_is_partition(parts, len(payloads))
    found = part_of(parts)
    of_payload: dict[str, set[str]] = {}
    for row, payload in enumerate(payloads):
        of_payload.setdefault(payload.upper(), set()).add(found[row])
    assert all(len(names) == 1 for names in of_payload.values())
    for name, fraction in FRACTIONS.items():
        share = np.mean([found[row] == name for row in range(3_000)])
        assert abs(share - fraction) < 5 * np.sqrt(fraction * (1 - fraction) / 3_000)  # 5 standard deviations
    assert part_of(split_by_hash(store, FRACTIONS, seed=3)) == found
    assert part_of(split_by_hash(store, FRACTIONS, seed=4)) != found
    # records that come later move no one
    smaller = part_of(split_by_hash(make_store(payloads[:1000]), FRACTIONS, seed=3))
    assert all(found[row] == name for row, name in smaller.items())


def test_column_split_takes_the_usual_names(make_store):
    names = ["train", "Dev", "val", "test", "TRAIN", "validation", " valid"]
    parts = split_by_column(make_store(["MK"] * 7, names, split_column="part"))
    assert {name: rows.tolist() for name, rows in parts.items()} == {
        "train": [0, 4],
        "validation": [1, 2, 5, 6],
        "test": [3],
    }
    assert list(split_by_column(make_store(["MK"], ["test"], split_column="part"))) == ["test"]


def test_a_split_column_that_names_no_part_is_refused_by_file_and_line(make_store):
    with pytest.raises(DataError, match=r"\.txt:2: .* one of train, val, .*, test; got 'holdout'"):
        split_by_column(make_store(["MK", "MK"], ["train", "holdout"], split_column="part"))
    with pytest.raises(DataError, match=r"\.txt:2: .* got ''"):
        split_by_column(make_store(["MK", "MK"], ["train", ""], split_column="part"))
    with pytest.raises(ConfigError, match="split_column"):
        split_by_column(make_store(["MK"]))


def family_store(rng, make_store, families: int = 150):
    """Families of a founder, copies with up to 5 % mutations, copies with ends cut off, and an equal one."""
    payloads, family = [], []
    for i in range(families):
        founder = random_payloads(rng, 1, 150, 300)[0]
        members = [founder, founder.lower()]
        members += [mutated(founder, rate, rng) for rate in rng.uniform(0, 0.05, rng.integers(0, 6))]
        members.append(founder[rng.integers(0, 20) : len(founder) - int(rng.integers(0, 20))])
        payloads += members
        family += [i] * len(members)
    order = rng.permutation(len(payloads))
    return make_store([payloads[i] for i in order]), np.array(family)[order]


def test_similarity_split_never_parts_mutated_copies(rng, make_store):
    store, family = family_store(rng, make_store)
    parts = split_by_similarity(store, FRACTIONS, 1, SIMILARITY)
    assert_is_partition(parts, len(store))
    found = part_of(parts)
    for i in range(family.max() + 1):
        assert len({found[int(row)] for row in np.flatnonzero(family == i)}) == 1
    for name, fraction in FRACTIONS.items():
        assert abs(len(parts[name]) / len(store) - fraction) < 0.02  # a family is 1 % of the records at most
    assert part_of(split_by_similarity(store, FRACTIONS, 1, SIMILARITY)) == found
    assert part_of(split_by_similarity(store, FRACTIONS, 2, SIMILARITY)) != found
    # the mutant of this test: a split by equal payloads alone parts most families
    hashed = part_of(split_by_hash(store, FRACTIONS, seed=1))
    assert any(len({hashed[int(row)] for row in np.flatnonzero(family == i)}) > 1 for i in range(family.max() + 1))


def test_unrelated_records_are_not_lumped_together(rng, make_store):
    store, family = family_store(rng, make_store)
    seen: list[tuple[int, int]] = []
    clusters = similarity_clusters(store, SIMILARITY, progress=lambda *now: seen.append(now))
    assert seen[-1] == (len(store), len(store))
    assert len(set(clusters)) == family.max() + 1
    assert clusters[0] == 0


def test_clusters_do_not_depend_on_the_size_of_pieces(rng, make_store, monkeypatch):
    store, _ = family_store(rng, make_store, 20)
    expected = similarity_clusters(store, SIMILARITY)
    sketches = list(similarity._sketches(store, 5))
    for size in (7, 64, 1000):
        monkeypatch.setattr(similarity, "PIECE_BYTES", size)
        assert list(similarity._sketches(store, 5)) == sketches
        assert similarity_clusters(store, SIMILARITY).tolist() == expected.tolist()


def test_a_sketch_is_the_smallest_hashes_of_the_distinct_kmers(rng, make_store):
    payloads = random_payloads(rng, 20, 1, 300)
    for payload, sketch in zip(payloads, similarity._sketches(make_store(payloads), 3)):
        kmers = {payload[i : i + 3] for i in range(len(payload) - 2)}
        hashes = [int(similarity._hash_kmers(np.frombuffer(kmer.encode(), np.uint8), 3)[0]) for kmer in kmers]
        if hashes:
            assert sketch == sorted(hashes)[: similarity.SKETCH]
        else:
            assert len(sketch) == 1


def test_payloads_shorter_than_a_kmer_are_clustered_when_equal(make_store):
    clusters = similarity_clusters(make_store(["MK", "MKV", "mk", "M", "MK", "MKVAC"]), Similarity(k=5, threshold=0.5))
    assert clusters.tolist() == [0, 1, 0, 2, 0, 3]


def grouped_store(rng, make_store, count: int = 400):
    """Records of which some are copies of others, and some lie in a group."""
    payloads = random_payloads(rng, count, 60, 90)
    payloads[: count // 4] = [mutated(payload, 0.02, rng) for payload in payloads[-(count // 4) :]]
    groups = [str(rng.integers(0, count // 5)) if rng.random() < 0.5 else "" for _ in range(count)]
    return make_store(payloads, groups, group_column="g"), groups


def parted(parts: dict[str, np.ndarray], groups: list[str]) -> list[str]:
    """Groups that lie in several parts."""
    found = part_of(parts)
    members = {group: [row for row, its in enumerate(groups) if its == group] for group in set(groups) - {""}}
    return [group for group, rows in members.items() if len({found[row] for row in rows}) > 1]


@pytest.mark.parametrize("split", [split_by_hash, by_similarity])
def test_a_group_is_never_parted(split, rng, make_store, monkeypatch):
    store, groups = grouped_store(rng, make_store)
    assert store.groups() == [group or None for group in groups]
    parts = split(store, FRACTIONS, seed=5)
    assert_is_partition(parts, len(store))
    assert not parted(parts, groups)
    assert part_of(split(store, FRACTIONS, seed=5)) == part_of(parts)
    # the mutant: a split that overlooks groups
    monkeypatch.setattr(RecordStore, "groups", lambda self: [None] * len(self))
    assert parted(split(store, FRACTIONS, seed=5), groups)


def test_clusters_that_a_group_joins_stay_together(rng, make_store):
    """A is like B, B is in a group with C, C is like D: all four share a part."""
    a, c = random_payloads(rng, 2, 100, 120)
    payloads = [a, mutated(a, 0.02, rng), c, mutated(c, 0.02, rng), *random_payloads(rng, 200, 60, 90)]
    store = make_store(payloads, ["", "g", "g", "", *[""] * 200], group_column="g")
    for seed in range(5):
        found = part_of(split_by_similarity(store, FRACTIONS, seed, SIMILARITY))
        assert len({found[row] for row in range(4)}) == 1


def test_a_record_without_a_group_keeps_the_part_of_its_payload(rng, make_store):
    payloads = random_payloads(rng, 300, 20, 40)
    groups = ["g" if i % 3 else "" for i in range(300)]
    plain = part_of(split_by_hash(make_store(payloads), FRACTIONS, seed=2))
    mixed = part_of(split_by_hash(make_store(payloads, groups, group_column="g"), FRACTIONS, seed=2))
    assert all(plain[row] == mixed[row] for row in range(300) if not groups[row])


def test_a_column_that_parts_a_group_is_refused_with_both_lines(make_store):
    rows = (["MK"] * 5, ["a", "b", "a", "", ""], ["train", "test", "val", "train", "test"])
    with pytest.raises(DataError, match=r"\.txt:3: the group 'a' .* is in validation, and .*\.txt:1 in train"):
        split_by_column(make_store(*rows, group_column="g", split_column="part"))
    whole = (["MK"] * 5, ["a", "b", "a", "", ""], ["train", "test", "train", "train", "test"])
    parts = split_by_column(make_store(*whole, group_column="g", split_column="part"))
    assert {name: rows.tolist() for name, rows in parts.items()} == {"train": [0, 2, 3], "test": [1, 4]}


def test_fractions_that_are_none_and_empty_parts_are_refused(make_store):
    store = make_store(["MKV"] * 5)
    for fractions in ({}, {"train": 0.8}, {"train": 1.2, "validation": -0.2}):
        for split in (split_by_hash, by_similarity):
            with pytest.raises(ConfigError, match="add up to 1; got"):
                split(store, fractions, 0)
    for split in (split_by_hash, by_similarity):
        with pytest.raises(DataError, match=r"would be empty: 5 records at a fraction of 0\.5"):
            split(store, {"train": 0.5, "validation": 0.5}, 0)
    assert len(split_by_hash(store, {"train": 1.0, "validation": 0.0}, 0)["validation"]) == 0
    with pytest.raises(ConfigError, match="k must"):
        Similarity(k=0, threshold=0.5)
    with pytest.raises(ConfigError, match="threshold must"):
        Similarity(k=5, threshold=0.0)


def test_a_domain_says_what_is_similar_and_a_user_says_otherwise(rng, make_store, tmp_path: Path):
    """Long k-mers tell apart what short ones join; the mutant that forgets what was asked for gives the other split."""
    domain = load_domain("protein")
    assert domain.similarity_with() == Similarity(k=5, threshold=0.25)
    assert domain.similarity_with(9) == Similarity(k=9, threshold=0.25)
    assert domain.similarity_with(threshold=0.5) == Similarity(k=5, threshold=0.5)
    with pytest.raises(ConfigError, match="k must be at least 1; got 0"):
        domain.similarity_with(0)
    file = tmp_path / "some.fasta"
    founders = random_payloads(rng, 40, 60, 90)
    copies = [mutated(founder, 0.1, rng) for founder in founders for _ in range(3)]
    file.write_text("".join(f">{i}\n{text}\n" for i, text in enumerate([*founders, *copies])))
    parts = {}
    for name, numbers in {"own": {}, "same": {"k": 5, "threshold": 0.25}, "other": {"k": 20}}.items():
        split = Split(method="similarity", validation_frac=0.4, **numbers)
        spec = DataSpec(domain="protein", sources=str(file), split=split, cache_dir=str(tmp_path / "cache"))
        data = DataModule(spec)
        store = data._store(data.sources, data.read_options(MaskedTokens()))
        parts[name] = {part: rows.tolist() for part, rows in data._deal(store).items()}
    assert parts["own"] == parts["same"] != parts["other"]


def test_payloads_that_cannot_be_compared_are_refused_before_they_are_read(tmp_path: Path):
    said = r"a split by similarity needs a domain whose payloads can be compared; vision has none \(Domain.similarity\)"
    for split in (Split(method="similarity"), Split(method="similarity", k=5, threshold=0.5)):
        with pytest.raises(ConfigError, match=said):
            DataModule(DataSpec(domain="vision", sources=str(tmp_path / "nowhere"), split=split))
    with pytest.raises(ConfigError, match="lab has none"):
        replace(load_domain("protein"), name="lab", similarity=None).similarity_with()
