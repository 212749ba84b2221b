"""Records mixed in pairs: what each is made of is what its labels say, and nothing else of a pack changes."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from labelled import ready, run_data
from meristem.data.pack import pack
from meristem.domain import load_domain
from meristem.errors import ConfigError
from meristem.model.config import Attention, Embedding, FeedForward, NoPosition, TransformerConfig
from meristem.model.model import Model
from meristem.objectives import supervised
from meristem.objectives.mixing import PARTNER, SHARE, Mixing, mix
from meristem.objectives.supervised import Supervised, Target
from meristem.types import IGNORE, PackedBatch, Record
from meristem_domains.vision.patches import PatchTokenizer
from model_runs import outputs_of

GRID = (3, 5)
TOKENIZER = PatchTokenizer(image_px=(12, 20), patch_px=4, num_channels=1, mean=(0.5,), std=(0.5,))
CONFIG = TransformerConfig(
    width=16,
    num_layers=1,
    embedding=Embedding(vocab_size=1, patch_features=16),
    position=NoPosition(),
    attention=Attention(num_heads=2),
    feedforward=FeedForward(width=32),
)


def _batch(rng: np.random.Generator, objective: Supervised, labels: list) -> PackedBatch:
    tokens = []
    for i, label in enumerate(labels):
        image = rng.random((12, 20, 1)).astype(np.float32)
        record = Record.of(str(i), b"", {} if label is None else {"kind": label}, f"x:{i}")
        tokens += objective.prepare(record, ready(TOKENIZER.encode(image)), rng)
    return pack(tokens, range(len(labels)))


def _objective(mixing: Mixing, label_smoothing: float = 0.0) -> Supervised:
    objective = Supervised([Target(name="kind", label_smoothing=label_smoothing)], mixing)
    objective.bind(run_data(TOKENIZER, kind=["a", "b", "c"]))
    return objective


def _shares_of_pixels(batch: PackedBatch, mixed: PackedBatch) -> np.ndarray:
    """What part of each record is its own, by the values alone: least squares of it on the two."""
    num = batch.layout.num_sequences
    before, after = (b.features[: num * 16].view(num, 16, -1)[:, 1:].double().numpy() for b in (batch, mixed))
    shares = []
    for own, other, made in zip(before, before[mixed.labels[PARTNER].numpy()], after):
        # of a mean each patch has one share, of a rectangle each has 0 or 1
        of_patches = ((made - other) * (own - other)).sum(-1) / np.maximum(((own - other) ** 2).sum(-1), 1e-12)
        np.testing.assert_allclose(of_patches[:, None] * (own - other) + other, made, atol=1e-6)
        shares.append(of_patches.mean() if (own != other).any() else 1.0)
    return np.array(shares)


@pytest.mark.parametrize("mixing", [Mixing(mixup=0.8), Mixing(cutmix=1.0), Mixing(mixup=0.4, cutmix=0.7, rate=0.6)])
def test_shares_of_labels_are_shares_of_pixels(rng, mixing):
    batch = _batch(rng, _objective(mixing), list("abcabcabcabc") * 3)
    mixed = mix(batch, mixing, GRID, torch.ones(36, dtype=torch.bool))
    is_self = (mixed.labels[PARTNER] == torch.arange(36)).numpy()
    found = _shares_of_pixels(batch, mixed)
    # a record that is its own partner has whatever share: it is what it was. fp32 at 1e-6 over differences near 0.3
    np.testing.assert_allclose(found[~is_self], mixed.labels[SHARE].numpy()[~is_self], atol=1e-4)
    assert len(np.unique(found.round(3))) > 3  # a grid of 3 x 5 has few rectangles: 5 to 7 shares in 1,200 draws
    assert (found < 0.99).mean() > 0.1  # 0.22 was the least in 1,200 draws
    unchanged = (batch.ids, batch.positions, batch.labels["kind"], batch.layout)
    assert all(a is b for a, b in zip(unchanged, (mixed.ids, mixed.positions, mixed.labels["kind"], mixed.layout)))


def test_rectangles_are_rectangles_that_reach_every_patch(rng):
    mixing = Mixing(cutmix=1.0)
    batch = _batch(rng, _objective(mixing), list("abc") * 40)
    mixed = mix(batch, mixing, GRID, torch.ones(120, dtype=torch.bool))
    before, after = (b.features[: 120 * 16].view(120, 16, -1)[:, 1:] for b in (batch, mixed))
    is_theirs = (before != after).any(-1).view(120, *GRID).numpy()
    for one in is_theirs:
        rows, columns = np.flatnonzero(one.any(1)), np.flatnonzero(one.any(0))
        assert not len(rows) or one[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
    assert is_theirs.any(0).all()
    assert not is_theirs.all(0).any()


def test_a_record_without_a_label_is_left_as_it_is(rng):
    mixing = Mixing(mixup=1.0)
    batch = _batch(rng, _objective(mixing), ["a", None] * 12)
    may = batch.labels["kind"] != IGNORE
    mixed = mix(batch, mixing, GRID, may)
    assert (mixed.labels[SHARE][~may] == 1).all()
    assert (mixed.labels[SHARE][~may[mixed.labels[PARTNER]]] == 1).all()
    assert (mixed.labels[SHARE] < 1).any()


@torch.no_grad()
def _loss(objective: Supervised, model: Model, batch: PackedBatch, seed: int = 0) -> float:
    torch.manual_seed(seed)
    term = objective.loss_of(model, objective.build(CONFIG), batch).terms["kind"]
    assert float(term.count) == objective.counts(batch)["kind"]
    return float(term.sum)


@torch.no_grad()
def _loss_by_hand(objective: Supervised, model: Model, batch: PackedBatch, seed: int, smoothing: float) -> float:
    """Soft targets written out, as a table of probabilities."""
    torch.manual_seed(seed)
    mixed = mix(batch, objective.mixing, GRID, batch.labels["kind"] != IGNORE)
    logits = outputs_of(model, mixed, "kind")
    labels = batch.labels["kind"]
    soft = mixed.labels[SHARE][:, None] * F.one_hot(labels, 3) + (1 - mixed.labels[SHARE][:, None]) * F.one_hot(
        labels[mixed.labels[PARTNER]], 3
    )
    soft = (1 - smoothing) * soft + smoothing / 3
    return float(-(soft * logits.log_softmax(-1)).sum())


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_loss_is_that_of_soft_targets(rng, smoothing):
    objective = _objective(Mixing(mixup=0.5, cutmix=1.0), smoothing)
    batch = _batch(rng, objective, list("abccba") * 3)
    model = Model(CONFIG, objective.heads).train()
    # fp32 sums of 18 losses near 1
    assert _loss(objective, model, batch, 5) == pytest.approx(
        _loss_by_hand(objective, model, batch, 5, smoothing), rel=1e-5
    )
    assert _loss(objective, model, batch, 6) != _loss(objective, model, batch, 5)


def test_labels_that_are_not_mixed_with_their_pictures_would_be_seen(rng, monkeypatch):
    """The mutant: pictures are mixed, labels are not."""
    objective = _objective(Mixing(mixup=0.5))
    batch = _batch(rng, objective, list("abccba") * 3)
    model = Model(CONFIG, objective.heads).train()
    wanted = _loss_by_hand(objective, model, batch, 5, 0.0)

    def mutant(*arguments):
        found = mix(*arguments)
        return replace(found, labels={**found.labels, SHARE: torch.ones_like(found.labels[SHARE])})

    monkeypatch.setattr(supervised, "mix", mutant)
    assert _loss(objective, model, batch, 5) != pytest.approx(wanted, rel=1e-4)


def test_evaluation_neither_mixes_nor_smooths(rng):
    objective, plain = _objective(Mixing(mixup=0.5, cutmix=1.0), 0.2), _objective(Mixing())
    batch = _batch(rng, objective, list("abccba"))
    model = Model(CONFIG, objective.heads).eval()
    assert _loss(objective, model, batch) == _loss(plain, model, batch)


def test_what_cannot_be_mixed_is_refused():
    for target in (
        Target(name="kind", level="token"),
        Target(name="kind", task="regression"),
        Target(name="kind", class_weights="balanced"),
    ):
        with pytest.raises(ConfigError, match="mixing needs targets that are classes of whole records"):
            Supervised([target], Mixing(mixup=0.2))
    residues = load_domain("protein").tokenizer()
    with pytest.raises(ConfigError, match="patches on one grid"):
        Supervised([Target(name="kind")], Mixing(cutmix=1.0)).bind(run_data(residues, kind=["a", "b"]))
    for wrong in ({"mixup": -1}, {"rate": 1.5}, {"cutmix_frac": -0.1}):
        with pytest.raises(ConfigError, match="mixing"):
            Mixing(**wrong)


def test_top_five_and_confusions_count_as_by_hand(rng):
    objective = Supervised([Target(name="kind")])
    names = list("abcdefgh")
    objective.bind(run_data(TOKENIZER, kind=names))
    logits, wanted = torch.randn(200, 8), torch.from_numpy(rng.integers(0, 8, 200))
    top5, confusion = objective.metrics()["kind/top5"], objective.confusions()["kind"]
    top5.update(logits, wanted)
    confusion.update(logits, wanted)
    hits = [label in np.argsort(row)[-5:] for row, label in zip(logits.numpy(), wanted.numpy())]
    assert float(top5.compute()) == pytest.approx(np.mean(hits))
    counts = np.zeros((8, 8), int)
    np.add.at(counts, (wanted.numpy(), logits.argmax(-1).numpy()), 1)
    assert np.array_equal(confusion.compute().numpy(), counts)
