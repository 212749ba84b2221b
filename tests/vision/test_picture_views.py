"""Views of pictures: a pure function of their generator, in training alone, and of every option that is set."""

import contextlib
import io
import itertools
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import encoded, write_folder
from PIL import Image

from meristem.cli.configs import shipped_configs
from meristem.cli.run_config import parse
from meristem.data.loader import EvalLoader, TrainLoader
from meristem.data.pack_maker import PackMaker
from meristem.data.parts import Part, RunData
from meristem.data.records import ReadOptions, Source
from meristem.data.store import RecordStore
from meristem.data.views import Views
from meristem.errors import ConfigError
from meristem.objectives.supervised import Supervised, Target
from meristem.train.run import build
from meristem.types import Record, Tokens
from meristem_domains.vision import domain
from meristem_domains.vision import views as views_module
from meristem_domains.vision.patches import PatchTokenizer

TOKENIZER = domain.tokenizer(image_px=16, patch_px=4)
OPTIONS = {
    "crop_scale": [0.3, 0.6],
    "shift_frac": 0.2,
    "turn_degrees": 30.0,
    "zoom_frac": 0.3,
    "flip": 1.0,
    "auto_augment": "rand-m9-n3-p1-mstd0.5-inc1",
    "color_jitter": 0.5,
    "erase": 1.0,
}


def _seen(views: Views, payload: bytes, rng: np.random.Generator, tokenizer: PatchTokenizer = TOKENIZER) -> Tokens:
    """Tokens of the first view of a picture."""
    return tokenizer.encode(views.views(Record.of("a", payload), rng)[0].payload)


def _view(payload: bytes, seed: int, **options) -> np.ndarray:
    return _seen(domain.build_views(TOKENIZER, **options), payload, np.random.default_rng(seed)).features


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_changes_a_picture_and_another_seed_changes_it_otherwise(rng, name):
    payload = encoded(rng, height=16, width=16)
    plain = TOKENIZER.encode(payload).features
    views = [_view(payload, seed, **{name: OPTIONS[name]}) for seed in range(6)]
    assert any((view != plain).any() for view in views)
    assert name == "flip" or any((view != views[0]).any() for view in views)
    assert all(np.array_equal(view, _view(payload, seed, **{name: OPTIONS[name]})) for seed, view in enumerate(views))


def test_without_options_a_view_is_the_picture(rng):
    payload = encoded(rng)
    assert np.array_equal(_view(payload, 0), TOKENIZER.encode(payload).features)


def test_flip_is_a_flip(rng):
    payload = encoded(rng, height=16, width=16)
    wanted = TOKENIZER.decode(TOKENIZER.encode(payload))[:, ::-1]
    view = _seen(domain.build_views(TOKENIZER, flip=1.0), payload, rng)
    # the standard values are undone in fp32
    np.testing.assert_allclose(TOKENIZER.decode(view), wanted, atol=1e-6)


def test_erased_parts_are_rectangles_of_the_picture(rng):
    payload = encoded(rng, height=16, width=16)
    plain = TOKENIZER.decode(TOKENIZER.encode(payload))
    view = _seen(domain.build_views(TOKENIZER, erase=1.0), payload, np.random.default_rng(3))
    is_changed = (np.abs(TOKENIZER.decode(view) - plain) > 1e-6).any(-1)
    rows, columns = np.flatnonzero(is_changed.any(1)), np.flatnonzero(is_changed.any(0))
    assert 0 < is_changed.mean() < 0.5
    assert is_changed[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].mean() > 0.95


def _states() -> tuple:
    return random.getstate(), np.random.get_state()[1].tolist(), torch.random.get_rng_state().tolist()  # noqa: NPY002


def test_global_generators_are_neither_drawn_from_nor_moved(rng):
    payload = encoded(rng)
    options = {name: OPTIONS[name] for name in OPTIONS if name != "color_jitter"}
    first = _view(payload, 5, **options)
    random.random(), np.random.random(), torch.rand(1)  # noqa: NPY002
    before = _states()
    assert np.array_equal(_view(payload, 5, **options), first)
    assert _states() == before


@pytest.mark.parametrize("channels", [1, 3])
def test_views_of_grey_and_deep_pictures(rng, channels):
    tokenizer = domain.tokenizer(image_px=16, patch_px=4, num_channels=channels, mean=0.2, std=0.3)
    views = domain.build_views(tokenizer, auto_augment="rand-m9-n4-p1", shift_frac=0.1, erase=0.5)
    for seed in range(30):
        view = _seen(views, encoded(rng), np.random.default_rng(seed), tokenizer)
        assert view.features.shape == (17, channels * 16)
        assert np.isfinite(view.features).all()
    stream = io.BytesIO()
    Image.fromarray(rng.integers(0, 2**16, (16, 16)).astype(np.uint16)).save(stream, "PNG")
    assert np.isfinite(_seen(views, stream.getvalue(), rng, tokenizer).features).all()


def test_at_native_resolution_a_view_has_as_many_patches_as_the_picture(rng):
    tokenizer = domain.tokenizer(image_px=None, patch_px=4, max_patches=20)
    views = domain.build_views(tokenizer, auto_augment="rand-m9", shift_frac=0.2, turn_degrees=10, flip=0.5, erase=0.5)
    for height, width in ((8, 24), (30, 12), (40, 41)):
        payload = encoded(rng, height=height, width=width)
        wanted, view = tokenizer.encode(payload), _seen(views, payload, rng, tokenizer)
        assert np.array_equal(view.positions, wanted.positions)
        assert view.features.shape == wanted.features.shape


@pytest.fixture
def store(rng, tmp_path: Path) -> RecordStore:
    root = write_folder(tmp_path / "pictures", {f"{'ab'[i % 2]}/{i}.png": encoded(rng, shade=i % 2) for i in range(12)})
    options = ReadOptions(label_columns=("label",))
    return RecordStore.build(domain.reader, [Source(str(root))], options, name="vision", cache_dir=tmp_path / "cache")


def _objective(store: RecordStore) -> Supervised:
    objective = Supervised([Target(name="label")])
    objective.bind(RunData(TOKENIZER, {"train": Part(store, np.arange(len(store)))}))
    return objective


def _packs(store: RecordStore, count: int = 6, **options) -> list:
    views = domain.build_views(TOKENIZER, crop_scale=[0.4, 1], auto_augment="rand-m9", erase=0.5, **options)
    maker = PackMaker(store, np.arange(len(store)), TOKENIZER, _objective(store), 4, views=views)
    loader = TrainLoader(maker, tokens_per_batch=17 * 4, packs_per_step=1)
    return list(itertools.islice(iter(loader), count))


def test_packs_are_equal_with_workers_and_anew_and_other_in_each_epoch(store):
    first = _packs(store)
    views = domain.build_views(TOKENIZER, crop_scale=[0.4, 1], auto_augment="rand-m9", erase=0.5)
    maker = PackMaker(store, np.arange(len(store)), TOKENIZER, _objective(store), 4, views=views)
    loader = TrainLoader(maker, tokens_per_batch=17 * 4, packs_per_step=1, workers=2)
    in_workers = list(itertools.islice(iter(loader), len(first)))
    for one, again, other in zip(first, _packs(store), in_workers):
        assert one.records == again.records == other.records
        assert torch.equal(one.features, again.features)
        assert torch.equal(one.features, other.features)
        assert torch.equal(one.labels["label"], other.labels["label"])
    # 12 pictures in packs of 4: the second epoch begins with the fourth pack
    epochs = [
        {record: rows for batch in part for record, rows in zip(batch.records, batch.features.view(4, 17, -1))}
        for part in (first[:3], first[3:])
    ]
    assert epochs[0].keys() == epochs[1].keys()
    assert all((epochs[0][record] != epochs[1][record]).any() for record in epochs[0])


def test_a_generator_that_is_not_seeded_is_seen(store, monkeypatch):
    """The mutant of the test above: transforms that draw from global generators."""
    monkeypatch.setattr(views_module, "drawn_from", lambda rng: contextlib.nullcontext())
    assert any((a.features != b.features).any() for a, b in zip(_packs(store), _packs(store)))


def test_repeats_are_other_views_of_one_picture_in_one_pack_of_the_planned_size(store):
    for batch in _packs(store, repeats=2):
        assert batch.layout.lengths == (17,) * 4
        assert sorted(batch.records)[::2] == sorted(batch.records)[1::2]
        rows = {record: [] for record in batch.records}
        for record, values in zip(batch.records, batch.features.view(4, 17, -1)):
            rows[record].append(values)
        assert all((one != two).any() for one, two in rows.values())


def test_evaluation_sees_pictures_as_they_are(store):
    views = domain.build_views(TOKENIZER, flip=1.0, erase=1.0, repeats=2)
    rows = np.arange(len(store))
    maker = PackMaker(store, rows, TOKENIZER, _objective(store), 0, views=views, is_training=False)
    loader = EvalLoader(maker, tokens_per_batch=1000)
    (batch,) = loader
    for record, values in zip(batch.records, batch.features.view(12, 17, -1)):
        wanted = TOKENIZER.encode(store.records(np.array([record]))[0].payload)
        assert np.array_equal(values.numpy(), wanted.features)


def test_views_travel_to_workers_after_they_were_used(rng):
    payload, views = encoded(rng), domain.build_views(TOKENIZER, auto_augment="rand-m9", erase=1.0)
    first = _seen(views, payload, np.random.default_rng(1))
    again = _seen(pickle.loads(pickle.dumps(views)), payload, np.random.default_rng(1))
    assert np.array_equal(first.features, again.features)


WRONG = {
    "shift_frac": (1.0, "shift_frac must be in"),
    "flip": (1.5, "flip must be in"),
    "turn_degrees": (-1, "turn_degrees must be 0 or more"),
    "repeats": (0, "repeats must be 1 or more"),
    "crop_scale": ([0.5], "crop_scale must be"),
    "auto_augment": ("rand-q9", "auto_augment must be a policy"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_options_are_named(name):
    value, said = WRONG[name]
    with pytest.raises(ConfigError, match=said):
        domain.build_views(TOKENIZER, **{name: value})


def test_options_without_an_effect_are_refused():
    with pytest.raises(ConfigError, match="has no effect"):
        domain.build_views(TOKENIZER, auto_augment="rand-m9", color_jitter=0.1)
    with pytest.raises(ConfigError, match="one size"):
        domain.build_views(domain.tokenizer(image_px=None), crop_scale=[0.5, 1])
    with pytest.raises(ConfigError, match="1 or 3 channels"):
        domain.build_views(domain.tokenizer(num_channels=4))


@pytest.mark.parametrize("name", ["cifar10", "finetune", "mnist", "vit_small", "vit_tiny"])
def test_configs_of_training_are_whole_and_say_what_they_take(name):
    path = shipped_configs()[f"vision/{name}"]
    header = path.read_text("utf-8").split("\nmodel:")[0]
    assert all(word in header for word in ("command:", "hardware:", "minutes:", "expected:"))
    config = parse(["--config", f"vision/{name}", "--data.sources", "pictures"])
    assert config is not None
    task, data = build(config)
    assert data.views is not None
    assert task.architecture.embedding.patch_features == data.tokenizer.num_features
    assert task.spec.ema_decay


def test_a_domain_without_views_refuses_them():
    arguments = ["--config", "protein/sample", "--data.views", "{flip: 0.5}"]
    config = parse(arguments)
    assert config is not None
    with pytest.raises(ConfigError, match=r"data\.views must not be set: the domain protein has no views"):
        build(config)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5", "rand-m10-mstd0.5-inc1", "augmix-m10", "original", "v0", "3a"])
def test_a_policy_at_its_strongest_changes_any_number_of_pictures(rng, policy, channels):
    """Operations are drawn at every level. One that fails would stop a run for good, as it is drawn again."""
    tokenizer = domain.tokenizer(image_px=8, patch_px=4, num_channels=channels)
    views = domain.build_views(tokenizer, auto_augment=policy, repeats=300)
    payload = encoded(rng, height=8, width=8)
    found = views.views(Record.of("a", payload), rng)
    assert len(found) == 300
    assert all(np.isfinite(one.payload.values).all() for one in found)
